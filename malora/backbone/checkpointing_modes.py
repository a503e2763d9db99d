"""Modes of gradient checkpointing: less memory for activations, at the least cost."""

from __future__ import annotations

from collections import defaultdict
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from malora.backbone.checkpointed_layer import CheckpointedLayer, Offload
from malora.backbone.lean_mode import LeanMode

MODES = ("none", "full", "offload", "lean")

# The share of the layers that PCIe 5 (50 GB/s) can carry to the host while a 7B model computes them on an H200: its
# forward pass over 4,096 tokens takes 70 ms and saves 12.2 GB in "lean" mode, of which 3.5 GB leave in this time.
DEFAULT_OFFLOAD_FRACTION = 0.25

# Attributes that transformers' layers read.
_SWITCH, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"


def set_checkpointing(model: nn.Module, mode: str, *, offload_fraction: float | None = None) -> None:
    """Choose how a model saves memory for activations in training.

    | mode | kept per decoder layer | recomputed |
    | --- | --- | --- |
    | "none" | all activations | nothing |
    | "lean" | inputs of the operations that cannot be repeated cheaply | norms and activation functions, no GEMM |
    | "full" | the input | the layer |
    | "offload" | nothing; the input is in pinned host memory | the layer |

    Copies to host memory run while the device computes, and the host waits for nothing. So a step can be captured as
    CUDA graphs. The choice replaces `gradient_checkpointing_enable`; do not use both. It holds until the next call.
    Capture graphs anew after a call, because "none" frees the pinned memory. Call it again after adding an adapter.

    "full" and "offload" take effect in training mode, and "lean" in every pass with gradients. "lean" knows what the
    kernels of `optimize_backbone` compute. Of other norms and activation functions it keeps everything.

    `torch.compile` of a whole model cannot trace this, as the compiler has its own rules of what to recompute: "full"
    and "offload" are torch's checkpointing there, and "lean" has no effect.

    Args:
        model: What `get_peft_model` returned, or a base model of transformers.
        mode: See above.
        offload_fraction: In "lean" mode, the share of the layers, 0 to 1, whose saved activations wait in pinned host
            memory for the backward pass. A larger share takes less memory. A share of which the copies take longer than
            the forward pass makes the device wait. 0.25 by default.

    Raises:
        ValueError: the mode is unknown, the model has no layers that can be checkpointed, or `offload_fraction` is not
            in its range or given for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(map(repr, MODES))}.")
    if offload_fraction is not None and (mode != "lean" or not 0 <= offload_fraction <= 1):
        raise ValueError(
            f"offload_fraction={offload_fraction} with mode {mode!r}: it is a number from 0 to 1, for mode 'lean' only."
        )
    base = _base_model(model)
    stacks = _layer_stacks(base)
    layers = [layer for stack in stacks for layer in stack]
    if mode != "none" and (not layers or not getattr(base, "supports_gradient_checkpointing", True)):
        raise ValueError(
            f"{type(base).__name__} has no layers that can be checkpointed: set_checkpointing needs a model of "
            "transformers with GradientCheckpointingLayer modules. Checkpoint parts of it with torch.utils.checkpoint."
        )
    _switch_off(base)
    if mode == "lean":
        fraction = DEFAULT_OFFLOAD_FRACTION if offload_fraction is None else offload_fraction
        LeanMode(base, layers, round(fraction * len(layers)))
    elif mode != "none":
        _checkpoint_layers(base, stacks, Offload() if mode == "offload" else None)


def checkpointing_mode(model: nn.Module) -> str:
    """Return the mode that `set_checkpointing` chose for a model."""
    base = _base_model(model)
    if LeanMode.of(base) is not None:
        return "lean"
    functions = (vars(m).get(_FUNCTION) for m in base.modules() if getattr(m, _SWITCH, False))
    return next((found.mode for found in functions if isinstance(found, CheckpointedLayer)), "none")


def _base_model(model: nn.Module) -> nn.Module:
    """Return the outermost model of transformers, or the model itself."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


def _layer_stacks(base: nn.Module) -> list[list[nn.Module]]:
    """Return the layers of each stack, such as an encoder's and a decoder's."""
    stacks: defaultdict[str, list[nn.Module]] = defaultdict(list)
    for name, module in base.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            stacks[name.rpartition(".")[0]].append(module)
    return list(stacks.values())


def _checkpoint_layers(base: nn.Module, stacks: list[list[nn.Module]], offload: Offload | None) -> None:
    for module in base.modules():
        if hasattr(module, _SWITCH):  # also a model, which then makes no cache
            setattr(module, _SWITCH, True)
            setattr(module, _FUNCTION, partial(checkpoint, use_reentrant=False))
    for stack in stacks:
        for place, layer in enumerate(stack):
            setattr(layer, _FUNCTION, CheckpointedLayer(layer, place, layer is stack[-1], offload))


def _switch_off(base: nn.Module) -> None:
    """Undo what `set_checkpointing` or transformers' `gradient_checkpointing_enable` has done."""
    lean = LeanMode.of(base)
    if lean is not None:
        lean.remove()
    for module in base.modules():
        if hasattr(module, _SWITCH):
            setattr(module, _SWITCH, False)
            function = vars(module).pop(_FUNCTION, None)
            if isinstance(function, CheckpointedLayer) and function.offload is not None:
                function.offload.memory.clear()
