"""The time that `make test` took, read from the file that it leaves."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from bench.errors import UserError
from bench.records.provenance import ROOT
from bench.regress.figures import Comparison

# `make test` writes it, in JUnit's format, if it runs all tests.
REPORT = ROOT / "results" / "local" / "test-suite.xml"
MAX_SECONDS = 300  # on two cores; CONTRIBUTING.md promises it
MAX_SECONDS_ELSEWHERE = 600  # on other processors, which may have half the speed


def compare_suite(report: Path, is_same: bool) -> tuple[list[Comparison], str]:
    """Compare the suite's time with its bound.

    Args:
        report: File that `make test` wrote.
        is_same: Whether this machine equals the one of the committed figures.

    Returns:
        The comparison, or none if there is no file, and a remark for people.

    Raises:
        UserError: The file is broken.
    """
    if not report.is_file():
        return [], "suite time: not compared, because `make test` has left no duration here"
    try:
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
        seconds, tests, when = float(suite.attrib["time"]), suite.attrib["tests"], suite.attrib["timestamp"]
    except (ElementTree.ParseError, OSError, StopIteration, KeyError, ValueError) as error:
        raise UserError(
            f"{report} is not a report of pytest ({error}); remove it, or run `make test` again."
        ) from error
    limit = MAX_SECONDS if is_same else MAX_SECONDS_ELSEWHERE
    found = Comparison("suite.seconds", None, round(seconds, 1), f"at most {limit} s on two cores", seconds > limit)
    return [found], f"suite time: {seconds:.0f} s for {tests} tests, measured at {when[:19]}"
