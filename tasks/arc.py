"""AI2 ARC: grade-school science questions (arXiv 1803.05457).

They have three to five choices.
"""

from __future__ import annotations

from tasks.base import DataRef, Question, Record, Task
from tasks.fields import index, one_of, text, texts


def parse_record(record: Record) -> Question:
    """Parse a record of the hub or of a folder.

    On the hub each choice has a label ("A" or "1"), and the answer is a label. In a folder the choices are a list, and
    the answer is an index from 0.
    """
    question = text(record, "question", "question_stem")
    if isinstance(choices := record["choices"], dict):
        listed, labels = texts(choices, "text"), texts(choices, "label")
        if len(listed) != len(labels):
            raise ValueError(f"field 'choices' has {len(listed)} texts and {len(labels)} labels")
        return Question(question, listed, one_of(record, "answerKey", labels))
    return Question(question, texts(record, "choices"), index(record, "answer"))


_PUBLISHED = {"train": "train", "validation": "validation", "test": "test"}

ARC_CHALLENGE = Task(
    "arc_challenge", "ARC-C", parse_record, DataRef("arc_challenge", "allenai/ai2_arc", "ARC-Challenge"), _PUBLISHED
)
ARC_EASY = Task("arc_easy", "ARC-E", parse_record, DataRef("arc_easy", "allenai/ai2_arc", "ARC-Easy"), _PUBLISHED)
