"""The inter-domain mixtures: what is read, what is left out, and what is trained on."""

from collections import Counter
from dataclasses import replace

import pytest

from bench.records import store
from tasks import MIXTURES, TASKS, DataError, Folder, Generator, Hub, build
from tasks.base import LAST_NUMBER, LIKELIHOOD, PASS, ROUGE_L, Exercise, Question, Task, written
from tasks.domains import OPEN, PAPER
from tasks.medqa import AFRIMEDQA
from tasks.procedural import VOCABULARY
from tests import inter_folder

INTER = MIXTURES["inter-open"]


@pytest.fixture
def folder(tmp_path):
    inter_folder.make(tmp_path)
    return tmp_path


def build_open(folder, name="inter-open", seed=0):
    return build(MIXTURES[name], Folder(folder), format="letters", seed=seed)


def test_published_records_were_trained_on_the_data_that_is_still_built():
    published = store.read_all(store.RESULTS / "tiny")
    hashes = {(r.config.mixture, r.config.seed): r.data.sha256 for r in published if r.data}
    assert {"procedural", "procedural-inter"} <= {mixture for mixture, _ in hashes}
    for (mixture, seed), sha256 in hashes.items():
        assert build(MIXTURES[mixture], Generator(), format="letters", seed=seed).sha256 == sha256, mixture


def test_the_hubs_and_the_folders_records_read_alike():
    read = {name: TASKS[name].question for name in ("medmcqa", "phrasebank", "e2e")}
    item = read["medmcqa"](inter_folder.MEDMCQA)
    assert item == read["medmcqa"]({**inter_folder.MEDMCQA, "cop": "b"}) and item.choices[item.answer] == "fire"
    hub = {"meaning_representation": inter_folder.E2E["mr"], "human_reference": inter_folder.E2E["ref"]}
    assert read["e2e"](inter_folder.E2E) == read["e2e"](hub)
    listed, lettered = ({"question": "Hot?", "options": options, "answer": answer} for options, answer in (
        (["A. ice", "B. fire"], "fire"), (inter_folder.OPTIONS, "B")))  # fmt: skip
    assert AFRIMEDQA.question(listed) == AFRIMEDQA.question(lettered) == Question("Hot?", ("ice", "fire"), 1)
    assert AFRIMEDQA.question({**lettered, "answer": "E"}) is None


def labelled(sentences, labels):
    import datasets

    names = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": names})
    return datasets.Dataset.from_dict({"sentence": sentences, "label": labels}, features=features)


def test_the_hub_gives_the_names_of_classes(monkeypatch):
    import datasets

    rows, asked = labelled(["a", "b"], [1, 0]), []
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **options: asked.append((words, options)) or rows)
    assert [row["label"] for row in Hub().read(TASKS["phrasebank"].data, "75agree")] == ["yes", "no"]
    assert asked == [(("takala/financial_phrasebank", "sentences_75agree"), {"split": "train"})]
    with pytest.raises(DataError, match=r"afrimedqa is not on the hub; give --data a folder .* afrimedqa_mcq\."):
        build(INTER, Hub(), format="letters", seed=0)


def test_what_a_data_sets_own_code_made_is_read_as_parquet(tmp_path, monkeypatch):
    """On the hub the Financial PhraseBank is a script, which datasets 4 refuses; its branch of Parquet is not."""
    import datasets

    load, ref = datasets.load_dataset, TASKS["phrasebank"].data
    for name, label in (("sentences_75agree", 1), ("sentences_allagree", 0)):
        (tmp_path / "hub" / name / "train").mkdir(parents=True)
        labelled(["a"], [label]).to_parquet(tmp_path / "hub" / name / "train" / "0000.parquet")

    def load_dataset(path, *words, revision=None, **options):
        assert path == ref.hub
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found financial_phrasebank.py")
        assert revision == "refs/convert/parquet"
        return load(str(tmp_path / "hub"), *words, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert Hub().read(ref, "75agree") == [{"sentence": "a", "label": "yes"}]


def test_medmcqa_keeps_what_has_one_answer():
    read = TASKS["medmcqa"].question
    assert read({**inter_folder.MEDMCQA, "choice_type": "multi"}) is None
    assert read({**inter_folder.MEDMCQA, "opd": "ice "}) is None


def test_what_scoring_needs_of_written_answers(folder):
    test = build_open(folder).test
    (program,) = test["humaneval"]
    begin, tests = program.references
    assert program.prompt == f"Question: Complete this Python function.\nAnswer:\n{begin}"
    assert begin == inter_folder.HUMANEVAL["prompt"] and tests.endswith("\ncheck(double)\n")
    assert test["gsm8k"][0].references == ("2,000",)
    assert test["gsm8k"][0].label == " 500*4 = 2,000 legs.\n#### 2,000"  # without the calculator's mark
    assert len(test["e2e"]) == 12  # meaning representations, of 13 records
    assert test["e2e"][0].references == ("The Mill serves Thai food.", "Thai!")
    assert [TASKS[t].metric for t in INTER.tasks] == [None, PASS, LAST_NUMBER, None, None, None, ROUGE_L]


def test_domains_are_blended_evenly_and_what_stands_in_a_test_is_dropped(folder):
    known = "HOW many legs have 500 cats 3"
    inter_folder.write(folder, "svamp_cot_train", [{"question": known, "answer_cot": "2000"}] * 12)
    inter_folder.write(folder, "e2e_nlg_train", [{"mr": f"food[{i}]", "ref": "Food."} for i in range(24)])
    data = build_open(folder)
    # Mathematics is the smallest: 24 records, of which 12 stand in the test, be they held out or not.
    count = Counter(example.task for example in data.train)
    assert list(count) == [domain.name for domain in OPEN] and len(set(count.values())) == 1
    assert data.dropped["mathematics"] + data.dropped_validation["mathematics"] == 12
    assert count["mathematics"] == 24 - 12 - len(data.validation["mathematics"])
    assert set(data.test) == set(INTER.tasks) and set(data.validation) == set(count)
    assert all(TASKS[name].metric == LIKELIHOOD for name in data.validation)


def test_a_domain_alone_draws_as_it_does_in_the_blend(folder):
    def drawn(name):
        return build(replace(MIXTURES[name], size=5), Folder(folder), format="letters", seed=1)

    blend = drawn("inter-open")
    for domain in OPEN:
        alone = drawn(f"inter-open/{domain.name}")
        assert alone.train == [e for e in blend.train if e.task == domain.name] and len(alone.train) == 5
        assert set(alone.test) == set(domain.tests)
    assert {test for domain in PAPER for test in domain.tests} == set(INTER.tasks)


def test_the_tables_can_say_whose_data_it_is():
    open_data = [name for name, mixture in MIXTURES.items() if mixture.note]
    assert open_data == ["inter-open", *(f"inter-open/{domain.name}" for domain in OPEN)]
    assert "Not the paper's training data" in INTER.note and MIXTURES["inter"].size == 30_000


def test_one_template_for_all_that_is_written():
    example = written("x", Exercise("Why?", "So.", context="It is."))
    assert (example.prompt, example.label) == ("Passage: It is.\nQuestion: Why?\nAnswer:", " So.")


def test_the_stand_in_of_tiny_is_words_that_its_base_knows():
    data = build(MIXTURES["procedural-inter"], Generator(), format="letters", seed=0)
    examples = [*data.train, *(e for items in (data.test | data.validation).values() for e in items)]
    assert {word for e in examples for word in (e.prompt + e.label).split()} <= set(VOCABULARY)
    written_tests = {name for name in data.test if isinstance(TASKS[name], Task) and TASKS[name].writing}
    assert written_tests == {"counting", "report"}
    assert all(e.label.split()[-1] == e.references[0] for e in data.test["counting"])
    assert all(e.label.strip() in e.references for e in data.test["report"])
