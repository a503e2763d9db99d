"""Reading of records from the hub and from a folder.

Covered are also the errors for missing or broken files.
"""

import gzip

import pytest

from tasks import MIXTURES, TASKS, DataError, Folder, Generator, Hub, build
from tasks.base import DataRef


def labelled(sentences, labels):
    import datasets

    names = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": names})
    return datasets.Dataset.from_dict({"sentence": sentences, "label": labels}, features=features)


def test_the_hub_returns_the_names_of_classes(monkeypatch):
    import datasets

    records, asked = labelled(["a", "b"], [1, 0]), []
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **options: asked.append((words, options)) or records)
    assert [record["label"] for record in Hub().read(TASKS["phrasebank"].data, "75agree")] == ["yes", "no"]
    assert asked == [(("takala/financial_phrasebank", "sentences_75agree"), {"split": "train"})]
    with pytest.raises(DataError, match=r"afrimedqa is not on the hub; give --data a folder .* afrimedqa_mcq\."):
        build(MIXTURES["inter-open"], Hub(), format="letters", seed=0)


def test_data_sets_with_a_loading_script_are_read_as_parquet(tmp_path, monkeypatch):
    """Read the Parquet branch of the hub's Financial PhraseBank.

    The data set is a script, which datasets 4 refuses. Its Parquet branch can be read.
    """
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


def test_hidden_labels_of_the_hub_are_no_class(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **options: labelled(["a", "b", "c"], [-1, None, 1]))
    ref = TASKS["piqa"].data
    assert [record["label"] for record in Hub().read(ref, "test")] == [None, None, "yes"]
    assert Hub().locate(ref, "test", 2) == "baber/piqa (test), record 2"


@pytest.mark.parametrize("spoil, message", [
    (lambda path: path.unlink(), "piqa_train.jsonl.gz is missing; the folder has piqa_validation.jsonl.gz of this"),
    (lambda path: [p.unlink() for p in path.parent.glob("piqa*")], "missing; the folder has no file of this data set"),
    (lambda path: path.write_bytes(b"no gzip"), "piqa_train.jsonl.gz is broken"),
    (lambda path: path.write_bytes(path.read_bytes()[:-30]), "is broken"),
    (lambda path: path.write_bytes(gzip.compress(b"{}\n{")), "line 2: not JSON"),
    (lambda path: path.write_bytes(gzip.compress(b"[1]\n")), "line 1: not a JSON object"),
])  # fmt: skip
def test_a_missing_or_broken_file_is_named(intra_folder, spoil, message):
    spoil(intra_folder / "piqa_train.jsonl.gz")
    with pytest.raises(DataError, match=message):
        build(MIXTURES["intra"], Folder(intra_folder), format="letters", seed=0)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        Folder(tmp_path / "nothing")


def test_only_procedural_tasks_are_generated():
    with pytest.raises(DataError, match="piqa is not generated; give --data a folder"):
        Generator().read(DataRef("piqa", "baber/piqa"), "train")
