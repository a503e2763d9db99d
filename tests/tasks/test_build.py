"""Building of mixtures.

Covered are duplicates, validation splits, blends, and hashes that stay the same.
"""

from collections import Counter
from dataclasses import replace

import pytest

from bench.records import store
from tasks import MIXTURES, TASKS, DataError, Folder, Generator, build
from tasks.domains import OPEN, PAPER
from tasks.metrics import LIKELIHOOD
from tests import inter_folder
from tests.tasks.conftest import ARC, PIQA, write

INTER = MIXTURES["inter-open"]

# The tiny profile's published records have these data: letters, seed 0.
PROCEDURAL_SHA256 = {
    "procedural": {
        "train": "78af4819a41fc3b52c5fb8c48f39139cb11bbc9973b8507e918302ad6edc3adf",
        "validation": "8f4ea396262ed02749ea38be7d3ad935f3ec7d2426d3508d2311ceb79afface0",
        "test": "f3d0609099f3969bfd094a22f8ff28e3e9b4a12252d04f65d8d23d3a553eb1aa",
    },
    "procedural-inter": {
        "train": "8c876a896b712d7430db8c152637cff16c5b5ea136b82217ff88a765b180a3d6",
        "validation": "44260b976516a2520bffb1a3f43dcde05908e2825cfde0d776379b838c2a05ef",
        "test": "5f96ba99964c151b828fd0c51f30c4a57664bb6639e6f7dbd49e8e07249f35ec",
    },
}


def build_intra(folder, **options):
    return build(MIXTURES["intra"], Folder(folder), **{"format": "letters", "seed": 0, **options})


def build_open(folder, name="inter-open", seed=0):
    return build(MIXTURES[name], Folder(folder), format="letters", seed=seed)


@pytest.mark.parametrize("mixture", PROCEDURAL_SHA256)
def test_procedural_data_have_not_changed(mixture):
    data = build(MIXTURES[mixture], Generator(), format="letters", seed=0)
    assert data.sha256 == PROCEDURAL_SHA256[mixture]


def test_published_records_were_trained_on_the_data_that_is_still_built():
    published = store.read_all(store.RESULTS / "tiny")
    hashes = {(r.config.mixture, r.config.seed): r.data.sha256 for r in published if r.data}
    assert {"procedural", "procedural-inter"} <= {mixture for mixture, _ in hashes}
    for (mixture, seed), sha256 in hashes.items():
        assert build(MIXTURES[mixture], Generator(), format="letters", seed=seed).sha256 == sha256, mixture


def test_train_questions_that_are_in_a_test_split_are_dropped_and_counted(intra_folder):
    data = build_intra(intra_folder)
    assert data.dropped == {"piqa": 0, "openbookqa": 0, "boolq": 0, "arc_challenge": 0, "arc_easy": 1}
    assert Counter(e.task for e in data.train)["arc_easy"] == 5


def test_an_unpublished_validation_split_is_sampled_from_train(intra_folder):
    data, again = build_intra(intra_folder), build_intra(intra_folder, seed=1)
    train = {e.prompt for e in data.train if e.task == "piqa"}
    validation = {e.prompt for e in data.validation["piqa"]}
    assert len(train) == 27 and len(validation) == 3 and not train & validation
    assert validation == {e.prompt for e in again.validation["piqa"]}  # the same for every seed
    assert all("validation goal" in e.prompt for e in data.test["piqa"])
    assert all("validation" in e.prompt for e in data.validation["arc_easy"])  # published


def test_an_even_blend_takes_equally_many_items_and_depends_on_the_seed():
    first, second = (build(MIXTURES["procedural"], Generator(), format="letters", seed=s) for s in (0, 1))
    assert len(set(Counter(e.task for e in first.train).values())) == 1
    assert first.sha256["train"] != second.sha256["train"] and first.sha256["test"] == second.sha256["test"]
    assert first == build(MIXTURES["procedural"], Generator(), format="letters", seed=0)


@pytest.mark.parametrize("records, message", [
    ([{"goal": "x"}], "piqa_train.jsonl.gz, line 1: not a PIQA item"),
    ([{"goal": "x", "sol1": "a", "sol2": "b", "label": 7}], "piqa_train.jsonl.gz, line 1: .*answer 7"),
    ([PIQA, {**PIQA, "sol1": None}], "piqa_train.jsonl.gz, line 2: .*field 'sol1' is null, not a text"),
    ([PIQA, {**PIQA, "label": True}], "piqa_train.jsonl.gz, line 2: .*field 'label' is true"),
    ([PIQA, {**PIQA, "sol2": "boil water "}], "piqa_train.jsonl.gz, line 2: .*choices 0 and 1 are equal: 'boil water'"),
])  # fmt: skip
def test_a_record_that_cannot_be_parsed_is_named(intra_folder, records, message):
    write(intra_folder, "piqa", "train", records)
    with pytest.raises(DataError, match=message):
        build_intra(intra_folder)


def test_an_answer_that_is_not_among_the_choices_is_named(intra_folder):
    write(intra_folder, "arc_easy", "test", [{**ARC, "answer": 7}])
    with pytest.raises(DataError, match=r"arc_easy_test.jsonl.gz, line 1: .*answer 7"):
        build_intra(intra_folder)


def test_a_question_with_more_choices_than_letters_is_refused(intra_folder):
    write(intra_folder, "arc_easy", "test", [{**ARC, "choices": [f"choice {i}" for i in range(11)]}])
    with pytest.raises(DataError, match=r"arc_easy: a question has 11 choices, and the format letters .*Which is hot"):
        build_intra(intra_folder)
    assert len(build_intra(intra_folder, format="cloze").test["arc_easy"][0].choices) == 11


def test_a_split_without_an_item_is_refused(open_folder):
    multiple = [{**inter_folder.MEDMCQA, "choice_type": "multi"}] * 2
    inter_folder.write(open_folder, "medmcqa_dev", multiple)
    with pytest.raises(DataError, match="MedMCQA has no item in the split dev of medmcqa"):
        build_open(open_folder)


def test_domains_are_blended_evenly_and_test_questions_are_dropped(open_folder):
    known = "HOW many legs have 500 cats 3"
    inter_folder.write(open_folder, "svamp_cot_train", [{"question": known, "answer_cot": "2000"}] * 12)
    inter_folder.write(open_folder, "e2e_nlg_train", [{"mr": f"food[{i}]", "ref": "Food."} for i in range(24)])
    data = build_open(open_folder)
    # Mathematics is the smallest domain. Of its 24 records, in train and validation, 12 are in the test split.
    count = Counter(example.task for example in data.train)
    assert list(count) == [domain.name for domain in OPEN] and len(set(count.values())) == 1
    assert data.dropped["mathematics"] + data.dropped_validation["mathematics"] == 12
    assert count["mathematics"] == 24 - 12 - len(data.validation["mathematics"])
    assert set(data.test) == set(INTER.tasks) and set(data.validation) == set(count)
    assert all(TASKS[name].metric == LIKELIHOOD for name in data.validation)


def test_a_domain_alone_draws_the_same_items_as_in_the_blend(open_folder):
    def drawn(name):
        return build(replace(MIXTURES[name], size=5), Folder(open_folder), format="letters", seed=1)

    blend = drawn("inter-open")
    for domain in OPEN:
        alone = drawn(f"inter-open/{domain.name}")
        assert alone.train == [e for e in blend.train if e.task == domain.name] and len(alone.train) == 5
        assert set(alone.test) == set(domain.tests)
    assert {test for domain in PAPER for test in domain.tests} == set(INTER.tasks)


def test_examples_of_exercises_have_what_their_metrics_need(open_folder):
    test = build_open(open_folder).test
    (program,) = test["humaneval"]
    start, tests = program.references
    assert program.prompt == f"Question: Complete this Python function.\nAnswer:\n{start}"
    assert start == inter_folder.HUMANEVAL["prompt"] and tests.endswith("\ncheck(double)\n")
    assert test["gsm8k"][0].references == ("2,000",)
    assert test["gsm8k"][0].label == " 500*4 = 2,000 legs.\n#### 2,000"  # without the calculator annotation
    assert len(test["e2e"]) == 12  # meaning representations, from 13 records
    assert test["e2e"][0].references == ("The Mill serves Thai food.", "Thai!")


def test_a_task_without_test_items_is_an_error(intra_folder, monkeypatch):
    load = type(TASKS["piqa"]).load
    monkeypatch.setattr(type(TASKS["piqa"]), "load", lambda task, source: load(task, source) | {"test": []})
    with pytest.raises(DataError, match="piqa of intra has no test item"):
        build_intra(intra_folder)
