"""The identity of a base model: it covers everything that decides a score, and published records keep theirs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.errors import UserError
from bench.experiments.profiles import PROFILES
from bench.models import base, smollm2
from bench.models.base import count_weights, load, prepare
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
    """A copy of the tiny base, in its place."""
    folder = shutil.copytree(base.TINY_FOLDER, tmp_path / "tiny")
    monkeypatch.setitem(base.BUILT_IN, "tiny", lambda: folder)
    prepare.cache_clear()
    yield folder
    prepare.cache_clear()


def test_a_published_record_is_found_again_today(tiny_folder, tmp_path):
    published = store.read_all(store.RESULTS / "tiny")
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


def save_sharded(folder):
    """Save the weights in three files that an index names."""
    model, _ = load(prepare(str(folder)), torch.device("cpu"))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-0*.safetensors"))) > 2
    prepare.cache_clear()


def logits(folder):
    prepare.cache_clear()
    model, _ = load(prepare(str(folder)), torch.device("cpu"))
    return model(torch.arange(3, 19)[None]).logits


def other_weights(folder, source, target):
    """Write weights that give other scores than those of another file."""
    tensors = {name: tensor * 1.5 for name, tensor in load_file(folder / source).items()}
    save_file(tensors, folder / target, metadata={"format": "pt"})


def test_the_weights_that_are_hashed_are_those_that_are_loaded(folder):
    """Each file whose change alters the outputs alters the identity, wherever transformers finds it."""
    before, expected = identity(folder), logits(folder)
    torch.save({}, folder / "pytorch_model.bin")  # beside safetensors it is not loaded
    assert identity(folder) == before and torch.equal(logits(folder), expected)

    elsewhere = folder.parent / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(elsewhere)
    (folder / "model.safetensors").symlink_to(elsewhere)
    assert identity(folder) == before and torch.equal(logits(folder), expected)
    other_weights(folder.parent, elsewhere.name, elsewhere.name)
    assert identity(folder) != before and not torch.equal(logits(folder), expected)


def test_every_shard_counts(folder):
    expected, weights = logits(folder), count_weights(prepare(str(folder)))
    save_sharded(folder)
    hashes = {identity(folder)}
    assert torch.equal(logits(folder), expected) and count_weights(prepare(str(folder))) == weights
    shards = sorted(folder.glob("model-0*.safetensors"))
    for shard in shards:
        other_weights(folder, shard.name, shard.name)
        hashes.add(identity(folder))
    assert len(hashes) == 1 + len(shards)


def move_shard(folder, name):
    """Let the index name a shard elsewhere."""
    save_sharded(folder)
    index = folder / "model.safetensors.index.json"
    shard = sorted(folder.glob("model-0*.safetensors"))[0]
    (folder / name).parent.mkdir(exist_ok=True)
    shard.rename(folder / name)
    index.write_text(index.read_text().replace(shard.name, name))


def move_weights(folder, name):
    """Let the config name the weights elsewhere."""
    (folder / name).parent.mkdir(exist_ok=True)
    other_weights(folder, "model.safetensors", name)
    edit(folder / "config.json", lambda content: content.update(transformers_weights=name))


def move_weights_by_version(folder, name):
    """Let the config for this version of transformers name the weights elsewhere."""
    plain = (folder / "config.json").read_text()
    move_weights(folder, name)
    (folder / "config.json").rename(folder / "config.4.0.0.json")
    (folder / "config.json").write_text(plain)
    edit(folder / "config.json", lambda content: content.update(configuration_files=["config.4.0.0.json"]))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: move_shard(f, "sub/x.safetensors"), r"sub/x\.safetensors is no file directly in"),
        (lambda f: move_shard(f, "../x.safetensors"), r"x\.safetensors is no file directly in"),
        (lambda f: move_shard(f, "x.bin"), r"names x\.bin, but only safetensors are loaded"),
        (lambda f: move_weights(f, "sub/x.safetensors"), r"sub/x\.safetensors is no file directly in"),
        (lambda f: move_weights_by_version(f, "sub/x.safetensors"), r"sub/x\.safetensors is no file directly in"),
        (lambda f: move_weights(f, "x.bin"), r"names x\.bin, but only safetensors are loaded"),
        (lambda f: (save_sharded(f), sorted(f.glob("model-0*"))[0].unlink()), r"model-0\S+ is no file directly in"),
        (lambda f: (save_sharded(f), (f / "model.safetensors.index.json").unlink()), r"index\.json is no file"),
        (lambda f: (f / "model.safetensors").rename(f / "weights.safetensors"), r"index\.json is no file"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), r"has an adapter \(adapter_config\.json\)"),
    ],
)
def test_weights_that_the_identity_does_not_cover_are_refused(spoil, message, folder):
    spoil(folder)
    prepare.cache_clear()
    with pytest.raises(UserError, match=message) as error:
        prepare(str(folder))
    assert "\n" not in str(error.value)


def test_weights_that_the_config_names_count(folder):
    before, expected = identity(folder), logits(folder)
    move_weights(folder, "x.safetensors")
    named = identity(folder)
    assert named != before and not torch.equal(logits(folder), expected)
    other_weights(folder, "x.safetensors", "x.safetensors")
    assert identity(folder) != named


def test_a_config_for_this_version_of_transformers_counts(folder):
    """The config may name others, by version of transformers."""
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.4.0.0.json").write_text(json.dumps(content))
    edit(folder / "config.json", lambda content: content.update(configuration_files=["config.4.0.0.json"]))
    before, expected = identity(folder), logits(folder)
    edit(folder / "config.4.0.0.json", lambda content: content.update(rms_norm_eps=0.5))
    assert identity(folder) != before and not torch.equal(logits(folder), expected)


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
