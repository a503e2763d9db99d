"""OpenBookQA: science questions with four choices that need a fact and one step of reasoning (arXiv 1809.02789)."""

from __future__ import annotations

from tasks import arc
from tasks.base import DataRef, Question, Record, Task


def parse_record(record: Record) -> Question:
    """Parse a record of the hub, where the question is `question_stem`, or of a folder. The rest is as in ARC."""
    return arc.parse_record(record if "question" in record else {**record, "question": record["question_stem"]})


OPENBOOKQA = Task(
    "openbookqa",
    "OBQA",
    parse_record,
    DataRef("openbookqa", "allenai/openbookqa", "main"),
    {"train": "train", "validation": "validation", "test": "test"},
)
