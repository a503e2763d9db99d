"""The tiny base of the repository is the one of all published records, and its recipe is kept."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.errors import UserError
from bench.models import base, make_tiny, tiny
from bench.models.base import TINY_FOLDER, prepare
from bench.records import store


@pytest.fixture
def copied(monkeypatch, tmp_path):
    """A copy of the shipped base, in its place."""
    folder = shutil.copytree(TINY_FOLDER, tmp_path / "tiny-base")
    monkeypatch.setattr(base, "TINY_FOLDER", folder)
    prepare.cache_clear()
    yield folder
    prepare.cache_clear()


def test_the_shipped_base_is_that_of_all_published_records():
    found = prepare("tiny")
    assert found.path == TINY_FOLDER
    assert {record.config.model_hash for record in store.read_all(store.RESULTS / "tiny")} == {found.hash}


def test_the_recipe_beside_the_base_is_the_one_it_was_made_by():
    """A change of the recipe, or of the text that it generates, asks for another base."""
    assert tiny.recipe_hash() in (TINY_FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_changed_base_is_refused(name, copied):
    assert prepare("tiny").path == copied
    path = copied / name
    content = path.read_bytes()
    path.write_bytes(content.replace(b"128", b"129", 1) if name == "config.json" else content[:-1] + b" ")
    prepare.cache_clear()
    with pytest.raises(UserError, match=r"is not the tiny base of published records.*git checkout"):
        prepare("tiny")
    path.unlink()
    with pytest.raises(UserError, match=r"is not the tiny base of published records|is not a JSON object"):
        prepare("tiny")


def test_a_base_that_is_made_again_is_compared_with_the_shipped_one(copied):
    assert make_tiny.compare(copied) == "the same weights as the shipped base, to the bit"
    weights = copied / "model.safetensors"
    save_file({name: 1.01 * tensor for name, tensor in load_file(weights).items()}, weights)
    assert "they differ by 1.0% of its norm" in make_tiny.compare(copied)


def test_the_recipe_makes_the_files_of_the_shipped_base(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(tiny.RECIPE, "steps", 2)
    threads = torch.get_num_threads()
    make_tiny.main([str(tmp_path / "again")])
    assert torch.get_num_threads() == threads
    assert base.hash_files(tmp_path / "again") == base.TINY_FILES
    assert "again: other weights than the shipped base: they differ by" in capsys.readouterr().out
