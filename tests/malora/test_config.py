"""MaloraConfig: choices of layers that PEFT would ignore are errors, and what a saved config says."""

import copy
import dataclasses
import json
import warnings

import pytest
from peft import LoraConfig, PeftConfig

from malora import METHODS, MaloraConfig

PER_EXPERT = {"down": "A_t"}


@pytest.mark.parametrize("options", [
    {"target_modules": ".*q_proj", "layers_to_transform": [1]},
    {"target_modules": ".*q_proj", "layers_to_transform": 0},
    {"target_modules": "all-linear", "layers_to_transform": [1]},
    {"target_modules": ".*q_proj", "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_pattern": "layers"},
    {"layers_pattern": ["layers"]},
])  # fmt: skip
def test_a_choice_of_layers_that_would_be_ignored_is_an_error(options):
    with pytest.raises(ValueError) as pefts:
        LoraConfig(**options)
    with pytest.raises(ValueError) as ours:
        MaloraConfig(**PER_EXPERT, **options)
    assert str(ours.value).startswith(str(pefts.value).strip(" ."))  # then it says what to do


def test_layers_by_index_and_pattern_are_accepted():
    config = MaloraConfig(**PER_EXPERT, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    assert config.layers_to_transform == [1]


def test_a_saved_config_says_what_loading_needs(tmp_path):
    """The note is no option: it is read without a warning, and changes nothing."""
    config = METHODS["malora"]()
    config.save_pretrained(tmp_path)
    assert "import malora" in json.loads((tmp_path / "adapter_config.json").read_text())["requires"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftConfig.from_pretrained(tmp_path)
    loaded.inference_mode = config.inference_mode
    assert loaded == config and loaded.to_dict() == config.to_dict()
    assert dataclasses.replace(config, r=4).r == 4 and copy.deepcopy(config) == config
    assert MaloraConfig(**config.to_dict()) == config


def test_configs_saved_before_the_note_still_load(tmp_path):
    config = METHODS["malora"]()
    config.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "requires"}))
    assert PeftConfig.from_pretrained(tmp_path).r == config.r


@pytest.mark.parametrize("options, message", [
    ({"gating": "sofmax"}, "gating='sofmax' is unknown; choose one of 'softmax', 'uniform'"),
    ({"gating": "uniform"}, "uses all experts, not top_k=2; set top_k=8"),
    ({"gating": "uniform", "top_k": 1, "num_experts": 1}, "no effect with one expert"),
    ({"gating": "uniform", "top_k": 8, "freeze": ["router"]}, r"freeze=\['router'\] has no effect"),
    ({"gating": "uniform", "top_k": 8, "router_aux_loss_coef": 0.1}, "uniform gates, which has no router"),
    ({"gating": "uniform", "top_k": 8, "match_scale": True}, "match_scale=True has no effect"),
    ({"top_k": 8, "renormalize": True}, "renormalize=True has no effect"),
    ({"renormalize": True, "match_scale": True}, "match_scale=True has no effect"),
    ({"renormalize": "yes"}, "must be True or False"),
    ({"mean_gate_sum": 0.3}, "needs match_scale=True"),
    ({"mean_gate_sum": 0, "match_scale": True}, "must be a positive number"),
])  # fmt: skip
def test_gates_that_cannot_be_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        MaloraConfig(**PER_EXPERT, **options)


def test_methods_with_uniform_gates_have_no_balance_loss():
    config = METHODS["molora"](gating="uniform", top_k=8)
    assert (config.router_aux_loss_coef, config.has_router, config.scaling) == (0, False, 2 / 8)


def test_configs_saved_before_other_gates_still_load(tmp_path):
    config = METHODS["malora"]()
    config.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    new = {"gating", "renormalize", "match_scale", "mean_gate_sum"}
    saved = json.loads(file.read_text())
    assert new <= saved.keys()
    file.write_text(json.dumps({k: v for k, v in saved.items() if k not in new}))
    loaded = PeftConfig.from_pretrained(tmp_path)
    loaded.inference_mode = config.inference_mode
    assert loaded == config
