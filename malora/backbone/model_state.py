"""Decide whether a model's training pass can be captured, and whether a captured pass still describes it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from malora.backbone.checkpointed_layer import CheckpointedLayer
from malora.backends import BACKENDS


def can_capture(model: nn.Module) -> bool:
    """Return whether a pass of the model can be captured.

    It can if the model is on a GPU and its backends never wait for a result.
    """
    return _why_no_pass(model) is None


def why_not_captured(model: nn.Module) -> str | None:
    """Return why a training pass of the model cannot be captured as a CUDA graph; None if it may be tried.

    The reason completes the sentence "It cannot, because ...".
    """
    if isinstance(model, DataParallel | DistributedDataParallel):
        return f"{type(model).__name__} averages gradients in hooks, which do not run in a replay"
    if reason := _why_no_pass(model):
        return reason
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):
            return f"{name} is sharded, and is gathered by hooks, which do not run in a replay"
        if parameter.requires_grad and (parameter._backward_hooks or parameter._post_accumulate_grad_hooks):
            return f"{name} has a hook on its gradient, which does not run in a replay"
    for name, module in model.named_modules():
        if _reads_random_state(module):
            return (
                f"the gradient checkpointing of {name or 'the model'} reads the state of the random number generator; "
                "malora.set_checkpointing avoids it, unless the base model itself has dropout"
            )
    return None


def _why_no_pass(model: nn.Module) -> str | None:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        return f"the model's parameters are on {len(devices)} devices, and a graph belongs to one"
    if (device := devices.pop()).type != "cuda":
        return f"the model is on the device {device.type!r}, and CUDA graphs need a GPU"
    if device.index != torch.cuda.current_device():
        return f"the model is not on the current device; call torch.cuda.set_device({device.index})"
    for config in getattr(model, "peft_config", {}).values():
        backend = getattr(config, "backend", None)
        if backend is not None and not BACKENDS[backend].graph_safe:
            return f"backend={backend!r} waits for the GPU in every pass; choose backend='auto'"
    return None


def _reads_random_state(module: nn.Module) -> bool:
    """Return whether a module of transformers runs its layers under a checkpoint that keeps the random state.

    A model whose layers checkpoint themselves has the switch and the function too, and does not use them.
    """
    function: Any = getattr(module, "_gradient_checkpointing_func", None)
    if not getattr(module, "gradient_checkpointing", False) or function is None:
        return False
    inner = (part for part in module.modules() if part is not module)
    if any(isinstance(part, GradientCheckpointingLayer) for part in inner):
        return False
    if isinstance(function, CheckpointedLayer):
        return function.has_other_dropout()
    options: dict[str, Any] = {}
    while isinstance(function, partial):
        options = function.keywords | options
        function = function.func
    return function is checkpoint and bool(options.get("preserve_rng_state", True))


class ModelState:
    """Compares a model with what it was when passes of it were captured.

    Args:
        model: The model as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._children = [module._modules for module in self._modules]
        self._parameters = [module._parameters for module in self._modules if module._parameters]
        self._buffers = [module._buffers for module in self._modules if module._buffers]
        self._tuners = [module for module in self._modules if isinstance(module, BaseTunerLayer)]
        self._before = self._read()

    def has_changed(self) -> bool:
        """Return whether a graph that was captured then would compute something else than the model now.

        It compares the modules and their mode, the parameters and buffers with their addresses, which parameters train,
        and which adapters are active.
        """
        return self._read() != self._before

    def _read(self) -> list[Any]:
        # Modules that were removed or added show in their parent. The lists make this fast: it runs in every step.
        parameters = [p for owned in self._parameters for p in owned.values() if p is not None]
        return [
            [id(child) for children in self._children for child in children.values()],
            [module.training for module in self._modules],
            [id(p) for p in parameters],
            [p.data_ptr() for p in parameters],
            [p.requires_grad for p in parameters],
            [buffer.data_ptr() for owned in self._buffers for buffer in owned.values() if buffer is not None],
            [(*t.active_adapters, t.disable_adapters, *t.merged_adapters) for t in self._tuners],
        ]
