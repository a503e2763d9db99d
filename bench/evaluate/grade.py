"""Grade generated answers from 0 to 1, by the metric of their task.

The metrics are modules of `bench.evaluate.metrics`. The references of an answer are described in `tasks.metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from bench.evaluate.metrics.last_number import last_number as numbers
from bench.evaluate.metrics.last_number.last_number import last_number
from bench.evaluate.metrics.pass_at_1 import pass_at_1
from bench.evaluate.metrics.rouge_l import rouge_l
from tasks.metrics import LAST_NUMBER, PASS, ROUGE_L

__all__ = ["grade_numbers", "grade_programs", "grade_rouge", "grader", "last_number"]

References = Sequence[str]
Grader = Callable[[list[str], list[References]], Sequence[float]]


def grade_numbers(answers: list[str], references: list[References]) -> list[int]:
    """Return 1 for answers whose last number is that of their first reference, else 0."""
    return numbers.grade(answers, [first for first, *_ in references])


def grade_rouge(answers: list[str], references: list[References]) -> list[float]:
    """Return the F1 score of ROUGE-L against the best reference."""
    return rouge_l.grade(answers, references)


def grade_programs(answers: list[str], references: list[References], *, unsafe: bool) -> list[int]:
    """Return 1 for programs that pass their tests, else 0.

    Args:
        answers: Generated rest of each program.
        references: The given beginning of each program and its tests.
        unsafe: Run programs without a sandbox.
    """
    programs = [begin + answer for answer, (begin, _) in zip(answers, references, strict=True)]
    return pass_at_1.grade(programs, [tests for _, tests in references], unsafe=unsafe)


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
