"""PIQA: the better of two ways to an everyday goal (arXiv 1911.11641).

Its test labels are not published.
"""

from __future__ import annotations

from tasks.base import DataRef, Question, Record, Task
from tasks.fields import index, text


def parse_record(record: Record) -> Question:
    """Parse a record of the hub or of a folder. In the hub the label is the name of a class, "0" or "1"."""
    label = index(record, "label", names=("0", "1"))
    return Question(text(record, "goal"), (text(record, "sol1"), text(record, "sol2")), label)


PIQA = Task("piqa", "PIQA", parse_record, DataRef("piqa", "baber/piqa"), {"train": "train", "test": "validation"})
