"""Medical multiple choice for training: MedQA dev and test, and AfriMed-QA.

MedQA is arXiv 2009.13081, AfriMed-QA is arXiv 2411.15640.
"""

from __future__ import annotations

from tasks.base import DataRef, Question, Record, Task
from tasks.fields import require_filled, text, texts


def parse_record(record: Record) -> Question | None:
    """Parse a record, if its answer is among its options.

    The three records of AfriMed-QA that have no options are dropped. The options are a list of
    "A. text", or texts by letter. The answer is a letter or a text.
    """
    if isinstance(options := record["options"], dict):
        choices = {letter: text(options, letter) for letter in options}
    else:
        listed = [option.partition(". ") for option in texts(record, "options")]
        choices = {letter: choice for letter, _, choice in listed}
        if len(choices) < len(listed):
            raise ValueError("field 'options' has two options with the same letter")
    for letter, choice in choices.items():
        require_filled(f"option {letter}", choice)
    answer = choices.get(text(record, "answer"), text(record, "answer"))
    if answer not in choices.values():
        return None
    return Question(text(record, "question").strip(), tuple(choices.values()), [*choices.values()].index(answer))


AFRIMEDQA = Task(
    "afrimedqa",
    "AfriMed-QA",
    parse_record,
    DataRef("afrimedqa", hub=""),
    {"train": "mcq"},
    may_repeat_choices=True,  # 60 of its items have two equal choices
)
MEDQA_DEV = Task("medqa_dev", "MedQA, dev", parse_record, DataRef("medqa_us", hub=""), {"train": "dev"})
MEDQA_TEST = Task("medqa_test", "MedQA, test", parse_record, DataRef("medqa_us", hub=""), {"train": "test"})
