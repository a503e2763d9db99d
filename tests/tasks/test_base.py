"""Prompt formats on single items."""

from tasks import FORMATS, TASKS
from tasks.base import Exercise, written
from tests.tasks.conftest import BOOLQ, PIQA


def test_letters_and_cloze():
    question = TASKS["boolq"].parse_record(BOOLQ)
    shown = FORMATS["letters"]("boolq", question)
    assert shown.prompt == "Passage: Ice -- Ice is cold.\nQuestion: is ice cold?\nA. yes\nB. no\nAnswer:"
    assert (shown.choices, shown.label) == ((" A", " B"), " A")
    hidden = FORMATS["cloze"]("piqa", TASKS["piqa"].parse_record(PIQA))
    assert hidden.prompt == "Question: make tea\nAnswer:"
    assert hidden.choices == (" boil water", " boil tea") and hidden.label == " boil water"


def test_exercises_have_the_template_of_questions_without_choices():
    example = written("x", Exercise("Why?", "So.", context="It is."))
    assert (example.prompt, example.label) == ("Passage: It is.\nQuestion: Why?\nAnswer:", " So.")
