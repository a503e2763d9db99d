"""OpenBookQA: science questions with four choices (arXiv 1809.02789).

They need a fact and one step of reasoning.
"""

from __future__ import annotations

from tasks import arc
from tasks.base import DataRef, Question, Record, Task


def parse_record(record: Record) -> Question:
    """Parse a record of the hub or of a folder.

    In a record of the hub, the question is `question_stem`. The rest is as in ARC.
    """
    return arc.parse_record(record if "question" in record else {**record, "question": record["question_stem"]})


OPENBOOKQA = Task(
    "openbookqa",
    "OBQA",
    parse_record,
    DataRef("openbookqa", "allenai/openbookqa", "main"),
    {"train": "train", "validation": "validation", "test": "test"},
)
