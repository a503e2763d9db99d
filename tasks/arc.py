"""AI2 ARC: grade-school science questions with three to five choices (arXiv 1803.05457)."""

from __future__ import annotations

from tasks.base import DataRef, Question, Task


def question(record: dict) -> Question:
    """Reads the hub's form (choices with labels, "A" or "1") and the folder's (plain choices, 0-based answer)."""
    choices = record["choices"]
    if isinstance(choices, dict):
        return Question(record["question"], tuple(choices["text"]), choices["label"].index(record["answerKey"]))
    return Question(record["question"], tuple(choices), record["answer"])


_published = {"train": "train", "validation": "validation", "test": "test"}

ARC_CHALLENGE = Task(
    "arc_challenge", "ARC-C", question, DataRef("arc_challenge", "allenai/ai2_arc", "ARC-Challenge"), _published
)
ARC_EASY = Task("arc_easy", "ARC-E", question, DataRef("arc_easy", "allenai/ai2_arc", "ARC-Easy"), _published)
