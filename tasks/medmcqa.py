"""MedMCQA: questions of Indian medical entrance exams with four choices (arXiv 2203.14371).

Its test labels are not published, so the paper tests on dev, of which it keeps 2,802 items "after cleaning". The rule
here keeps as many: of the 2,816 items that ask for a single choice, 14 have the same text as two of their choices.
"""

from __future__ import annotations

from tasks.base import DataRef, Question, Task


def question(record: dict) -> Question | None:
    """Reads the hub's form (`cop` is a letter) and the folder's (`cop` counts from 1)."""
    choices = tuple(record[name].strip() for name in ("opa", "opb", "opc", "opd"))
    if record["choice_type"] != "single" or len(set(choices)) < 4:
        return None
    right = record["cop"]
    return Question(record["question"].strip(), choices, "abcd".index(right) if isinstance(right, str) else right - 1)


MEDMCQA = Task(
    "medmcqa",
    "MedMCQA",
    question,
    DataRef("medmcqa", "openlifescienceai/medmcqa", hub_splits={"dev": "validation"}),
    {"train": "train", "test": "dev"},
)
