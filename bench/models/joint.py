"""Several adapters of one base model that train at once.

Each run's adapter is made as for a run alone, and its tensors are then copied into one model with all adapters. So it
starts with the same values. PEFT's LoRA is one expert without a router, y = W x + s B A x, and trains as that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import PreTrainedModel

import malora
from bench.models.adapters import add_adapter

# By layer and kind: "router", "A", "P", ... as in `malora.layer.MaloraLayer`.
AdapterTensors = dict[str, dict[str, Tensor]]

ALONE = "default"  # PEFT's name of the only adapter of a model

# Fields that PEFT's LoRA and one expert have in common. With any other change LoRA is another method.
_SHARED_OPTIONS = ("r", "lora_alpha", "lora_dropout", "target_modules", "task_type", "use_rslora")


@dataclass(frozen=True)
class Member:
    """An adapter to make.

    Attributes:
        name: Its name in the joint model.
        method: A name in `malora.METHODS`.
        options: Options that override the method's own.
        seed: Seed of its initialization.
    """

    name: str
    method: str
    options: dict[str, Any]
    seed: int


def can_join(method: str, options: dict[str, Any]) -> bool:
    """Return whether a method can train in a model with others and gives what it gives alone."""
    config = _joint_config(malora.make_config(method, **options))
    # In mixed batches no layer runs in float8.
    return config is not None and config.backend != "fp8" and config.bias == "none" and not config.modules_to_save


def _joint_config(config: LoraConfig | malora.MaloraConfig) -> malora.MaloraConfig | None:
    """Return the config in the joint model, or None if there is none."""
    if isinstance(config, malora.MaloraConfig):
        return None if config.trainable_token_indices else config
    plain = LoraConfig(**{name: getattr(config, name) for name in _SHARED_OPTIONS})
    if any(getattr(config, field.name) != getattr(plain, field.name) for field in fields(config)):
        return None
    options = {name: getattr(config, name) for name in _SHARED_OPTIONS}
    return malora.MaloraConfig(num_experts=1, top_k=1, down="A_t", **options)


def join_adapters(base: PreTrainedModel, members: Sequence[Member]) -> PeftModel:
    """Return the base model with all adapters, all of which train.

    Args:
        base: The base model.
        members: The adapters; each can be joined, see `can_join`.

    Raises:
        UserError: A method does not fit the base model.
    """
    tensors = []
    for member in members:
        alone = add_adapter(base, member.method, member.options, member.seed)
        tensors.append(read_tensors(alone))
        _tuner(alone).unload()
        vars(base).pop("peft_config", None)  # PEFT leaves it, and would warn of it in the next round
    joint: PeftModel | None = None
    for member in members:
        config = _joint_config(malora.make_config(member.method, **member.options))
        assert config is not None, "members can be joined"
        if joint is None:
            joint = get_peft_model(base, config, adapter_name=member.name)
        else:
            joint.add_adapter(member.name, config)
    assert joint is not None, "there is a member"
    for member, values in zip(members, tensors, strict=True):
        write_tensors(joint, values, member.name)
    _tuner(joint).set_adapter([member.name for member in members])
    return joint


def _tuner(model: PeftModel) -> BaseTuner:
    return cast("BaseTuner", model.base_model)


def read_tensors(model: PeftModel, adapter: str = ALONE) -> AdapterTensors:
    """Copy the tensors of an adapter."""
    found = {layer: _tensors_of(module, adapter) for layer, module in model.get_base_model().named_modules()}
    return {
        layer: {kind: t.detach().clone() for kind, t in tensors.items()} for layer, tensors in found.items() if tensors
    }


@torch.no_grad()
def write_tensors(model: PeftModel, tensors: AdapterTensors, adapter: str = ALONE) -> None:
    """Overwrite the tensors of an adapter."""
    for layer, module in model.get_base_model().named_modules():
        for kind, tensor in _tensors_of(module, adapter).items():
            tensor.copy_(tensors[layer][kind])


def _tensors_of(layer: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter in a layer, as they are or as views."""
    if isinstance(layer, malora.MaloraLayer) and adapter in layer.settings:
        found = {"router": layer.router(adapter), **layer.factors(adapter)._asdict()}
        return {kind: tensor for kind, tensor in found.items() if tensor is not None}
    if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
        A, B = (module.get_submodule(adapter).get_parameter("weight") for module in (layer.lora_A, layer.lora_B))
        return {"A": A[None], "B": B.T[None]}  # as one expert
    return {}
