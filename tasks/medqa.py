"""Medical multiple choice for training: MedQA dev and test, and AfriMed-QA.

MedQA is arXiv 2009.13081, AfriMed-QA is arXiv 2411.15640.
"""

from __future__ import annotations

from tasks.base import DataRef, Question, Record, Task


def parse_record(record: Record) -> Question | None:
    """Parse a record, if its answer is among its options.

    The three records of AfriMed-QA whose answer is not among their options are dropped. The options are a list of
    "A. text", or texts by letter. The answer is a letter or a text.
    """
    options = record["options"]
    if isinstance(options, list):
        options = {letter: text for letter, _, text in (option.partition(". ") for option in options)}
    answer = options.get(record["answer"], record["answer"])
    choices = tuple(options.values())
    return Question(record["question"].strip(), choices, choices.index(answer)) if answer in choices else None


AFRIMEDQA = Task("afrimedqa", "AfriMed-QA", parse_record, DataRef("afrimedqa", hub=""), {"train": "mcq"})
MEDQA_DEV = Task("medqa_dev", "MedQA, dev", parse_record, DataRef("medqa_us", hub=""), {"train": "dev"})
MEDQA_TEST = Task("medqa_test", "MedQA, test", parse_record, DataRef("medqa_us", hub=""), {"train": "test"})
