"""Folders with the files of the intra-domain and the inter-domain mixtures.

They hold a few made-up records.
"""

import gzip
import json

import pytest

from tests import inter_folder

ARC = {"id": "x", "question": "Which is hot?", "choices": ["ice", "fire", "snow"], "answer": 1, "answerKey": "B"}
PIQA = {"goal": "make tea", "sol1": "boil water", "sol2": "boil tea", "label": 0}
BOOLQ = {"question": "is ice cold", "passage": "Ice -- Ice is cold.", "answer": True}


def write(folder, file, split, records):
    with gzip.open(folder / f"{file}_{split}.jsonl.gz", "wt") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def intra_folder(tmp_path):
    """A small intra-domain mixture; one train question is also in a test split."""
    for file in ("arc_challenge", "arc_easy", "openbookqa"):
        for split, count in (("train", 6), ("validation", 2), ("test", 3)):
            write(tmp_path, file, split, [{**ARC, "question": f"{file} {split} {i}?"} for i in range(count)])
    for split in ("train", "validation"):
        write(tmp_path, "piqa", split, [{**PIQA, "goal": f"{split} goal {i}"} for i in range(30)])
        write(tmp_path, "boolq", split, [{**BOOLQ, "question": f"{split} {i}"} for i in range(30)])
    unique = [{**ARC, "question": f"q {i}?"} for i in range(5)]
    write(tmp_path, "arc_easy", "train", [*unique, {**ARC, "question": "ARC Challenge: test 1"}])
    return tmp_path


@pytest.fixture
def open_folder(tmp_path):
    """A small open inter-domain mixture."""
    inter_folder.make(tmp_path)
    return tmp_path
