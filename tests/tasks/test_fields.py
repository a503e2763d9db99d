"""Typed reading of fields: JSON's null, true, numbers and texts are never taken for one another."""

import pytest

from tasks import fields
from tasks.base import Exercise, Question

NAN = float("nan")


@pytest.mark.parametrize("value, expected", [(0, 0), (1, 1), (1.0, 1), ("no", 0), ("yes", 1)])
def test_an_index_is_a_whole_number_or_a_name(value, expected):
    assert fields.index({"label": value}, "label", names=("no", "yes")) == expected


@pytest.mark.parametrize("value, shown", [
    (None, "null"), (True, "true"), (False, "false"), (0.5, "0.5"), (NAN, "nan"), (float("inf"), "inf"), (-1, "-1"),
    ("1", "'1'"), ("", "''"), ([1], r"\[1\]"), ({"a": 1}, "{'a': 1}"),
])  # fmt: skip
def test_other_values_are_no_index(value, shown):
    with pytest.raises(ValueError, match=f"field 'label' is {shown}, not a whole number from 0"):
        fields.index({"label": value}, "label")


def test_an_index_may_count_from_one():
    assert fields.index({"cop": 4}, "cop", first=1) == 3
    with pytest.raises(ValueError, match="field 'cop' is 0, not a whole number from 1"):
        fields.index({"cop": 0}, "cop", first=1)


@pytest.mark.parametrize("value", [None, True, 7, 7.5, ["a"], {"a": "b"}, "half \ud83d"])
def test_other_values_are_no_text(value):
    for read in (fields.text, fields.one_of):
        with pytest.raises(ValueError, match="field 'goal' "):
            read({"goal": value}, "goal", *([["a"]] if read is fields.one_of else []))
    with pytest.raises(ValueError, match="choice"):
        fields.texts({"choices": ["a", value]}, "choices")
    with pytest.raises(ValueError):
        Question("q", ("a", value), 0)
    with pytest.raises(ValueError):
        Exercise("q", value)
    with pytest.raises(ValueError):
        Exercise("q", "a", references=(value,))


def test_a_text_has_the_name_of_one_edition():
    assert fields.text({"ref": "x"}, "human_reference", "ref") == "x"
    with pytest.raises(ValueError, match="field 'mr' is missing; there are ref, id"):
        fields.text({"ref": "x", "id": 1}, "mr", "meaning_representation")


@pytest.mark.parametrize("value", [1, 0, "true", None, 1.0])
def test_truth_is_true_or_false(value):
    assert fields.truth({"answer": True}, "answer") is True
    with pytest.raises(ValueError, match="not true or false"):
        fields.truth({"answer": value}, "answer")


def test_optional_texts_may_be_null_but_no_number():
    assert fields.optional_text({"input": None}, "input") == fields.optional_text({}, "input") == ""
    with pytest.raises(ValueError, match="field 'input' is 3"):
        fields.optional_text({"input": 3}, "input")


@pytest.mark.parametrize("arguments", [
    ("", ("a", "b"), 0), (" \n", ("a", "b"), 0), ("q", ("a", " "), 0), ("q", ("a",), 0), ("q", ("a", "b"), True),
    ("q", ("a", "b"), 1.0), ("q", ("a", "b"), 2), ("q", ("a", "b"), -1), ("q", ("a", "b"), None),
])  # fmt: skip
def test_questions_that_have_no_correct_answer_cannot_be_made(arguments):
    with pytest.raises(ValueError):
        Question(*arguments)
