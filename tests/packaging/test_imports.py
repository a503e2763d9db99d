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


def test_malora_needs_neither_triton_nor_liger_nor_scipy_and_does_not_load_trainer():
    absent = ["triton", "liger_kernel", "scipy"]
    loaded = run(
        f"import sys; sys.modules |= dict.fromkeys({absent}); import malora\n"
        "print([name for name in ('malora.analysis', 'transformers.trainer') if name in sys.modules])\n"
        "malora.RouterCallback"
    )
    assert loaded == "[]"


def test_reports_load_no_trainer_and_no_evaluation_and_the_speed_benchmark_needs_none():
    """Check both in one process, because starting it takes longer than either."""
    scoring = ["lm_eval", "datasets", "evaluate"]
    heavy = scoring + [f"bench.{package}" for package in ("train", "evaluate", "runs", "speed", "models", "sandbox")]
    loaded = run(
        "import importlib, pkgutil, sys, bench.report as report\n"
        "for module in pkgutil.walk_packages(report.__path__, 'bench.report.'):\n"
        "    importlib.import_module(module.name)\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
        f"sys.modules |= dict.fromkeys({scoring})\n"
        "import bench.speed.cli"
    )
    assert loaded == "[]"
