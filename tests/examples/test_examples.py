"""Every example runs, from another folder and with two steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_saves_its_adapter(example, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, example, "--steps", "2", "--output", tmp_path / "adapter"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_readme_lists_every_example():
    text = (ROOT / "examples" / "README.md").read_text()
    assert all(f"({example.name})" in text for example in EXAMPLES)
