"""MedMCQA: questions of Indian medical entrance exams (arXiv 2203.14371).

MedMCQA has four choices per question. Its test labels are not published, so the paper tests on dev and keeps 2,802 of
its items "after cleaning". Our rule keeps the same number: of the 2,816 single-choice items, 14 have two equal choices.
"""

from __future__ import annotations

from tasks.base import DataRef, Question, Record, Task
from tasks.fields import index, text


def parse_record(record: Record) -> Question | None:
    """Parse a record of the hub or of a folder.

    In the hub `cop` is a letter, in a folder it counts from 1. Records with several correct choices, and with equal
    or empty choices, are dropped.
    """
    choices = tuple(text(record, name).strip() for name in ("opa", "opb", "opc", "opd"))
    if text(record, "choice_type") != "single" or len(set(choices)) < 4 or not all(choices):
        return None
    return Question(text(record, "question").strip(), choices, index(record, "cop", names="abcd", first=1))


MEDMCQA = Task(
    "medmcqa",
    "MedMCQA",
    parse_record,
    DataRef("medmcqa", "openlifescienceai/medmcqa", hub_splits={"dev": "validation"}),
    {"train": "train", "test": "dev"},
)
