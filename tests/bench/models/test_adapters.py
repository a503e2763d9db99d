"""Adapters that are loaded in full, or refused with the names of what is wrong."""

import json

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from bench.errors import UserError
from bench.models import patterns
from bench.models.adapters import add_adapter, load_adapter
from bench.models.base import load, prepare


@pytest.fixture
def base(base_folder):
    return lambda: load(prepare(str(base_folder)), torch.device("cpu"))[0]


@pytest.fixture
def identity(base_folder):
    return prepare(str(base_folder))


def save(model, folder):
    """Save an adapter with random tensors, and return it with its tensors."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval(), load_file(folder / "adapter_model.safetensors")


def rewrite(folder, tensors):
    save_file(tensors, folder / "adapter_model.safetensors")


IDS = torch.arange(3, 19).view(2, 8)


@pytest.mark.parametrize("method", ["lora", "dora", "asylora", "molora", "malora"])
def test_a_whole_adapter_is_loaded(method, base, identity, tmp_path):
    trained, _ = save(add_adapter(base(), method, {}, seed=0), tmp_path)
    torch.testing.assert_close(load_adapter(base(), identity, tmp_path).eval()(IDS).logits, trained(IDS).logits)


@pytest.mark.parametrize("options", [
    {"modules_to_save": ["lm_head"]},
    {"bias": "lora_only"},
    {"trainable_token_indices": {"embed_tokens": [4, 5]}},
    {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
])  # fmt: skip
def test_a_whole_adapter_of_plain_peft_is_loaded(options, base, identity, tmp_path):
    config = LoraConfig(**{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})
    trained, _ = save(get_peft_model(base(), config), tmp_path)
    torch.testing.assert_close(load_adapter(base(), identity, tmp_path).eval()(IDS).logits, trained(IDS).logits)


def test_embeddings_that_peft_saves_with_the_adapter_are_loaded(base, identity, tmp_path):
    trained = get_peft_model(base(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trained.save_pretrained(tmp_path, save_embedding_layers=True)
    load_adapter(base(), identity, tmp_path)


@pytest.mark.parametrize("method, lost, message", [
    ("malora", lambda name: "router" in name, "lacks 12 tensors of the adapter (base_model.model.model.layers.0."),
    ("malora", lambda name: name.endswith("malora_S") and "layers.1.mlp.down" in name, "lacks 1 tensors"),
    ("molora", lambda name: "layers.1" in name and name.endswith("malora_B"), "and 3 more)"),
    ("lora", lambda name: "layers.1" in name and "lora_B" in name, "lora_B.default.weight"),
    ("dora", lambda name: "magnitude" in name, "magnitude_vector"),
    ("lora", lambda name: True, "and 21 more)"),
])  # fmt: skip
def test_missing_tensors_are_named(method, lost, message, base, identity, tmp_path):
    _, tensors = save(add_adapter(base(), method, {}, seed=0), tmp_path)
    rewrite(tmp_path, {name: tensor for name, tensor in tensors.items() if not lost(name)})
    with pytest.raises(UserError) as error:
        load_adapter(base(), identity, tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize("prefix", ["base_model.model._orig_mod.", "module.base_model.model.", ""])
def test_tensors_under_another_prefix_are_named(prefix, base, identity, tmp_path):
    _, tensors = save(add_adapter(base(), "malora", {}, seed=0), tmp_path)
    rewrite(tmp_path, {name.replace("base_model.model.", prefix, 1): tensor for name, tensor in tensors.items()})
    with pytest.raises(UserError, match=r"lacks 48 tensors .* and has 48 that are none of it .*inside any wrapper"):
        load_adapter(base(), identity, tmp_path)


def test_tensors_that_no_adapter_has_are_named(base, identity, tmp_path):
    _, tensors = save(add_adapter(base(), "lora", {}, seed=0), tmp_path)
    rewrite(tmp_path, tensors | {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(8, 32)})
    with pytest.raises(UserError, match=r"has 1 that are none of it \(.*layers\.7"):
        load_adapter(base(), identity, tmp_path)


def test_a_module_that_is_saved_as_a_whole_and_missing_is_named(base, identity, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    _, tensors = save(get_peft_model(base(), config), tmp_path)
    rewrite(tmp_path, {name: tensor for name, tensor in tensors.items() if "lm_head" not in name})
    with pytest.raises(UserError, match=r"lacks base_model.model.lm_head"):
        load_adapter(base(), identity, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("broken", [lambda name: True, lambda name: name.endswith("layers.1.mlp.up_proj.malora_B")])
def test_values_that_are_not_finite_are_refused(value, broken, base, identity, tmp_path):
    _, tensors = save(add_adapter(base(), "malora", {}, seed=0), tmp_path)
    rewrite(tmp_path, {n: torch.full_like(t, value) if broken(n) else t for n, t in tensors.items()})
    with pytest.raises(UserError, match=r"not finite in \d+ of 48 tensors .*malora_"):
        load_adapter(base(), identity, tmp_path)


@pytest.mark.parametrize("content, message", [(b"", "is broken"), (None, "lacks 24 tensors")])
def test_an_empty_file_is_refused(content, message, base, identity, tmp_path):
    save(add_adapter(base(), "lora", {}, seed=0), tmp_path)
    rewrite(tmp_path, {})
    if content is not None:
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_adapter(base(), identity, tmp_path)


@pytest.mark.parametrize("changes", [{"r": 8}, {"target_modules": ["q_proj"]}, {"num_experts": 3}])
def test_a_config_that_does_not_fit_the_tensors_is_refused(changes, base, identity, tmp_path):
    save(add_adapter(base(), "malora", {"r": 4}, seed=0), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(UserError, match=r"does not fit|none of it"):
        load_adapter(base(), identity, tmp_path)


def test_virtual_tokens_are_refused(base, identity, tmp_path):
    model = get_peft_model(base(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(UserError, match="virtual tokens"):
        load_adapter(base(), identity, tmp_path)


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "field, value",
    [
        ("target_modules", "(.*_?)*(.*_?)*q_proj!"),
        ("rank_pattern", {"([a-z_.0-9]+)+!": 4}),
        ("target_modules", "(q_proj"),
        ("exclude_modules", "[" * 2000),
    ],
)
def test_a_regular_expression_cannot_hang(field, value, base, identity, tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "MAX_CPU_SECONDS", 0.2)
    save(add_adapter(base(), "lora", {}, seed=0), tmp_path)
    change_config(tmp_path, **{field: value})
    with pytest.raises(UserError, match=f"{field} of the adapter's config: (matching|'.* is no reg).*simpler"):
        load_adapter(base(), identity, tmp_path)


def test_patterns_of_users_are_fast(base, identity, tmp_path):
    options = {"target_modules": r".*layers\.[01]\..*(q|v)_proj", "rank_pattern": {r"layers\.1\..*": 4}}
    save(add_adapter(base(), "lora", options, seed=0), tmp_path)
    load_adapter(base(), identity, tmp_path)


def test_a_config_reads_no_other_adapters(base, identity, tmp_path):
    save(add_adapter(base(), "lora", {}, seed=0), tmp_path)
    change_config(tmp_path, peft_type="XLORA", hidden_size=32, adapters={"0": "someone/else"})
    with pytest.raises(UserError, match="names other adapters"):
        load_adapter(base(), identity, tmp_path)


def test_a_config_imports_no_module(base, identity, tmp_path):
    save(add_adapter(base(), "lora", {}, seed=0), tmp_path)
    change_config(tmp_path, megatron_config={}, megatron_core="this")
    load_adapter(base(), identity, tmp_path)  # PEFT does not import it without settings
    change_config(tmp_path, megatron_config={"a": 1}, megatron_core="this")
    with pytest.raises(UserError, match="names a module for PEFT to import"):
        load_adapter(base(), identity, tmp_path)


@pytest.mark.parametrize(
    "changes", [{"r": "8"}, {"r": -1}, {"lora_alpha": None}, {"target_modules": {"a": [1]}}, {"use_dora": [[]]},
                {"rank_pattern": [1]}, {"base_model_name_or_path": 7, "bias": 3}, {"peft_type": "XLORA"}]
)  # fmt: skip
def test_a_damaged_config_is_refused(changes, base, identity, tmp_path):
    save(add_adapter(base(), "lora", {}, seed=0), tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(UserError):
        load_adapter(base(), identity, tmp_path)
