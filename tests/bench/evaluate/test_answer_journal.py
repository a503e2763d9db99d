"""The journal of a model's answers: what it recalls, and what it does not trust."""

import pytest

from bench.evaluate.answer_journal import AnswerJournal

ANSWERS = {"a": [-0.1 - 1e-17, float("-inf")], "b": [[1, 2], []], "c": [0.30000000000000004, True]}


@pytest.fixture
def path(tmp_path):
    """A journal with an answer to each input of ANSWERS."""
    journal = AnswerJournal(tmp_path / "checkpoints" / "run.answers", "id")
    for inputs, answers in ANSWERS.items():
        assert journal.recall(inputs, lambda answers=answers: answers) == answers
    assert journal.recalled_seconds == 0
    return journal.path


def recalled(path, identity="id"):
    """Ask for each answer, and return the inputs of those that were not computed again."""
    journal, computed = AnswerJournal(path, identity), []

    def compute(inputs):
        computed.append(inputs)
        return ANSWERS[inputs]

    assert {inputs: journal.recall(inputs, lambda inputs=inputs: compute(inputs)) for inputs in ANSWERS} == ANSWERS
    assert (journal.recalled_seconds > 0) == (len(computed) < len(ANSWERS))
    return [inputs for inputs in ANSWERS if inputs not in computed]


def test_answers_are_recalled_exactly_and_only_for_the_same_inputs(path):
    before = path.read_bytes()
    assert recalled(path) == ["a", "b", "c"]
    assert path.read_bytes() == before
    assert AnswerJournal(path, "id").recall(["a"], lambda: "new") == "new"


def test_answers_of_another_identity_are_dropped(path):
    assert recalled(path, "other") == []
    assert recalled(path, "other") == ["a", "b", "c"]
    assert recalled(path, "id") == []


def test_a_line_that_was_cut_or_changed_is_computed_again(path):
    content = path.read_bytes()
    second = content.index(b"\n") + 1
    for cut in range(second, len(content), 7):
        path.write_bytes(content[:cut])
        assert recalled(path) == ["a", "b", "c"][: content[: cut + 1].count(b"\n")]
        assert recalled(path) == ["a", "b", "c"]  # the new lines begin where the cut one ends
    for place in range(0, second - 1, 5):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert recalled(path) == ["b", "c"]
