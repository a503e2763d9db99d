"""Reading, cleaning, blending and formatting; the real data sets' forms on a few made-up records."""

import gzip
import json
import random
from collections import Counter

import pytest

from tasks import FORMATS, MIXTURES, TASKS, DataError, Folder, Generator, Question, build
from tasks.procedural import GENERATORS, VOCABULARY, pretraining_text

ARC = {"id": "x", "question": "Which is hot?", "choices": ["ice", "fire", "snow"], "answer": 1, "answerKey": "B"}
HUB_CHOICES = {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]}
ARC_HUB = {"question": "Which is hot?", "choices": HUB_CHOICES, "answerKey": "2"}
OBQA_HUB = {"question_stem": "Which is hot?", "choices": ARC_HUB["choices"], "answerKey": "2"}
PIQA = {"goal": "make tea", "sol1": "boil water", "sol2": "boil tea", "label": 0}
BOOLQ = {"question": "is ice cold", "passage": "Ice -- Ice is cold.", "answer": True}


def write(folder, file, split, records):
    with gzip.open(folder / f"{file}_{split}.jsonl.gz", "wt") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def folder(tmp_path):
    """The intra mixture in small: the train splits hold one question that stands in a test split."""
    for file in ("arc_challenge", "arc_easy", "openbookqa"):
        for split, count in (("train", 6), ("validation", 2), ("test", 3)):
            write(tmp_path, file, split, [{**ARC, "question": f"{file} {split} {i}?"} for i in range(count)])
    for split in ("train", "validation"):
        write(tmp_path, "piqa", split, [{**PIQA, "goal": f"{split} goal {i}"} for i in range(30)])
        write(tmp_path, "boolq", split, [{**BOOLQ, "question": f"{split} {i}"} for i in range(30)])
    own = [{**ARC, "question": f"q {i}?"} for i in range(5)]
    write(tmp_path, "arc_easy", "train", [*own, {**ARC, "question": "ARC Challenge: test 1"}])
    return tmp_path


def build_intra(folder, **options):
    return build(MIXTURES["intra"], Folder(folder), **{"format": "letters", "seed": 0, **options})


@pytest.mark.parametrize("task, record", [
    ("arc_challenge", ARC), ("arc_easy", ARC_HUB), ("openbookqa", OBQA_HUB), ("openbookqa", ARC),
])  # fmt: skip
def test_the_hubs_and_the_folders_records_read_alike(task, record):
    assert TASKS[task].question(record) == Question("Which is hot?", ("ice", "fire", "snow"), 1)


def test_letters_and_cloze():
    question = TASKS["boolq"].question(BOOLQ)
    shown = FORMATS["letters"]("boolq", question)
    assert shown.prompt == "Passage: Ice -- Ice is cold.\nQuestion: is ice cold?\nA. yes\nB. no\nAnswer:"
    assert (shown.choices, shown.label) == ((" A", " B"), " A")
    hidden = FORMATS["cloze"]("piqa", TASKS["piqa"].question(PIQA))
    assert hidden.prompt == "Question: make tea\nAnswer:"
    assert hidden.choices == (" boil water", " boil tea") and hidden.label == " boil water"


def test_train_questions_that_stand_in_a_test_are_dropped_and_counted(folder):
    data = build_intra(folder)
    assert data.dropped == {"piqa": 0, "openbookqa": 0, "boolq": 0, "arc_challenge": 0, "arc_easy": 1}
    assert Counter(e.task for e in data.train)["arc_easy"] == 5


def test_without_a_published_validation_it_is_a_part_of_train(folder):
    data, again = build_intra(folder), build_intra(folder, seed=1)
    train = {e.prompt for e in data.train if e.task == "piqa"}
    validation = {e.prompt for e in data.validation["piqa"]}
    assert len(train) == 27 and len(validation) == 3 and not train & validation
    assert validation == {e.prompt for e in again.validation["piqa"]}  # the same for every seed
    assert all("validation goal" in e.prompt for e in data.test["piqa"])
    assert all("validation" in e.prompt for e in data.validation["arc_easy"])  # published


def test_an_even_blend_takes_as_many_of_each_and_depends_on_the_seed():
    first, second = (build(MIXTURES["procedural"], Generator(), format="letters", seed=s) for s in (0, 1))
    assert len(set(Counter(e.task for e in first.train).values())) == 1
    assert first.sha256["train"] != second.sha256["train"] and first.sha256["test"] == second.sha256["test"]
    assert first == build(MIXTURES["procedural"], Generator(), format="letters", seed=0)


@pytest.mark.parametrize("spoil, message", [
    (lambda f: (f / "piqa_train.jsonl.gz").unlink(), "piqa_train.jsonl.gz is missing; the folder has arc"),
    (lambda f: (f / "piqa_train.jsonl.gz").write_bytes(b"no gzip"), "piqa_train.jsonl.gz is broken"),
    (lambda f: (f / "piqa_train.jsonl.gz").write_bytes((f / "piqa_train.jsonl.gz").read_bytes()[:-30]), "is broken"),
    (lambda f: (f / "piqa_train.jsonl.gz").write_bytes(gzip.compress(b"{}\n{")), "line 2: not JSON"),
    (lambda f: (f / "piqa_train.jsonl.gz").write_bytes(gzip.compress(b"[1]\n")), "line 1: not a JSON object"),
    (lambda f: write(f, "piqa", "train", [{"goal": "x"}]), "piqa_train, record 0: not a PIQA item"),
    (lambda f: write(f, "arc_easy", "test", [{**ARC, "answer": 7}]), "arc_easy_test, record 0: .*answer 7"),
])  # fmt: skip
def test_a_folder_that_lacks_a_file_or_holds_a_broken_one_says_which(folder, spoil, message):
    spoil(folder)
    with pytest.raises(DataError, match=message):
        build_intra(folder)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        Folder(tmp_path / "nothing")


@pytest.mark.parametrize("name", GENERATORS)
def test_procedural_answers_cannot_be_guessed_from_their_place(name):
    """In 3,000 draws every choice is right about equally often (five standard errors)."""
    rng = random.Random(0)
    drawn = [GENERATORS[name](rng) for _ in range(3000)]
    share = 1 / len(drawn[0].choices)
    for answer, count in Counter(q.answer for q in drawn).items():
        assert abs(count / 3000 - share) < 5 * (share * (1 - share) / 3000) ** 0.5, (answer, count)
    words = {w for q in drawn for w in FORMATS["letters"](name, q).prompt.split()}
    assert words <= set(VOCABULARY)


def test_the_tiny_base_never_reads_a_question_of_the_five_kinds():
    rng = random.Random(0)
    texts = [pretraining_text(rng) for _ in range(3000)]
    assert {w for text in texts for w in text.split()} <= set(VOCABULARY)
    for phrase in ("which kind is", "most often ?", "less than", "is second ?", "after spring"):
        assert not any(phrase in text for text in texts), phrase
