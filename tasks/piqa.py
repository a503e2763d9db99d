"""PIQA: the better of two ways to an everyday goal (arXiv 1911.11641).

Its test labels are not published.
"""

from __future__ import annotations

from tasks.base import DataRef, Question, Record, Task


def parse_record(record: Record) -> Question:
    """Parse a record of the hub or of a folder."""
    return Question(record["goal"], (record["sol1"], record["sol2"]), int(record["label"]))


PIQA = Task("piqa", "PIQA", parse_record, DataRef("piqa", "baber/piqa"), {"train": "train", "test": "validation"})
