"""Adapter parameters counted from sizes, against those of built models."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

import malora
from bench.models.backbone import SHAPES, backbone, count_adapter_parameters


def count_built(shape, config, layers=None):
    """Return the trainable parameters of a built model, with and without routers."""
    device = torch.device("meta")
    model = backbone(SHAPES[shape], layers, device)
    with device:
        model = get_peft_model(model, config)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if "router" not in name)


@pytest.mark.parametrize("method", malora.METHODS)
def test_counts_are_those_of_a_built_model(method):
    with_routers, without = count_built("toy", malora.METHODS[method]())
    config = malora.METHODS[method]()
    assert count_adapter_parameters(SHAPES["toy"], config) == with_routers
    assert count_adapter_parameters(SHAPES["toy"], config, routers=False) == without


@pytest.mark.parametrize("method", ["dora", "malora"])
def test_counts_with_grouped_query_heads(method):
    shape = SHAPES["smollm2-135m"]
    layers = shape.config["num_hidden_layers"]
    with_routers, without = count_built("smollm2-135m", malora.METHODS[method](), layers=1)
    config = malora.METHODS[method]()
    assert count_adapter_parameters(shape, config) == layers * with_routers
    assert count_adapter_parameters(shape, config, routers=False) == layers * without


def test_counts_of_some_targets_and_of_frozen_routers():
    options = {"target_modules": ["k_proj", "down_proj"], "freeze": ["P", "router"]}
    with_routers, _ = count_built("toy", malora.METHODS["malora"](**options))
    assert count_adapter_parameters(SHAPES["toy"], malora.METHODS["malora"](**options)) == with_routers


@pytest.mark.parametrize("config, message", [
    (LoraConfig(target_modules=["o_proj"]), r"target_modules=\{'o_proj'\} cannot be counted; choose from q_proj"),
    (LoraConfig(target_modules="all-linear"), "target_modules='all-linear' cannot be counted"),
    (malora.METHODS["malora"](layers_to_transform=[0]), r"layers_to_transform=\[0\] cannot be counted"),
    (IA3Config(target_modules=["k_proj"]), "a IA3Config cannot be counted"),
])  # fmt: skip
def test_what_cannot_be_counted_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        count_adapter_parameters(SHAPES["toy"], config)
