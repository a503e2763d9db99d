"""BoolQ: yes-or-no questions about a passage (arXiv 1905.10044).

Its test labels are not published.
"""

from __future__ import annotations

from tasks.base import DataRef, Question, Record, Task
from tasks.fields import require_filled, text, truth


def parse_record(record: Record) -> Question:
    """Parse a record of the hub or of a folder."""
    question = require_filled("the question", text(record, "question").strip().rstrip("?")) + "?"
    passage = require_filled("the passage", text(record, "passage"))
    return Question(question, ("yes", "no"), 0 if truth(record, "answer") else 1, context=passage)


BOOLQ = Task(
    "boolq",
    "BoolQ",
    parse_record,
    DataRef("boolq", "google/boolq"),
    {"train": "train", "test": "validation"},
    has_classes=True,
)
