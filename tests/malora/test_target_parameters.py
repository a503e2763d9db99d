"""What `target_parameters` refuses, and what the errors say."""

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from malora import METHODS
from tests.malora.test_parameter_layer import PARAMETERS, adapted, base, config


@pytest.mark.parametrize("method", ["malora", "molora", "moasylora"])
def test_a_method_with_a_router_says_why_it_has_no_parameters(method):
    with pytest.raises(ValueError, match=r"needs one expert.*depends on the token.*target_modules"):
        METHODS[method](target_parameters=PARAMETERS, lora_dropout=0.0)
    assert METHODS[method](target_parameters=[]).has_router


def test_dropout_is_refused_as_in_pefts_lora():
    with pytest.raises(ValueError, match=r"does not work with lora_dropout != 0"):
        get_peft_model(base(), LoraConfig(target_parameters=PARAMETERS, target_modules=[], lora_dropout=0.1))
    with pytest.raises(ValueError, match=r"does not work with lora_dropout=0\.05.*Set lora_dropout=0"):
        METHODS["asylora"](target_parameters=PARAMETERS)
    METHODS["asylora"](target_parameters=PARAMETERS, lora_dropout=0.0)


@pytest.mark.parametrize("options, error, message", [
    ({"target_parameters": ".*down_proj"}, TypeError, "must be a list of strings or None"),
    ({"layers_to_transform": [0]}, ValueError, r"has no effect on target_parameters.*'0\.mlp\.experts\.gate_up_proj'"),
])  # fmt: skip
def test_options_that_parameters_do_not_have_are_errors(options, error, message):
    with pytest.raises(error, match=message):
        config(**options)


class Odd(nn.Module):
    """Parameters that cannot be adapted, in a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(4))
        self.matrix = nn.Parameter(torch.zeros(4, 4))
        self.integers = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
        self.computed = nn.Parameter(torch.zeros(4, 4))
        nn.utils.parametrizations.orthogonal(self, "computed")


@pytest.mark.parametrize("target, message", [
    ("missing", r"'missing' matches no parameter of this ModuleDict.*'odd\.matrix'"),
    ("ector", r"'ector' matches no parameter"),
    ("odd.vector", r"odd\.vector has dtype torch\.float32 and shape \(4,\)"),
    ("integers", r"odd\.integers has dtype torch\.uint8"),
    ("odd.computed", r"odd\.computed is computed from another tensor"),
])  # fmt: skip
def test_parameters_that_cannot_be_adapted_are_errors_and_change_nothing(target, message):
    model = nn.ModuleDict({"odd": Odd()})
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(target_modules=[], target_parameters=["odd.matrix", target]))
    assert type(model["odd"]).__name__.endswith("Odd")  # a parametrization changes the class


def test_a_weighted_sum_of_adapters_on_parameters_is_refused():
    with pytest.raises(ValueError, match=r"does not support targeting nn\.Parameter: adapter 'default'"):
        adapted().add_weighted_adapter(["default"], [0.5], "sum")


def test_adapter_names_are_refused(ids):
    with pytest.raises(ValueError, match="adapter_names"):
        adapted()(ids, adapter_names=["default", "__base__"])


def test_an_offloaded_weight_is_an_error(ids):
    ours = accelerate.cpu_offload(adapted())
    with pytest.raises(ValueError, match=r"mlp\.experts\.\w+_proj is offloaded"):
        ours(ids)
