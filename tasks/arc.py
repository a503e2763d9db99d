"""AI2 ARC: grade-school science questions (arXiv 1803.05457).

They have three to five choices.
"""

from __future__ import annotations

from tasks.base import DataRef, Question, Record, Task


def parse_record(record: Record) -> Question:
    """Parse a record of the hub or of a folder.

    On the hub each choice has a label ("A" or "1"), and the answer is a label. In a folder the choices are a list, and
    the answer is an index from 0.
    """
    choices = record["choices"]
    if isinstance(choices, dict):
        return Question(record["question"], tuple(choices["text"]), choices["label"].index(record["answerKey"]))
    return Question(record["question"], tuple(choices), record["answer"])


_PUBLISHED = {"train": "train", "validation": "validation", "test": "test"}

ARC_CHALLENGE = Task(
    "arc_challenge", "ARC-C", parse_record, DataRef("arc_challenge", "allenai/ai2_arc", "ARC-Challenge"), _PUBLISHED
)
ARC_EASY = Task("arc_easy", "ARC-E", parse_record, DataRef("arc_easy", "allenai/ai2_arc", "ARC-Easy"), _PUBLISHED)
