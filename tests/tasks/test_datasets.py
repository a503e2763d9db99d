"""Records as the data sets' publishers write them, on the hub and in a folder."""

from typing import Any

import pytest

from tasks import TASKS, Question, Task
from tasks.domains import OPEN, PAPER
from tasks.medqa import AFRIMEDQA
from tests import inter_folder
from tests.tasks.conftest import ARC, BOOLQ, PIQA

HUB_CHOICES = {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]}
ARC_HUB = {"question": "Which is hot?", "choices": HUB_CHOICES, "answerKey": "2"}
OBQA_HUB = {"question_stem": "Which is hot?", "choices": ARC_HUB["choices"], "answerKey": "2"}


@pytest.mark.parametrize("task, record", [
    ("arc_challenge", ARC), ("arc_easy", ARC_HUB), ("openbookqa", OBQA_HUB), ("openbookqa", ARC),
])  # fmt: skip
def test_records_of_the_hub_and_of_a_folder_are_parsed_alike(task, record):
    assert TASKS[task].parse_record(record) == Question("Which is hot?", ("ice", "fire", "snow"), 1)


def test_inter_domain_records_of_the_hub_and_of_a_folder_are_parsed_alike():
    parse = {name: TASKS[name].parse_record for name in ("medmcqa", "phrasebank", "e2e")}
    item = parse["medmcqa"](inter_folder.MEDMCQA)
    assert item == parse["medmcqa"]({**inter_folder.MEDMCQA, "cop": "b"}) and item.choices[item.answer] == "fire"
    hub = {"meaning_representation": inter_folder.E2E["mr"], "human_reference": inter_folder.E2E["ref"]}
    assert parse["e2e"](inter_folder.E2E) == parse["e2e"](hub)


def test_medqa_options_are_a_list_or_by_letter():
    listed, lettered = ({"question": "Hot?", "options": options, "answer": answer} for options, answer in (
        (["A. ice", "B. fire"], "fire"), (inter_folder.OPTIONS, "B")))  # fmt: skip
    expected = Question("Hot?", ("ice", "fire"), 1)
    assert AFRIMEDQA.parse_record(listed) == AFRIMEDQA.parse_record(lettered) == expected
    assert AFRIMEDQA.parse_record({**lettered, "answer": "E"}) is None


def test_medmcqa_drops_records_without_exactly_one_correct_choice():
    parse = TASKS["medmcqa"].parse_record
    assert parse({**inter_folder.MEDMCQA, "choice_type": "multi"}) is None
    assert parse({**inter_folder.MEDMCQA, "opd": "ice "}) is None


# A record of every data set, with the fields that it must have.
RECORDS: dict[str, dict[str, Any]] = {
    "piqa": PIQA,
    "boolq": BOOLQ,
    "arc_easy": {name: ARC[name] for name in ("question", "choices", "answer")},
    "arc_challenge": ARC_HUB,
    "openbookqa": OBQA_HUB,
    "medmcqa": inter_folder.MEDMCQA,
    "medqa_dev": {"question": "Hot?", "options": ["A. ice", "B. fire"], "answer": "fire"},
    "afrimedqa": {"question": "Hot?", "options": inter_folder.OPTIONS, "answer": "B"},
    "phrasebank": {"sentence": "Sales rose .", "label": "positive"},
    "gsm8k": inter_folder.GSM8K,
    "e2e": inter_folder.E2E,
    "humaneval": {name: text for name, text in inter_folder.HUMANEVAL.items() if name != "task_id"},
    "mbpp": {"text": "Write it.", "code": "pass"},
    "alpaca_cleaned": {"instruction": "Say it.", "output": "it"},
    "financial_qa_10k": {"question": "Gain?", "answer": "1", "context": "We gained 1."},
}
PARSERS = {task.name: task.parse_record for domain in (*PAPER, *OPEN) for task in domain.training_sets}
PARSERS |= {name: task.parse_record for name, task in TASKS.items() if isinstance(task, Task)}
OTHER_TYPES: tuple[object, ...] = (None, 3.5, -1, 12, ["x", None], [], {"x": 1}, {}, "half \ud83d", float("nan"))


@pytest.mark.parametrize("task, field", [(task, field) for task, record in RECORDS.items() for field in record])
def test_a_field_that_is_missing_or_of_another_type_is_refused(task, field):
    parse, record = PARSERS[task], RECORDS[task]
    assert parse(record)
    for value in OTHER_TYPES:
        if field == "options" and value in ([], {}):  # as three records of AfriMed-QA have them
            assert parse({**record, field: value}) is None
            continue
        with pytest.raises((ValueError, KeyError)):
            assert not parse({**record, field: value})
    with pytest.raises((ValueError, KeyError)):
        assert not parse({name: value for name, value in record.items() if name != field})


@pytest.mark.parametrize("task, field", [(task, field) for task, record in RECORDS.items() for field in record])
def test_an_empty_text_is_refused_or_drops_the_record(task, field):
    drops = task in ("medmcqa", "medqa_dev", "afrimedqa") or PARSERS[task].__module__ == "tasks.instructions"
    try:
        item = PARSERS[task]({**RECORDS[task], field: ""})
    except ValueError:
        return
    assert drops and (item is None or item.context == "")


@pytest.mark.parametrize("task, field, values", [
    ("piqa", "label", (True, "2", "", 2)), ("boolq", "answer", (1, 0, "true")), ("arc_easy", "answer", (True, "1", 3)),
    ("arc_challenge", "answerKey", ("B", "0", "4", 2, True)), ("phrasebank", "label", ("Positive", "unknown", 0, True)),
    ("medmcqa", "cop", (0, 5, True, "e", "1")), ("medmcqa", "choice_type", (True,)),
    ("gsm8k", "answer", ("so 5", "so 5 ####", "#### five", "#### 5 or 6", "#### \u0663")),
    ("humaneval", "entry_point", ("f; import os", "2")), ("medqa_dev", "options", (["A. x", "A. y"], ["x", "y"])),
    ("arc_challenge", "choices", ({"text": ["a", "b"], "label": ["2"]}, {"text": ["a"], "label": ["2"]})),
])  # fmt: skip
def test_a_label_that_no_publisher_writes_is_refused(task, field, values):
    for value in values:
        with pytest.raises((ValueError, KeyError)):
            assert not PARSERS[task]({**RECORDS[task], field: value}), value


def test_labels_may_be_floats_or_names_of_classes():
    piqa = [PARSERS["piqa"]({**PIQA, "label": label}).answer for label in (1, 1.0, "1")]
    arc = PARSERS["arc_easy"]({**ARC, "answer": 1.0})
    medmcqa = [PARSERS["medmcqa"]({**inter_folder.MEDMCQA, "cop": cop}).answer for cop in (2, 2.0, "b")]
    assert piqa == [1, 1, 1] and (arc.answer, type(arc.answer)) == (1, int) and medmcqa == [1, 1, 1]
