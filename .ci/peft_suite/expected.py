"""Tests of PEFT that fail on purpose, and the comparison of a run with them."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import our_configs

KINDS = ("any", "router", "frozen")


@dataclass(frozen=True)
class Outcome:
    """Outcome of one test.

    Attributes:
        outcome: "passed", "failed" or "skipped".
        error: Message of the failure, or reason of the skip.
    """

    outcome: str
    error: str


@dataclass(frozen=True)
class Difference:
    """Tests that fail on purpose.

    Attributes:
        reason: Why.
        error: Regular expression that finds the message of each failure.
        methods: Methods that the tests fail for: "any", those with a "router", or with "frozen" factors.
        tests: Names of the tests, as "module::function" or "module::function[parameters]".
    """

    reason: str
    error: str
    methods: str
    tests: list[str]

    def has(self, test: str) -> bool:
        """Return whether this test is listed."""
        names = {short_name(test), short_name(test).partition("[")[0]}
        return not names.isdisjoint(self.tests) and (self.methods == "any" or self.methods in kinds_of(test))


def read(file: Path) -> list[Difference]:
    """Read the list.

    Raises:
        ValueError: An entry is incomplete, or names a kind of methods that does not exist.
    """
    entries = [Difference(**entry) for entry in tomllib.loads(file.read_text(encoding="utf-8"))["differs"]]
    for entry in entries:
        if entry.methods not in KINDS:
            raise ValueError(f"{file}: methods = {entry.methods!r} is unknown; choose from {', '.join(KINDS)}.")
    return entries


def short_name(test: str) -> str:
    """Return a test's name without its class: "test_config::test_methods[malora]"."""
    path, bracket, parameters = test.partition("[")
    module, *_, function = path.split("::")
    return f"{module.removesuffix('.py')}::{function}{bracket}{parameters}"


def kinds_of(test: str) -> set[str]:
    """Return what the method in a test's parameters has: a "router", "frozen" factors."""
    parameters = f"-{test.partition('[')[2].removesuffix(']')}-"
    methods = our_configs.METHODS | our_configs.MORE_METHODS
    name = max((name for name in methods if f"-{name}-" in parameters), key=len, default=None)
    options = methods[name] if name else {"num_experts": 1}
    kinds = {"router": options["num_experts"] > 1, "frozen": "freeze" in options}
    return {kind for kind, applies in kinds.items() if applies}


def compare(
    outcomes: dict[str, Outcome], differences: list[Difference], *, is_all: bool, is_partial: bool
) -> list[str]:
    """Return one line for each test that did not do what is expected.

    Args:
        outcomes: Outcome by test.
        differences: Tests that fail on purpose.
        is_all: Whether every method and model ran. Otherwise some tests ran with some of their parameters only.
        is_partial: Whether only some tests ran, so that those missing say nothing.
    """
    lines = []
    for test, result in outcomes.items():
        listed = [entry for entry in differences if entry.has(test)]
        if result.outcome == "failed":
            if not any(re.search(entry.error, result.error) for entry in listed):
                lines.append(f"unexpected failure: {test}\n    {result.error.splitlines()[0][:300]}")
        elif listed and result.outcome == "passed":
            lines.append(f"expected to fail, but passed: {test}\n    {listed[0].reason}")
    ran = {short_name(test) for test in outcomes}
    ran |= {name.partition("[")[0] for name in ran}
    if not is_partial:
        listed_tests = [name for entry in differences for name in entry.tests]
        lines += [
            f"listed, but not run: {name}"
            for name in listed_tests
            if (name if is_all else name.partition("[")[0]) not in ran
        ]
    return lines


def summarize(outcomes: dict[str, Outcome]) -> str:
    """Return the counts of a run in one line."""
    counts = Counter(result.outcome for result in outcomes.values())
    parts = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    return f"PEFT's tests with our adapters: {parts}"
