"""Grade generated answers from 0 to 1, by the metric of their task."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial

from rouge_score.rouge_scorer import RougeScorer

from bench.sandbox.execute import run_programs
from tasks.metrics import LAST_NUMBER, PASS, ROUGE_L

References = Sequence[str]
Grader = Callable[[list[str], list[References]], list[float]]
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, or None.

    "1,000" and "1000.0" are the same number.
    """
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def grade_numbers(answers: list[str], references: list[References]) -> list[float]:
    """Return 1 for answers whose last number is that of their first reference, else 0."""
    return [int(last_number(a) == last_number(r[0]) is not None) for a, r in zip(answers, references, strict=True)]


def grade_rouge(answers: list[str], references: list[References]) -> list[float]:
    """Compute the F1 score of ROUGE-L against the best reference.

    The score is from the package rouge-score, without stemming.
    """
    scorer = RougeScorer(["rougeL"])
    return [scorer.score_multi(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)]


def grade_programs(answers: list[str], references: list[References], *, unsafe: bool) -> list[float]:
    """Return 1 for programs that pass their tests, else 0.

    Args:
        answers: Generated rest of each program.
        references: The given beginning of each program and its tests.
        unsafe: Run programs without a sandbox.
    """
    programs = [(begin + a, tests) for a, (begin, tests) in zip(answers, references, strict=True)]
    return [int(outcome.passed) for outcome in run_programs(programs, unsafe=unsafe)]


def grader(metric: str, unsafe_code: bool = False) -> Grader:
    """Return the function that grades all answers of a task at once.

    Args:
        metric: LAST_NUMBER, ROUGE_L or PASS.
        unsafe_code: Run programs without a sandbox.
    """
    graders: dict[str, Grader] = {
        LAST_NUMBER: grade_numbers,
        ROUGE_L: grade_rouge,
        PASS: partial(grade_programs, unsafe=unsafe_code),
    }
    return graders[metric]
