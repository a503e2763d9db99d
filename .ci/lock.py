"""Print the exact versions of the packages installed in this environment, as constraints for pip.

Left out are malora itself, pip, and what depends on the build of torch that was chosen: torch, Triton and NVIDIA's
libraries.
"""

import platform
import re
from importlib.metadata import distributions

LEFT_OUT = re.compile(r"malora|pip|torch|triton|nvidia-.*|cuda-.*")


def normalize(name: str) -> str:
    """Return a distribution's name as package indexes spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Write the constraints to standard output."""
    versions = {normalize(package.name): package.version for package in distributions()}
    print("# Made by `make lock`. Do not edit.")
    print(
        f"# Python {platform.python_version()}, {platform.system()}, torch {versions['torch']}, which is not in here."
    )
    for name, version in sorted(versions.items()):
        if not LEFT_OUT.fullmatch(name):
            print(f"{name}=={version}")


if __name__ == "__main__":
    main()
