"""The lock file of the packages that a checkout needs.

It names one version of every package, and no place of one machine.
"""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def lines_of_lock() -> list[str]:
    text = (ROOT / "requirements.lock").read_text()
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_every_line_is_a_name_and_a_version():
    assert [line for line in lines_of_lock() if not re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.!]+", line)] == []


def test_the_lock_satisfies_the_project_and_leaves_the_build_of_torch_open():
    versions = dict(line.split("==") for line in lines_of_lock())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["analysis"], *extras["bench"], *extras["docs"], *extras["dev"]]
    for requirement in map(Requirement, needed):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in ("malora", "torch", "triton"):
            assert name not in versions
        else:
            assert versions[name] in requirement.specifier, f"run `make lock`: {requirement}"
