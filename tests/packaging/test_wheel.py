"""The wheel, which contains malora alone.

It works with the dependencies that it declares and no others.
"""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("train_two_steps.py")


def surroundings() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}


def run(*command, cwd: Path) -> str:
    result = subprocess.run([str(c) for c in command], cwd=cwd, env=surroundings(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy of the checkout.

    A copy is needed since a build writes into its source folder.
    """
    copy, built = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("malora", "bench", "tasks", "tests", "examples"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", built, copy, cwd=built)
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel) -> Distribution:
    (folder,) = (path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    return PathDistribution(folder)


def test_the_wheel_holds_malora_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.partition("/")[0] for name in names}
    assert folders == {"malora", next(name for name in folders if name.endswith(".dist-info"))}
    assert "malora/py.typed" in names
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "malora").rglob("*.py")}
    assert ours == {name for name in names if name.endswith(".py")}


def test_the_metadata_names_the_version_and_few_dependencies(metadata):
    (line,) = (line for line in (ROOT / "malora/__init__.py").read_text().splitlines() if "__version__ =" in line)
    assert metadata.version == line.split('"')[1]
    assert f"\nversion: {metadata.version}\n" in (ROOT / "CITATION.cff").read_text()
    assert names_of(metadata) == {"torch", "transformers", "peft", "safetensors"}
    assert names_of(metadata, "analysis") - names_of(metadata) == {"numpy", "scipy"}


def test_an_adapter_trains_in_an_environment_with_the_declared_dependencies_alone(wheel, metadata, tmp_path):
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv/bin/python"
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    link_dependencies(metadata, packages)

    absent = ("bench", "tasks", "tests", "scipy", "pandas", "datasets", "lm_eval")
    find = f"import importlib.util as u; print([name for name in {absent} if u.find_spec(name)])"
    assert run(python, "-I", "-c", find, cwd=tmp_path).strip() == "[]"
    # One process runs the program and then the installed script, because torch takes seconds to import.
    script = tmp_path / "venv/bin/malora-lm-eval"
    assert script.read_text().splitlines()[0] == f"#!{python}" and os.access(script, os.X_OK)
    code = f"import runpy; runpy.run_path({str(PROGRAM)!r}); runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([python, "-I", "-c", code], cwd=tmp_path, env=surroundings(), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stdout.splitlines()[-1] == str(packages / "malora")
    assert done.stderr.splitlines()[-1] == "malora-lm-eval needs lm-eval: pip install 'lm-eval[hf]'."


def names_of(package: Distribution, extra: str = "") -> set[str]:
    """Return the names of the distributions that a package declares.

    Only those that apply to this Python count.
    """
    requirements = map(Requirement, package.requires or ())
    return {r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})}


def link_dependencies(package: Distribution, packages: Path) -> None:
    """Link into a folder the declared dependencies and their own ones in turn.

    Nothing else is linked.
    The files are those of the running environment, so that nothing has to be downloaded.
    """
    pending, done = [(package, "")], set()
    while pending:
        needing, extra = pending.pop()
        for requirement in map(Requirement, needing.requires or ()):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            for wanted in ("", *requirement.extras):
                if (requirement.name, wanted) in done:
                    continue
                done.add((requirement.name, wanted))
                try:
                    found = distribution(requirement.name)
                except PackageNotFoundError:
                    pytest.fail(f"{needing.name} declares {requirement}, which is not installed here")
                pending.append((found, wanted))
                link_files(found, packages)


def link_files(package: Distribution, packages: Path) -> None:
    """Link what a distribution has at the top of its site-packages.

    Both files and folders are linked.
    """
    for name in {path.parts[0] for path in package.files or ()} - {"..", "__pycache__"}:
        if not (packages / name).exists():
            (packages / name).symlink_to(str(package.locate_file(name)))
