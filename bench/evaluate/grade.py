"""What a written answer is worth, from 0 to 1, by the metric of its task. All answers of a task come at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial

from rouge_score.rouge_scorer import RougeScorer

from bench.sandbox.execute import run_programs
from tasks.metrics import LAST_NUMBER, PASS, ROUGE_L

References = Sequence[str]
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> Decimal | None:
    """The last number in a text, however it is written: 1,000 and 1000.0 are the same. None if there is none."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def grade_numbers(answers: list[str], references: list[References]) -> list[float]:
    return [int(last_number(a) == last_number(r[0]) is not None) for a, r in zip(answers, references, strict=True)]


def grade_rouge(answers: list[str], references: list[References]) -> list[float]:
    """ROUGE-L's F against the reference that it is best for, by the package of Google Research, without stemming."""
    scorer = RougeScorer(["rougeL"])
    return [scorer.score_multi(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)]


def grade_programs(answers: list[str], references: list[References], *, unsafe: bool) -> list[float]:
    """1 if the beginning that was given and what was written after it pass the tests, each in a sandbox of its own."""
    programs = [(begin + a, tests) for a, (begin, tests) in zip(answers, references, strict=True)]
    return [int(outcome.passed) for outcome in run_programs(programs, unsafe=unsafe)]


def grader(metric: str, unsafe_code: bool = False) -> Callable[[list[str], list[References]], list[float]]:
    graders = {LAST_NUMBER: grade_numbers, ROUGE_L: grade_rouge, PASS: partial(grade_programs, unsafe=unsafe_code)}
    return graders[metric]
