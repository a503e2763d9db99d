"""Weighted sums of adapters, compared with the sum of their changes of the output."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from malora import METHODS, MaloraConfig
from tests.malora.test_methods import randomise

ONE_EXPERT = [
    {"down": "A_t"},
    {"down": "P_t S", "d": 8},
    {"down": "A_t", "up": "S_B Q_t", "d": 8},
]  # fmt: skip


def model_of(first: dict, second: dict, targets=(["0"], ["0", "2"])):
    """Return a linear model with adapters "a" and "b", in float64."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 12), nn.Identity(), nn.Linear(12, 10))
    options: dict[str, Any] = {"num_experts": 1, "top_k": 1, "lora_alpha": 3, "lora_dropout": 0.1}
    model = get_peft_model(base, MaloraConfig(**options, target_modules=targets[0], **first), "a")
    model.add_adapter("b", MaloraConfig(**options, target_modules=targets[1], **second))
    return randomise(model.double()).eval()


def merged(model, name: str) -> list[torch.Tensor]:
    """Return the change of each weight by an adapter."""
    layers = [model.base_model.model[i] for i in (0, 2)]
    return [
        layer.get_delta_weight(name) if name in getattr(layer, "settings", {}) else torch.zeros_like(layer.weight)
        for layer in layers
    ]


@pytest.mark.parametrize("first", ONE_EXPERT)
@pytest.mark.parametrize("second", ONE_EXPERT)
@pytest.mark.parametrize("kind, svd_rank", [("cat", None), ("svd", 8)])
def test_cat_and_svd_of_full_rank_are_exact(first, second, kind, svd_rank):
    model = model_of({"r": 2, **first}, {"r": 3, **second})
    model.add_weighted_adapter(["a", "b"], [0.7, -1.5], "sum", kind, **({"svd_rank": svd_rank} if svd_rank else {}))
    for a, b, total in zip(merged(model, "a"), merged(model, "b"), merged(model, "sum"), strict=True):
        torch.testing.assert_close(total, 0.7 * a - 1.5 * b, rtol=1e-9, atol=1e-9)
    assert model.active_adapters == ["a"]
    assert model.peft_config["sum"].r == (5 if kind == "cat" else 8)
    model.set_adapter("sum")
    x = torch.randn(3, 16, dtype=torch.float64)
    y = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), y)


PATTERNS = {"rank_pattern": {"0": 4}, "alpha_pattern": {"2": 5}, "use_rslora": True, "init_weights": False}


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_patterns_of_the_summands_are_not_those_of_the_sum(kind):
    model = model_of({"r": 2, "down": "A_t", **PATTERNS}, {"r": 3, "down": "A_t"}, (["0", "2"], ["0", "2"]))
    model.add_weighted_adapter(["a", "b"], [0.7, -1.5], "sum", kind, **({"svd_rank": 7} if kind == "svd" else {}))
    for a, b, total in zip(merged(model, "a"), merged(model, "b"), merged(model, "sum"), strict=True):
        torch.testing.assert_close(total, 0.7 * a - 1.5 * b, rtol=1e-9, atol=1e-9)


def test_a_sum_has_the_precision_of_its_summands():
    base = nn.Sequential(nn.Linear(16, 8)).to(torch.bfloat16)
    config = METHODS["asylora"](r=4, target_modules=["0"], task_type=None)
    model = randomise(get_peft_model(base, config, "a"))
    model.add_weighted_adapter(["a"], [2.0], "sum")
    layer = model.base_model.model[0]
    assert layer.factors("sum").dtype == torch.float32
    torch.testing.assert_close(layer.get_delta_weight("sum"), 2 * layer.get_delta_weight("a"))


def test_svd_has_the_largest_rank_by_default_and_the_best_approximation():
    model = model_of({"r": 2, "down": "A_t"}, {"r": 3, "down": "A_t"})
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    for a, b, total in zip(merged(model, "a"), merged(model, "b"), merged(model, "sum"), strict=True):
        tail = torch.linalg.svdvals(a + b)[3:]
        torch.testing.assert_close(torch.linalg.norm(a + b - total), tail.norm())


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
@pytest.mark.parametrize("weights", [[0.7, 0.2], [0.7, -0.2]])
def test_sums_are_those_of_pefts_lora(kind, weights):
    ours = model_of({"r": 2, "down": "A_t"}, {"r": 2, "down": "A_t"}, (["0", "2"], ["0", "2"]))
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 12), nn.Identity(), nn.Linear(12, 10)).double()
    options = {"r": 2, "lora_alpha": 3, "target_modules": ["0", "2"]}
    theirs = get_peft_model(base, LoraConfig(**options), "a")
    theirs.add_adapter("b", LoraConfig(**options))
    for i in (0, 2):
        for name in "ab":
            factors = ours.base_model.model[i].factors(name)
            theirs.base_model.model[i].lora_A[name].weight.data = factors.A.data[0].clone()
            theirs.base_model.model[i].lora_B[name].weight.data = factors.B.data[0].T.clone()
    for model in (ours, theirs):
        model.add_weighted_adapter(["a", "b"], weights, "sum", kind)
    for i, change in zip((0, 2), merged(ours, "sum"), strict=True):
        expected = theirs.base_model.model[i].get_delta_weight("sum")
        torch.testing.assert_close(change, expected.to(change.dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("call, message", [
    ((["a", "c"], [1, 1], "sum"), r"adapters \['c'\] do not exist; choose from \['a', 'b'\]"),
    ((["a", "b"], [1, 1], "b"), "there is already an adapter 'b'"),
    ((["a", "b"], [1], "sum"), "2 adapters and 1 weights"),
    (([], [], "sum"), "give at least one adapter"),
    ((["a", "b"], [1, 1], "sum", "ties"), "combination_type='ties' is not supported by malora; choose one of 'cat'"),
    ((["a", "b"], [1, 1], "sum", "linear"), r"sums factors of one rank, not \[2, 3\]"),
    ((["a", "b"], [1, 1], "sum", "cat", 4), "svd_rank=4 has no effect"),
])  # fmt: skip
def test_a_sum_without_a_meaning_is_an_error_and_changes_nothing(call, message):
    model = model_of({"r": 2, "down": "A_t"}, {"r": 3, "down": "A_t"})
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*call)
    assert list(model.peft_config) == ["a", "b"]


@pytest.mark.parametrize("method", ["malora", "molora"])
def test_adapters_with_a_router_cannot_be_summed(method):
    model = get_peft_model(nn.Sequential(nn.Linear(64, 8)), METHODS[method](target_modules=["0"], task_type=None))
    with pytest.raises(ValueError, match="adapter 'default' routes tokens among 8 experts"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
