"""Run PEFT's own tests with our adapters in place of its own, and compare with what is expected.

    make peft-suite            the methods and models that tell most, as in CI
    make peft-suite ARGS=--all every method and model

The tests are those of the installed version of PEFT. Its source distribution has them, and pip downloads that once.
`expected.toml` lists the tests that fail on purpose, and why. Any other failure is an error, and so is a listed test
that passes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import expected
import our_configs

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".peft-suite"


def main() -> int:
    """Run the tests and print the differences; return the exit code."""
    parser = argparse.ArgumentParser(prog="make peft-suite", description="Run PEFT's tests with our adapters.")
    parser.add_argument("--all", action="store_true", help="every method and model")
    parser.add_argument("--workers", default="2", help="processes of pytest (default: 2)")
    parser.add_argument("-k", metavar="EXPRESSION", help="run only matching tests, as pytest does")
    arguments = parser.parse_args()
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(CACHE / "hub"),
        "OMP_NUM_THREADS": "1",
        "PEFT_SUITE_ALL": str(int(arguments.all)),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    import stand_ins  # reads the environment

    stand_ins.make_stand_ins(CACHE / "hub")
    tests = fetch_tests(version("peft"))
    modules = [str(tests / f"{name}.py") for name in our_configs.tables(arguments.all)]
    outcomes = run_pytest(tests.parent, [*modules, "-n", arguments.workers, "--dist", "worksteal"], arguments.k)
    listed = expected.read(HERE / "expected.toml")
    lines = expected.compare(outcomes, listed, is_all=arguments.all, is_partial=arguments.k is not None)
    print(expected.summarize(outcomes))
    print(*lines, sep="\n")
    return 1 if lines else 0


def fetch_tests(peft_version: str) -> Path:
    """Return the folder of PEFT's tests, and download them if it does not exist.

    The folder is a package of another name than that of our tests.
    """
    folder = CACHE / peft_version / "peft_tests"
    if not (folder / "__init__.py").exists():
        with tempfile.TemporaryDirectory() as downloads:
            subprocess.run(
                [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps",
                 "--no-binary=peft", "--no-build-isolation", f"--dest={downloads}", f"peft=={peft_version}"],
                check=True,
            )  # fmt: skip
            (archive,) = Path(downloads).glob("*.tar.gz")
            with tarfile.open(archive) as files:
                files.extractall(downloads, filter="data")
            (source,) = Path(downloads).glob("peft-*/tests")
            folder.mkdir(parents=True, exist_ok=True)
            for file in source.glob("*.py"):
                (folder / file.name).write_bytes(file.read_bytes())
        (folder / "__init__.py").touch()
    return folder


def run_pytest(folder: Path, arguments: list[str], expression: str | None) -> dict[str, expected.Outcome]:
    """Run pytest with our plugin and return the outcome of each test.

    Raises:
        SystemExit: pytest could not run the tests.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "outcomes.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            str(HERE / "pytest.ini"),
            f"--rootdir={folder}",
            "-p",
            "plugin",
        ]
        command += [*arguments, *(["-k", expression] if expression else [])]
        process = subprocess.run(
            command, env={**os.environ, "PEFT_SUITE_OUTCOMES": str(file)}, cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        if process.returncode not in (0, 1) or not file.exists():  # 1: some tests failed
            sys.exit(f"{process.stdout}\npytest could not run PEFT's tests (exit code {process.returncode}).")
        return {
            name: expected.Outcome(**outcome) for name, outcome in json.loads(file.read_text(encoding="utf-8")).items()
        }


if __name__ == "__main__":
    sys.exit(main())
