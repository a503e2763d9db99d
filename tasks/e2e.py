"""E2E NLG: restaurant attributes to put into words (arXiv 1706.09254).

Each test item has several references.
"""

from __future__ import annotations

from tasks.base import DataRef, Exercise, Record, Task, Writing
from tasks.fields import require_filled, text
from tasks.metrics import ROUGE_L


def parse_record(record: Record) -> Exercise:
    """Parse a record of the hub or of a folder, whose field names differ."""
    meaning = require_filled("the meaning", text(record, "mr", "meaning_representation"))
    reference = text(record, "ref", "human_reference").strip()
    return Exercise(f"Describe in words: {meaning.strip()}", reference, (reference,))


E2E = Task(
    "e2e",
    "E2E",
    parse_record,
    DataRef("e2e_nlg", "tuetschek/e2e_nlg"),
    {"train": "train", "test": "test"},
    # The longest reference has 80 SmolLM2 tokens, and no reference has a line break.
    Writing(ROUGE_L, max_new_tokens=80, stop=("\n",)),
)
