"""Experts of models and folders, and models that do not have the same ones."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from malora.analysis import extract_experts, load_experts, similarities, spectra
from tests.conftest import make_model
from tests.malora.analysis.helpers import adapted


def test_saved_experts_are_those_of_the_model(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    saved = load_experts(tmp_path)
    for module, factors in extract_experts(model).items():
        for ours, theirs in zip(factors, saved.pop(module), strict=True):
            assert ours is theirs is None or (torch.equal(ours, theirs) and ours.dtype == torch.float64)
    assert not saved
    with pytest.raises(ValueError, match="nowhere has no adapter of malora"):
        load_experts(tmp_path / "nowhere")


def test_a_missing_adapter_is_an_error():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts of an adapter 'default'; it has none; make"):
        similarities(make_model())
    with pytest.raises(ValueError, match=r"adapter 'second'; it has \['default'\]"):
        spectra(adapted(), "second")


def test_models_that_differ_are_an_error():
    with pytest.raises(ValueError, match=r"only one has \['model.layers.0.mlp.up_proj'"):
        similarities(adapted(), adapted(targets=["q_proj"]))
    wider = make_model("qwen2")
    wider.model.layers[0].self_attn.q_proj = torch.nn.Linear(64, 80)
    wider = get_peft_model(wider, LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="q_proj maps 64 to 64 in one model and 64 to 80 in the other"):
        similarities(adapted(targets=["q_proj"]), wider)


def test_values_that_are_not_finite_are_an_error():
    model = adapted()
    next(p for n, p in model.named_parameters() if "malora_S" in n).data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"not finite in model\.layers\.0\.self_attn\.q_proj: its training"):
        spectra(model)
