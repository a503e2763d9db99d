"""Medical multiple choice to train on: MedQA's dev and test (arXiv 2009.13081) and AfriMed-QA (arXiv 2411.15640)."""

from __future__ import annotations

from tasks.base import DataRef, Question, Task


def question(record: dict) -> Question | None:
    """Options are a list of "A. text" or texts by letter; the answer is a letter or a text.

    Three records of AfriMed-QA, whose answer is not among their options, are left out.
    """
    options = record["options"]
    if isinstance(options, list):
        options = {letter: text for letter, _, text in (option.partition(". ") for option in options)}
    answer = options.get(record["answer"], record["answer"])
    choices = tuple(options.values())
    return Question(record["question"].strip(), choices, choices.index(answer)) if answer in choices else None


AFRIMEDQA = Task("afrimedqa", "AfriMed-QA", question, DataRef("afrimedqa", hub=""), {"train": "mcq"})
MEDQA_DEV = Task("medqa_dev", "MedQA, dev", question, DataRef("medqa_us", hub=""), {"train": "dev"})
MEDQA_TEST = Task("medqa_test", "MedQA, test", question, DataRef("medqa_us", hub=""), {"train": "test"})
