"""PIQA: which of two ways reaches an everyday goal (arXiv 1911.11641). Its test labels are not published."""

from __future__ import annotations

from tasks.base import DataRef, Question, Task


def question(record: dict) -> Question:
    return Question(record["goal"], (record["sol1"], record["sol2"]), int(record["label"]))


PIQA = Task("piqa", "PIQA", question, DataRef("piqa", "baber/piqa"), {"train": "train", "test": "validation"})
