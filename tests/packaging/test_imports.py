"""Imports that must work without optional packages, or that must stay light.

The contracts in pyproject.toml say which module may import which; `make lint` checks them.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ABSENT = ["triton", "liger_kernel", "scipy"]
SCORING = ["lm_eval", "datasets", "evaluate"]
HEAVY = SCORING + [f"bench.{package}" for package in ("train", "evaluate", "runs", "speed", "models", "sandbox")]

OF_MALORA = f"""
sys.modules |= dict.fromkeys({ABSENT})
import malora
print("malora loads", [name for name in ("malora.analysis", "transformers.trainer") if name in sys.modules])
malora.RouterCallback
"""
OF_REPORTS = f"""
import importlib, pkgutil, bench.report as report
for module in pkgutil.walk_packages(report.__path__, "bench.report."):
    importlib.import_module(module.name)
print("reports load", [name for name in {HEAVY} if name in sys.modules])
sys.modules |= dict.fromkeys({SCORING})
import bench.speed.cli
"""
# Torch and PEFT take most of the time. Both parts need them, so they are imported once, before a fork.
BOTH = f"""
import os, sys
import peft, torch
if (child := os.fork()) == 0:
    exec({OF_MALORA!r})
else:
    assert os.waitpid(child, 0)[1] == 0, "malora does not import"
    exec({OF_REPORTS!r})
"""


def test_malora_needs_no_extra_and_reports_load_no_trainer_and_the_speed_benchmark_needs_no_evaluation():
    """Malora needs neither Triton nor Liger nor scipy, and does not load transformers' trainer."""
    done = subprocess.run([sys.executable, "-c", BOTH], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["malora loads []", "reports load []"]
