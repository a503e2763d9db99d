"""The cache of base models that are made here."""

import pytest

from bench.models.cache import cache_folder, make_once


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MALORA_CACHE", str(tmp_path / "cache"))


def test_a_model_is_made_once():
    calls = []

    def make(folder):
        calls.append(folder)
        (folder / "weights").write_text("1")

    first, second = make_once("base", make), make_once("base", make)
    assert first == second == cache_folder() / "base" and len(calls) == 1
    assert first.joinpath("weights").read_text() == "1"


def test_an_interrupted_model_leaves_nothing():
    def make(folder):
        (folder / "weights").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_once("base", make)
    assert list(cache_folder().iterdir()) == []


def test_a_model_that_another_process_finished_first_is_used():
    def make(folder):
        (folder / "weights").write_text("second")
        other = cache_folder() / "base"
        other.mkdir()
        (other / "weights").write_text("first")

    assert make_once("base", make).joinpath("weights").read_text() == "first"
