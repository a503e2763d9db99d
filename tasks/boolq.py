"""BoolQ: yes or no, after a passage (arXiv 1905.10044). Its test labels are not published."""

from __future__ import annotations

from tasks.base import DataRef, Question, Task


def question(record: dict) -> Question:
    text = record["question"].strip().rstrip("?") + "?"
    return Question(text, ("yes", "no"), [True, False].index(record["answer"]), context=record["passage"])


BOOLQ = Task("boolq", "BoolQ", question, DataRef("boolq", "google/boolq"), {"train": "train", "test": "validation"})
