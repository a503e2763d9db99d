"""The identity of a base model: it covers everything that decides a score, and published records keep theirs."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from bench.errors import UserError
from bench.experiments.profiles import PROFILES
from bench.models import base, smollm2, tiny
from bench.models.base import load, prepare
from bench.records import store
from bench.runs.run import find_record, run
from bench.runs.setting import RunSettings, make_run_config
from tests.bench.conftest import make_setting


@pytest.fixture
def folder(base_folder, tmp_path):
    """A copy of the random base that a test may change."""
    yield Path(shutil.copytree(base_folder, tmp_path / "base"))
    prepare.cache_clear()


def identity(folder):
    prepare.cache_clear()
    return prepare(str(folder)).hash


def edit(path, change):
    content = json.loads(path.read_text()) if path.is_file() else {}
    change(content)
    path.write_text(json.dumps(content))


def swap_tokens(content):
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]


DECISIVE = {
    "tokenizer.json": swap_tokens,
    "tokenizer_config.json": lambda content: content.update(eos_token="<unk>"),
    "special_tokens_map.json": lambda content: content.update(bos_token="<unk>"),
    "added_tokens.json": lambda content: content.update(new=177),
    "config.json": lambda content: content.update(rms_norm_eps=0.5),
    "model.safetensors.index.json": lambda content: content.update(weight_map={}),
}
IRRELEVANT = {
    "config.json": lambda content: content.update(transformers_version="9.9"),
    "tokenizer_config.json": lambda content: content.update(is_local=True, chat_template="x"),
    "generation_config.json": lambda content: content.update(temperature=2.0),
    "README.md": lambda content: content.update(text="x"),
}


@pytest.mark.parametrize("name", DECISIVE)
def test_what_decides_a_score_changes_the_identity(name, folder):
    before = identity(folder)
    edit(folder / name, DECISIVE[name])
    assert identity(folder) != before


@pytest.mark.parametrize("name", IRRELEVANT)
def test_what_decides_no_score_does_not(name, folder):
    before = identity(folder)
    edit(folder / name, IRRELEVANT[name])
    assert identity(folder) == before


def test_weights_and_other_tokenizer_files_count(folder):
    hashes = {identity(folder)}
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    hashes.add(identity(folder))
    for name in ("vocab.json", "merges.txt", "tokenizer.model"):
        (folder / name).write_text("{}")
        hashes.add(identity(folder))
    assert len(hashes) == 5


def test_a_run_is_made_again_after_the_tokenizer_changed(folder, tmp_path, fresh_accelerator):
    setting = make_setting(folder, tmp_path / "results", max_steps=2, max_items=5)
    first = run(make_run_config(setting, "lora", seed=0), setting)
    assert find_record(make_run_config(setting, "lora", seed=0), setting)
    edit(folder / "tokenizer.json", swap_tokens)
    prepare.cache_clear()
    changed = make_run_config(setting, "lora", seed=0)
    assert find_record(changed, setting) is None
    assert run(changed, setting).items != first.items


@pytest.fixture
def tiny_folder(monkeypatch, tmp_path):
    """The tiny base as its recipe makes it, but for the weights, which are trained for three steps only."""
    monkeypatch.setitem(tiny.RECIPE, "steps", 3)
    folder = tmp_path / "tiny"
    folder.mkdir()
    tiny.train_base(folder)
    monkeypatch.setitem(base.BUILT_IN, "tiny", lambda: folder)
    prepare.cache_clear()
    yield folder
    prepare.cache_clear()


def test_a_published_record_is_found_again_today(tiny_folder, monkeypatch, tmp_path):
    published = store.read_all(store.RESULTS / "tiny")
    (weights,) = {record.config.model_hash for record in published}
    monkeypatch.setattr(base, "_hash_weights", lambda folder: weights)
    profile = PROFILES["tiny"]
    setting = RunSettings(profile, profile.model, profile.source, "intra", tmp_path)
    found = 0
    for record in published:
        config = record.config
        if config.mixture == "procedural" and config.seed == 0 and config.method in ("base", "lora", "malora"):
            today = make_run_config(setting, config.method, config.seed, config.learning_rate)
            if today.method_options == config.method_options:
                assert today.id == record.id
                assert store.find(today, store.RESULTS / "tiny")
                found += 1
    assert found > 10

    edit(tiny_folder / "tokenizer.json", swap_tokens)
    prepare.cache_clear()
    assert store.find(make_run_config(setting, "base", 0), store.RESULTS / "tiny") is None


def test_only_safetensors_are_loaded_and_no_code_of_the_folder_runs(folder):
    edit(folder / "config.json", lambda c: c.update(model_type="mine", auto_map={"AutoConfig": "mine.Config"}))
    (folder / "mine.py").write_text("raise SystemExit('code of the folder ran')")
    prepare.cache_clear()
    with pytest.raises(UserError, match="is not a complete causal language model"):
        load(prepare(str(folder)), torch.device("cpu"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    prepare.cache_clear()
    with pytest.raises(UserError, match="has no weights"):
        prepare(str(folder))


def test_a_config_that_is_not_json_is_refused(folder):
    (folder / "config.json").write_text("{")
    prepare.cache_clear()
    with pytest.raises(UserError, match=r"config\.json is not a JSON object"):
        prepare(str(folder))


@pytest.mark.parametrize(
    "file, content",
    [
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}'),
        ("config.json", '{"model_type": ["llama"]}'),
        ("config.json", '{"model_type": "llama", "num_hidden_layers": null}'),
        ("config.json", '{"model_type": "llama", "rope_parameters": [1]}'),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[" * 5000),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}'),
    ],
)
def test_damaged_files_are_one_error(file, content, folder):
    (folder / file).write_text(content)
    prepare.cache_clear()
    with pytest.raises(UserError, match="is not a complete causal language model") as caught:
        load(prepare(str(folder)), torch.device("cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(100), bytes(range(256))])
def test_a_damaged_gguf_is_one_error(content, monkeypatch, tmp_path):
    monkeypatch.setenv("MALORA_CACHE", str(tmp_path))
    (tmp_path / smollm2.SMOLLM2_GGUF).write_bytes(content)
    with pytest.raises(UserError, match="could not be converted"):
        smollm2.make_smollm2()
