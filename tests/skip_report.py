"""Summary of skipped tests: one line for each reason, with the way to run them.

Where `MALORA_CI=1` is set, only tests that need other hardware may be skipped. Any other skip fails the session, since
it means that CI did not install something.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Need:
    """Something that a machine may lack.

    Attributes:
        pattern: Regular expression that finds it in the reason of a skip.
        text: What to print: the thing needed and the way to have it.
        may_lack: True where CI need not have it: other hardware, or packages that `make test-quantized` or `make
            test-ray` brings.
    """

    pattern: str
    text: str
    may_lack: bool = False


# The first need that matches a reason counts.
NEEDS = (
    Need(r"bubblewrap|sandbox|user namespace", "need bubblewrap: apt install bubblewrap"),
    Need(r"[Cc]hromium|browser", "need chromium: apt install chromium"),
    Need(
        r"playwright|itables|tensorboard|\btrl\b|extra '",
        "need the dev extra: pip install --editable '.[dev]'",
    ),
    Need("AVX512", "need a CPU with AVX512-BF16", may_lack=True),
    Need("bitsandbytes|torchao|optimum|gptqmodel", "are run by make test-quantized", may_lack=True),
    Need(r"\bray\b", "are run by make test-ray", may_lack=True),
    Need(r"git checkout", "need a git checkout, not a copy of the files"),
    Need(r"\bAF_\w+|\bIPv6\b", "need a kind of network address that this machine lacks", may_lack=True),
    Need(r"Triton.* CPU|gloo|without a GPU", "run on CPU only: set CUDA_VISIBLE_DEVICES= to empty", may_lack=True),
    Need(r"\bGPUs?\b|CUDA|Hopper|has no races", "need an NVIDIA GPU", may_lack=True),
    Need(r"[Tt]riton", "need Triton: pip install triton (Linux only)"),
)


def find_need(reason: str) -> Need | None:
    """Return what the reason of a skip says is missing, or None for an unknown reason."""
    return next((need for need in NEEDS if re.search(need.pattern, reason)), None)


def summarize_skips(reasons: Iterable[str]) -> list[str]:
    """Return one line for each thing that is missing, the most frequent first."""
    counts = Counter(need.text if (need := find_need(reason)) else reason for reason in reasons)
    return [f"{count} skipped: {text}" for text, count in counts.most_common()]


def avoidable_skips(reasons: Iterable[str]) -> list[str]:
    """Return the reasons that installing something would remove."""
    return [reason for reason in reasons if not ((need := find_need(reason)) and need.may_lack)]


class SkipReport:
    """Plugin for pytest that collects the reasons of skips and prints their summary.

    pytest-xdist does not forward skips of whole modules, so every worker sends its own with `workeroutput`.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.module_reasons: dict[str, str] = {}
        self.test_reasons: dict[str, str] = {}

    @property
    def reasons(self) -> list[str]:
        """Reasons of all skips so far, one for each test or module."""
        return [*self.module_reasons.values(), *self.test_reasons.values()]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.module_reasons[report.nodeid] = reason_of(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.test_reasons[report.nodeid] = reason_of(report)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        self.module_reasons |= getattr(node, "workeroutput", {}).get("module_reasons", {})

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["module_reasons"] = self.module_reasons
        elif is_ci() and avoidable_skips(self.reasons) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in summarize_skips(self.reasons):
            terminalreporter.write_line(line)
        if is_ci() and (avoidable := avoidable_skips(self.reasons)):
            terminalreporter.write_line(
                f"MALORA_CI=1 allows no skip but for hardware; {len(avoidable)} tests or modules need an installation.",
                red=True,
            )


def reason_of(report: pytest.CollectReport | pytest.TestReport) -> str:
    """Return why a test or a module was skipped."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def is_ci() -> bool:
    """Return True where only missing hardware is a reason to skip."""
    return os.environ.get("MALORA_CI") == "1"
