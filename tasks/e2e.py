"""E2E NLG: a restaurant's attributes to be said in words, each test item with several references (arXiv 1706.09254)."""

from __future__ import annotations

from tasks.base import ROUGE_L, DataRef, Exercise, Task, Writing


def question(record: dict) -> Exercise:
    """Reads the hub's field names and the folder's."""
    meaning = record["mr"] if "mr" in record else record["meaning_representation"]
    reference = (record["ref"] if "ref" in record else record["human_reference"]).strip()
    return Exercise(f"Describe in words: {meaning.strip()}", reference, (reference,))


E2E = Task(
    "e2e",
    "E2E",
    question,
    DataRef("e2e_nlg", "tuetschek/e2e_nlg"),
    {"train": "train", "test": "test"},
    Writing(ROUGE_L, max_new_tokens=80, stop=("\n",)),  # the longest reference has 80 SmolLM2 tokens, none a line's end
)
