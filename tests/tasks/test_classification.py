"""Data sets of texts to classify: labels in words, fixed sets, and texts that are in two sets."""

from collections import Counter
from dataclasses import replace

import pytest

from tasks import MIXTURES, TASKS, DataError, Folder, build
from tasks.base import FORMATS, Question
from tasks.classification import CLASSIFICATION, CLINC_DOMAINS, in_words
from tasks.intents import BANKING77, CLINC150
from tasks.splits import HeldOut
from tests.tasks.conftest import write

SIZES = HeldOut(test=6, validation=3)


def records(prefix, count, **fields):
    return [{"text": f"{prefix} {i}", **fields} for i in range(count)]


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 20), ("dev", 4), ("test", 5)):
        write(tmp_path, "sst2", split, records(f"film {split}", count, label="negative"))
        write(tmp_path, "snips", split, records(f"song {split}", count, label="PlayMusic"))
    write(
        tmp_path, "subj", "all", records("FILM, test", 5, label="subjective") + records("plot", 60, label="objective")
    )
    return tmp_path


def splits_of(task, folder):
    items = task.load(Folder(folder))
    return {split: [item.text for item in of_split] for split, of_split in items.items()}


def test_labels_are_words_and_the_prompt_ends_with_their_name():
    labels = ("AddToPlaylist", "card_arrival", "visual-studio", "Refund_not_showing_up")
    assert [in_words(label) for label in labels] == [
        "add to playlist", "card arrival", "visual-studio", "refund not showing up"]  # fmt: skip
    record = {"text": " play it \n", "label": "RateBook"}
    question = TASKS["snips"].parse_record(record)
    example = FORMATS["cloze"]("snips", question)
    assert (example.prompt, example.label, len(example.choices)) == ("play it\nIntent:", " rate book", 7)
    lettered = FORMATS["letters"]("snips", question)
    assert lettered.prompt.startswith("play it\nA. add to playlist\n") and lettered.prompt.endswith("\nIntent:")


def test_choices_of_clinc150_are_the_intents_of_the_domain():
    record = {"text": "convert it", "label": "exchange_rate", "domain": "travel"}
    travel, banking = (CLINC_DOMAINS[domain].parse_record(record) for domain in ("travel", "banking"))
    assert travel == TASKS["clinc150"].parse_record(record) and banking is None
    assert len(travel.choices) == 15 and travel.choices[travel.answer] == "exchange rate"
    with pytest.raises(ValueError, match="field 'label' is 'exchange_rate', not one of calendar"):
        TASKS["clinc150"].parse_record(record | {"domain": "home"})
    assert len(set(BANKING77)) == 77 and {len(set(intents)) for intents in CLINC150.values()} == {15}


def test_texts_with_the_same_letters_and_digits_are_the_same():
    keys = {Question(t, ("a", "b"), 0, label_name="Style").key for t in ("it's a cliché, 1 !", "It 's a CLICH 1")}
    assert keys == {"itsaclich1"}


def test_sets_have_fixed_sizes_and_what_is_missing_is_held_out_of_training(folder):
    task = replace(TASKS["snips"], held_out=SIZES)
    drawn = splits_of(task, folder)
    assert {split: len(texts) for split, texts in drawn.items()} == {"train": 19, "test": 6, "validation": 3}
    assert sum("train" in text for text in drawn["test"]) == 1 and not set(drawn["train"]) & set(drawn["test"])
    assert set(drawn["validation"]) < {f"song dev {i}" for i in range(4)}  # a larger published set is sampled
    assert drawn == splits_of(task, folder)
    assert [item.text for item in task.read(Folder(folder), "test")] == drawn["test"]
    with pytest.raises(DataError, match="SNIPS: of 20 training items 95 are to be held out for test"):
        splits_of(replace(task, held_out=HeldOut(test=100, validation=3)), folder)


def test_subj_is_split_by_its_texts_without_those_of_sst2(folder):
    drawn = splits_of(replace(TASKS["subj"], held_out=HeldOut(test=5, validation=2)), folder)
    texts = [text for of_split in drawn.values() for text in of_split]
    assert len(set(texts)) == len(texts) and not any("FILM" in text for text in texts)
    assert (len(drawn["test"]), len(drawn["validation"])) == (5, 2)


def test_repeated_training_texts_are_dropped(tmp_path):
    for split in ("dev", "test"):
        write(tmp_path, "emotion", split, records(split, 8, label="joy"))
    twice = [{"text": "So glad", "label": "joy"}, {"text": "so glad!", "label": "love"}]
    write(tmp_path, "emotion", "train", [*twice, *records("train", 4, label="fear")])
    train = replace(TASKS["emotion"], held_out=SIZES).load(Folder(tmp_path))["train"]
    assert [item.text for item in train] == ["So glad", "train 0", "train 1", "train 2", "train 3"]
    assert train[0].choices[train[0].answer] == "joy"


def test_a_task_draws_the_same_items_alone_and_in_a_mixture(folder, monkeypatch):
    monkeypatch.setitem(TASKS, "snips", replace(TASKS["snips"], held_out=SIZES))
    both = replace(MIXTURES["classify"], tasks=("sst2", "snips"), size=10)
    blend, alone = (build(m, Folder(folder), format="cloze", seed=1) for m in (both, replace(both, tasks=("snips",))))
    assert Counter(example.task for example in blend.train) == {"sst2": 10, "snips": 10}
    assert alone.train == [example for example in blend.train if example.task == "snips"]
    assert len(blend.validation["sst2"]) == 4 and len(blend.test["sst2"]) == 5


def test_the_mixtures_of_the_protocol():
    assert (
        MIXTURES["classify"].tasks == tuple(task.name for task in CLASSIFICATION) and MIXTURES["classify"].size == 2000
    )
    assert MIXTURES["classify/trec"].tasks == ("trec",) and MIXTURES["clinc/banking"].tasks == ("clinc_banking",)
    assert MIXTURES["clinc"].tasks == tuple(MIXTURES[f"clinc/{domain}"].tasks[0] for domain in CLINC150)
