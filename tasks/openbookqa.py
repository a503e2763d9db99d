"""OpenBookQA: science questions with four choices that ask for a fact and a step of reasoning (arXiv 1809.02789)."""

from __future__ import annotations

from tasks import arc
from tasks.base import DataRef, Question, Task


def question(record: dict) -> Question:
    """The hub calls the question `question_stem`; the rest is as in ARC."""
    return arc.question(record if "question" in record else {**record, "question": record["question_stem"]})


OPENBOOKQA = Task(
    "openbookqa",
    "OBQA",
    question,
    DataRef("openbookqa", "allenai/openbookqa", "main"),
    {"train": "train", "validation": "validation", "test": "test"},
)
