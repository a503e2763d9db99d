"""The analysis of adapters whose statistics are known beforehand."""

import math

import pytest
import torch

from bench.evaluate.adapter_analysis import analyze_adapter
from bench.models import tiny
from bench.models.adapters import add_adapter
from bench.models.base import load, prepare
from malora.analysis import extract_experts, load_experts

PROMPTS = ["which is second ? red blue green", "ann saw the lamp near the barn ."]


@pytest.fixture
def model(base_folder):
    model, _ = load(prepare(str(base_folder)), torch.device("cpu"))
    return with_up_projections(add_adapter(model, "malora", {"r": 3, "lora_alpha": 6, "d": 8}, seed=0))


def with_up_projections(model):
    """Fill the up projections, which are zero before training."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "malora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(1))
    return model


def test_a_model_compared_with_itself(model, tmp_path):
    """Check that nothing moved and that each expert equals its own copy.

    Tasks with the same prompts have the same routing.
    """
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    peers = {"ST(S)": tmp_path, "ST(D)": tmp_path / "nowhere"}
    found = analyze_adapter(model, tiny.tokenizer(), extract_experts(model), {"a": PROMPTS, "b": PROMPTS}, peers)
    assert found["movement"]["factor"] == "S" and found["movement"]["relative"] == [0, 0]
    assert found["movement"]["angle"] == pytest.approx(0, abs=1e-5)
    routing = found["routing"]
    assert (
        routing["task_information"] == pytest.approx([0, 0], abs=1e-9)
        and routing["unused"]["a"] == routing["unused"]["b"]
    )
    for load_of_layer in routing["load"]:
        assert sum(load_of_layer) == pytest.approx(1) and load_of_layer == sorted(load_of_layer, reverse=True)
    assert "ST(D)" not in found["similarity"]
    within, other = (found["similarity"][name]["mean"]["B"][0] for name in ("within", "ST(S)"))
    assert other == pytest.approx((8 * 1 + 56 * within) / 64, rel=1e-6)  # in 8 of 8 × 8 pairs an expert meets itself


def test_routing_that_depends_on_the_task(model):
    """Check that a router that separates two tasks has log 2 nats of information.

    It sends the tokens of the two tasks to different experts.
    """
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings.zero_()
        embeddings[:, 0], embeddings[:, 1] = 1.0, -1.0
        blue = tiny.tokenizer().convert_tokens_to_ids("blue")
        embeddings[blue, 0], embeddings[blue, 1] = -1.0, 1.0
        for name, p in model.named_parameters():
            if "malora_router" in name:
                p.zero_()
                if "layers.0.self_attn" in name:
                    p[:2, 0], p[2:4, 1] = 5.0, 5.0
    found = analyze_adapter(model, tiny.tokenizer(), extract_experts(model), {"a": ["red red"], "b": ["blue blue"]}, {})
    # Three of the first layer's six routers read the embeddings. Equal logits choose the first two experts.
    assert found["routing"]["task_information"] == pytest.approx([math.log(2) / 2, 0], abs=1e-4)
    assert found["routing"]["unused"]["a"] == [6, 6]


def test_a_saved_adapter_has_the_models_experts(model, tmp_path):
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    now, saved = extract_experts(model), load_experts(tmp_path)
    assert now.keys() == saved.keys()
    for module, factors in now.items():
        for one, other in zip(factors, saved[module], strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
    with pytest.raises(ValueError, match="has no adapter of malora"):
        load_experts(tmp_path / "nowhere")
