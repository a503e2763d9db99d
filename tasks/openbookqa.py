"""OpenBookQA: science questions with four choices (arXiv 1809.02789).

They need a fact and one step of reasoning.
"""

from __future__ import annotations

from tasks import arc
from tasks.base import DataRef, Task

OPENBOOKQA = Task(
    "openbookqa",
    "OBQA",
    arc.parse_record,  # the question of a record of the hub is `question_stem`; the rest is as in ARC
    DataRef("openbookqa", "allenai/openbookqa", "main"),
    {"train": "train", "validation": "validation", "test": "test"},
    may_repeat_choices=True,  # three training items have two equal wrong choices
)
