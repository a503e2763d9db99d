"""The metrics by themselves and through `evaluate.load`, against values computed by hand or by other packages."""

from fractions import Fraction
from pathlib import Path

import evaluate
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import recall_score

from bench.evaluate import metrics
from bench.evaluate.metrics.last_number.last_number import grade, last_number
from bench.evaluate.metrics.rouge_l import rouge_l
from tests import processes

FOLDER = Path(metrics.__file__).parent
NAMES = ("last_number", "rouge_l", "pass_at_1", "balanced_accuracy")


@pytest.fixture
def load(tmp_path):
    """Load a metric by its path, as anybody would."""
    return lambda name: evaluate.load(str(FOLDER / name), cache_dir=str(tmp_path))


@pytest.mark.parametrize("text, value", [
    # The forms of GSM8K's references and of plain answers.
    ("#### 70,000", 70000), ("The answer is 1,234,567.", 1234567), ("so she pays $29.00.", 29), ("18.0000", 18),
    ("Total: 72 clips, altogether.", 72), ("3,", 3), ("Answer: 18.", 18), ("It costs 20 USD.\n", 20), ("is 5%", 5),
    ("x = 2^3 = 8", 8), ("They need 4 cars for 18 people", 18), ("is １８", 18), ("18. ²", 18),
    # Signs: a minus in any spelling, but no hyphen, dash or subtraction.
    ("He owes -5 dollars", -5), ("It falls to \u22125 degrees", -5), ("It is \u20135", -5), ("It is \u20115", -5),
    ("It is +7", 7), ("12 - 7 = 5", 5), ("10-3", 3), ("between 3-5", 5), ("between 3\u20135", 5), ("10\u22123", 3),
    ("part A-5", 5), ("(-5)", -5), ("(2)-5", 5), ("x=-5", -5), ("lost -$5.50", Fraction(-11, 2)), ("$-5", -5),
    # Decimals and powers of ten.
    ("The answer is .5", Fraction(1, 2)), ("-.5", Fraction(-1, 2)), ("costs $.50", Fraction(1, 2)), ("so...5", 5),
    ("the answer is.5", 5), ("version 1.2.3", 3), ("1.5e3", 1500), ("2E-2", Fraction(1, 50)), ("1e+3.", 1000),
    # Groups of digits.
    (r"\boxed{1{,}000}", 1000), (r"1\,000", 1000), (r"1,\!000", 1000), ("1 000 000", 1000000), ("is $80 000.", 80000),
    ("1\u00a0000\u00a0000", 1000000), ("1\u202f000", 1000), ("1\u2009000", 1000),
    ("1'000'000.5", Fraction(2000001, 2)),
    ("12,34,567", 1234567), ("1,2,3", 3), ("1,2345", 2345), ("of 12 200-page books", 200), ("5 6 7", 7),
    ("0 200", 200), ("in 2019 100 people", 100), ("98 99 100 101", 101),
    ("100 000.50", Fraction(200001, 2)),
    # Fractions.
    ("She has 3/4 left", Fraction(3, 4)), ("is -3/4", Fraction(-3, 4)), (r"\frac{3}{4}", Fraction(3, 4)),
    ("2 1/2 hours", Fraction(5, 2)), ("½", Fraction(1, 2)), ("2½", Fraction(5, 2)), ("12/25/2024", 2024), ("5/0", 0),
    ("10 / 4", 4), ("10/5 = 2", 2), ("It's 9:30", 30),
    # No number.
    ("no number here", None), ("", None), ("x² and ₂", None), ("...", None), ("-", None), ("$,.", None),
])  # fmt: skip
def test_the_value_of_the_last_number(text, value):
    assert last_number(text) == value


def test_numbers_may_have_any_number_of_digits():
    digits = "1" * 5000  # `int` refuses more than 4,300
    assert grade([digits, digits], [f"{digits}.0", f"{digits}1"]) == [1, 0]


def test_a_reference_without_a_number_is_refused():
    assert grade(["18", "x", ""], ["18", "18", "18"]) == [1, 0, 0]
    with pytest.raises(ValueError, match="the reference has no number: 'eighteen'"):
        grade(["18"], ["eighteen"])


def lcs(one: list[str], other: list[str]) -> int:
    """Return the length of the longest common subsequence."""
    rows = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, x in enumerate(one):
        for j, y in enumerate(other):
            rows[i + 1][j + 1] = rows[i][j] + 1 if x == y else max(rows[i][j + 1], rows[i + 1][j])
    return rows[-1][-1]


@pytest.mark.parametrize("answer, references", [
    ("", ["The Eagle is a pub."]), ("  \n", ["x"]), ("...", ["a b"]), ("the the the", ["the"]),
    ("same", ["same", "same"]),
    ("The Eagle is a cheap pub", ["The Eagle is a pub.", "A cheap pub is The Eagle."]), ("a", ["..."]),
    ("café régal £20", ["café regal £20", "cafe"]), ("H₂O naïve x²", ["H2O naive x"]), ("snake_case", ["snake case"]),
])  # fmt: skip
def test_rouge_l_of_latin_texts_is_that_of_rouge_score(answer, references):
    (score,) = rouge_l.grade([answer], [references])
    assert score == RougeScorer(["rougeL"]).score_multi(references, answer)["rougeL"].fmeasure
    by_hand = []
    for reference in references:
        words, others = (RougeScorer([])._tokenizer.tokenize(text) for text in (answer, reference))
        by_hand.append(2 * lcs(words, others) / (len(words) + len(others)) if words and others else 0)
    assert score == pytest.approx(max(by_hand))


@pytest.mark.parametrize("answer, reference, score", [
    ("一家便宜的餐厅", "一家便宜的餐厅", 1), ("一家餐厅", "一家便宜的餐厅", 2 * 4 / (4 + 7)), ("二", "一", 0),
    ("Привет, мир!", "привет мир", 1), ("привет", "привет мир", 2 / 3), ("हिन्दी में", "हिन्दी में", 1), ("गुण", "गण", 0),
    ("The Mill 便宜", "The Mill 贵", 2 * 2 / (4 + 3)), ("ไทย", "ไทย", 1), ("한국어 말", "한국어 글", 1 / 2),
])  # fmt: skip
def test_rouge_l_counts_words_of_all_scripts(answer, reference, score):
    assert rouge_l.grade([answer], [[reference]]) == [pytest.approx(score)]


def test_an_answer_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="answer 1 has no reference"):
        rouge_l.grade(["x", "y"], [["x"], []])


def test_metrics_load_by_their_path(load):
    numbers = load("last_number").compute(predictions=["so 1 000", "2"], references=["#### 1,000", "3"])
    assert numbers == {"last_number": 0.5, "outcomes": [1, 0]}
    best = load("rouge_l").compute(predictions=["the cat sat"], references=[["a dog", "The cat sat."]])
    assert best == {"rouge_l": 1, "outcomes": [1]}
    assert load("rouge_l").compute(predictions=["the cat"], references=["a cat"])["rouge_l"] == pytest.approx(0.5)
    programs = ["def double(n): return 2 * n", "def double(n): return n"]
    passed = load("pass_at_1").compute(predictions=programs, references=["assert double(3) == 6"] * 2, unsafe=True)
    assert passed == {"pass_at_1": 0.5, "outcomes": [1, 0]}


def test_balanced_accuracy_is_the_mean_recall(load):
    predictions, references = [0, 0, 1, 1, 2, 0, 0], [0, 0, 0, 1, 1, 2, 0]
    score = load("balanced_accuracy").compute(predictions=predictions, references=references)["balanced_accuracy"]
    assert score == pytest.approx(recall_score(references, predictions, average="macro"))
    assert score == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    adjusted = load("balanced_accuracy").compute(predictions=[0] * 4, references=[0, 0, 0, 1], adjusted=True)
    assert adjusted == {"balanced_accuracy": 0}


@pytest.mark.parametrize("name", NAMES)
def test_metrics_describe_themselves(name, load):
    metric = load(name)
    assert (
        len(metric.description) > 100
        and metric.citation.strip().startswith("@")
        and "Args:" in metric.inputs_description
    )
    features = metric.features[0] if isinstance(metric.features, list) else metric.features
    assert set(features) == {
        "predictions",
        "references",
    }
    assert ("sandbox" in metric.description) == (name == "pass_at_1")


def test_metrics_load_in_another_folder_without_a_network(tmp_path):
    """Load all metrics in a process that cannot import this repository and may not use a socket."""
    program = f"""
import socket
def refuse(*arguments, **options): raise AssertionError("the network was asked for")
socket.socket.connect = socket.getaddrinfo = refuse
import evaluate
for name in {NAMES!r}:
    metric = evaluate.load("{FOLDER}/" + name)
assert metric.compute(predictions=[0, 0], references=[0, 1]) == {{"balanced_accuracy": 0.5}}
"""
    (tmp_path / "load.py").write_text(program)
    done = processes.run(tmp_path / "load.py", folder=tmp_path, absent=("bench", "malora", "tasks", "tests"))
    assert done.returncode == 0, done.stderr
