"""BoolQ: yes-or-no questions about a passage (arXiv 1905.10044).

Its test labels are not published.
"""

from __future__ import annotations

from tasks.base import DataRef, Question, Record, Task


def parse_record(record: Record) -> Question:
    """Parse a record of the hub or of a folder."""
    text = record["question"].strip().rstrip("?") + "?"
    return Question(text, ("yes", "no"), [True, False].index(record["answer"]), context=record["passage"])


BOOLQ = Task("boolq", "BoolQ", parse_record, DataRef("boolq", "google/boolq"), {"train": "train", "test": "validation"})
