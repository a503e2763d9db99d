"""Imports that must work without optional packages, or that must stay light.

The contracts in pyproject.toml say which module may import which; `make lint` checks them.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_malora_needs_neither_triton_nor_liger_nor_scipy():
    absent = ["triton", "liger_kernel", "scipy"]
    loaded = run(
        f"import sys; sys.modules |= dict.fromkeys({absent}); import malora; print('malora.analysis' in sys.modules)"
    )
    assert loaded == "False"


def test_reports_load_no_trainer_and_no_evaluation():
    heavy = ["lm_eval", "datasets", "evaluate"]
    heavy += [f"bench.{package}" for package in ("train", "evaluate", "runs", "speed", "models", "sandbox")]
    loaded = run(
        "import importlib, pkgutil, sys, bench.report as report\n"
        "for module in pkgutil.walk_packages(report.__path__, 'bench.report.'):\n"
        "    importlib.import_module(module.name)\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    assert loaded == "[]"
