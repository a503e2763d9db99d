"""The summary of skipped tests, and the rule of CI about them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.skip_report import avoidable_skips, summarize_skips

ROOT = Path(__file__).resolve().parents[2]
GPU = "needs a GPU"
CHROMIUM = "no Chromium starts here: Executable doesn't exist"


def test_each_missing_thing_has_one_line_and_an_unknown_reason_is_shown_as_it_is():
    lines = summarize_skips([GPU, "the interpreter has no races", CHROMIUM, "a full moon"])
    assert lines == [
        "2 skipped: need an NVIDIA GPU",
        "1 skipped: need chromium: apt install chromium",
        "1 skipped: a full moon",
    ]


def test_only_hardware_and_quantization_may_be_missing_in_ci():
    assert avoidable_skips([GPU, CHROMIUM, "a full moon"]) == [CHROMIUM, "a full moon"]


@pytest.mark.parametrize("is_ci, reason, passes, workers", [
    (False, CHROMIUM, True, "0"),
    (True, CHROMIUM, False, "0"),
    (True, GPU, True, "0"),
    (True, CHROMIUM, False, "2"),  # the reasons come from the workers, each of which is a new process
])  # fmt: skip
def test_a_session_reports_skipped_tests_and_modules(is_ci, reason, passes, workers, tmp_path):
    (tmp_path / "conftest.py").write_text(
        "from tests.skip_report import SkipReport\n"
        "def pytest_configure(config):\n"
        "    config.pluginmanager.register(SkipReport(config))\n"
    )
    (tmp_path / "test_module.py").write_text(f"import pytest\npytest.skip({reason!r}, allow_module_level=True)\n")
    (tmp_path / "test_one.py").write_text(
        f"import pytest\n@pytest.mark.skip(reason={reason!r})\ndef test_skipped(): pass\ndef test_passes(): pass\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(ROOT), "MALORA_CI": "1" if is_ci else ""}
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider", "--rootdir", tmp_path]
    run = subprocess.run([*command, tmp_path], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (run.returncode == 0) == passes, run.stdout + run.stderr
    assert "1 passed" in run.stdout and "2 skipped: need" in run.stdout
