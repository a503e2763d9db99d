"""Grades of written answers against figures worked out by hand."""

import pytest

from bench.evaluate.grade import grader, last_number
from tasks.metrics import LAST_NUMBER, PASS, ROUGE_L


@pytest.mark.parametrize("text, number", [
    ("So 4 + 5 = 9.", "9"), ("#### 1,234", "1234"), ("it costs $1,000.50!", "1000.5"), ("3 apples, -7 pears", "-7"),
    ("The answer is: 18\n", "18"),
])  # fmt: skip
def test_the_last_number_counts_however_it_is_written(text, number):
    grade = grader(LAST_NUMBER)
    assert grade([text, text, "none"], [[number], [number + "1"], [number]]) == [1, 0, 0]
    assert last_number("no number") is None


def test_rouge_l_is_the_best_over_references():
    # Of "the cat sat" and "the cat on the mat": the longest common subsequence has 2 words, so P = 2/3 and R = 2/5.
    f = 2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5)
    assert grader(ROUGE_L)(["The cat sat."], [["the cat on the mat"]]) == [pytest.approx(f)]
    assert grader(ROUGE_L)(["the cat sat", "the cat sat"], [["a dog", "the cat sat"], ["a dog"]]) == [1, 0]


def test_a_program_passes_with_the_beginning_that_it_was_given():
    begin, tests = "def double(n):\n", "assert double(3) == 6\n"
    answers = ["    return 2 * n", "    return n", "    return 2 *", "    raise SystemExit"]
    assert grader(PASS, unsafe_code=True)(answers, [(begin, tests)] * 4) == [1, 0, 0, 0]
