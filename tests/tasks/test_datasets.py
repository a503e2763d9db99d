"""Records as the data sets' publishers write them, on the hub and in a folder."""

import pytest

from tasks import TASKS, Question
from tasks.medqa import AFRIMEDQA
from tests import inter_folder
from tests.tasks.conftest import ARC

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
