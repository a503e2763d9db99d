"""Share of programs that pass their tests, each run once in a sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
Share of the programs that pass their tests (pass@1 of one sample per problem, as HumanEval is scored). This metric runs
the programs: it calls the sandbox of this repository, `bench.sandbox`. A program gets an interpreter of its own in a
bubblewrap sandbox without network, without files of the host, and with limits of time and memory. The metric therefore
needs Linux, the program `bwrap`, and a checkout of this repository on Python's path.
"""
_INPUTS = """
Args:
    predictions: The programs, in Python.
    references: Per program its tests, in Python. They run in the same module and fail by an exception.
    seconds: Time limit per program. Default 10.
    unsafe: True runs the programs without a sandbox, with all rights of this process. Default False.

Returns:
    pass_at_1: Share of the programs that pass, from 0 to 1.
    outcomes: Per program 1 if it passes, else 0.

Examples:
    >>> metric = evaluate.load("bench/evaluate/metrics/pass_at_1")
    >>> metric.compute(predictions=["def double(n): return 2 * n"], references=["assert double(3) == 6"])
    {'pass_at_1': 1.0, 'outcomes': [1]}
"""
_CITATION = """
@article{chen2021evaluating,
  title = {Evaluating Large Language Models Trained on Code},
  author = {Chen, Mark and Tworek, Jerry and Jun, Heewoo and Yuan, Qiming and others},
  journal = {arXiv preprint arXiv:2107.03374},
  year = {2021}
}
"""
SECONDS = 10.0


def grade(
    programs: Sequence[str], tests: Sequence[str], *, seconds: float = SECONDS, unsafe: bool = False
) -> list[int]:
    """Return 1 for each program that passes its tests, else 0.

    Args:
        programs: Python sources.
        tests: Per program the source of its tests.
        seconds: Time limit per program.
        unsafe: Run without a sandbox.

    Raises:
        UserError: Bubblewrap is missing or cannot make a sandbox on this machine.
    """
    from bench.sandbox.execute import run_programs  # only a program that is run needs the repository

    return [int(o.passed) for o in run_programs(zip(programs, tests, strict=True), seconds=seconds, unsafe=unsafe)]


class PassAt1(evaluate.Metric):  # type: ignore[misc, unused-ignore]  # evaluate has no types
    """The metric for `evaluate.load`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self, predictions: list[str], references: list[str], seconds: float = SECONDS, unsafe: bool = False
    ) -> dict[str, Any]:
        outcomes = grade(predictions, references, seconds=seconds, unsafe=unsafe)
        return {"pass_at_1": sum(outcomes) / len(outcomes), "outcomes": outcomes}
