"""Change the frozen layers of an adapted model for speed, and change them back."""

from __future__ import annotations

import logging

from torch import nn

from malora.backbone.classes import change_class, has_part, restore_class
from malora.backbone.parts.residual import ResidualSettings
from malora.fused.availability import has_triton
from malora.fused.fp8_linear import convert_unadapted_linears, restore_linear
from malora.fused.group import ProjectionGroup, has_one_layout
from malora.layer import MaloraLayer

logger = logging.getLogger(__name__)


def optimize_backbone(
    model: nn.Module,
    *,
    rotary: bool = True,
    activation: bool = True,
    norm: bool = True,
    loss: bool = True,
    padding: bool = True,
) -> dict[str, str]:
    """Change the frozen layers of a model so that it trains faster.

    Single modules get a subclass of their class with another `forward`. The printed model shows it. Other models in
    the process are not touched, parameters and their names stay, and outputs stay the same up to rounding. A module is
    changed if it computes what a kernel computes, whatever its class is called.

    Where a kernel cannot run, a changed module runs its own code: on a CPU, in float64, if its weight is trained, and
    inside `torch.compile`, which fuses these operations itself.

    Call it once the model is on its device and has its adapters; call it again after adding one. That changes what
    was not changed yet. `restore_backbone` undoes it.

    With `backend="fp8"`, the frozen `nn.Linear` layers without an adapter that have an adapted one in the same parent
    (attention's output projections) also become `Float8Linear`. This changes their outputs by a few percent.

    Args:
        model: What `get_peft_model` returned, or a base model, with or without adapters of this package.
        rotary: One kernel for the rotary embedding of queries and keys.
        activation: One kernel for SwiGLU, or for GeGLU with GELU by tanh.
        norm: One kernel for RMSNorm, and in layers that norm before their sublayers, for a residual sum with the norm
            that reads it.
        loss: Compute the loss in chunks of the positions that have a label, while the output head is frozen. In
            training, outputs for labels then have `logits=None`.
        padding: With `backend="fused"` or `"auto"` and dropout, allocate the frozen weights of large projection groups
            (Q, K, V; Gate, Up) anew with padded columns, into which the up projections are copied. Base and up
            projection become one GEMM. At the paper's ranks these weights then take about 5% more memory. FSDP2
            refuses padded columns, so shard a model before.

    Returns:
        What happened, by part: "rotary", "activation", "norm", "residual" (sums together with norms), "loss" and
        "padding". A value is the number of modules, or "none" and the reason.
    """
    wanted = {"rotary": rotary, "activation": activation, "norm": norm, "residual": norm, "loss": loss}
    report = {
        part: _change_classes(model, part) if is_wanted else "none: not asked for" for part, is_wanted in wanted.items()
    }
    _link_norms(model)
    report["padding"] = _allocate_padding(model) if padding else "none: not asked for"
    _convert_to_float8(model)
    logger.info("optimize_backbone: %s", "; ".join(f"{part}: {found}" for part, found in report.items()))
    return report


def restore_backbone(model: nn.Module) -> None:
    """Undo `optimize_backbone`.

    The modules then have their own classes, weights have no padded columns, and linear layers are plain.
    """
    for module in model.modules():
        restore_class(module)
        restore_linear(module)
        if isinstance(module, MaloraLayer):
            module.group.clear_caches(include_frozen=True)


_WHAT = {
    "rotary": "attention that rotates queries and keys by halves",
    "activation": "gated MLP with SiLU or GELU by tanh",
    "norm": "RMSNorm",
    "residual": "decoder layer that norms before its sublayers and adds their outputs as they are",
    "loss": "causal language model whose logits come from a head alone",
}


def _change_classes(model: nn.Module, part: str) -> str:
    """Change all modules of a part and describe the result."""
    if part != "loss" and not has_triton():
        return "none: Triton is not installed"
    count = sum(change_class(module, part) for module in model.modules())
    return (
        f"{count} module{'s' if count > 1 else ''}"
        if count
        else f"none: no {_WHAT[part]} was found, or its `forward` was replaced"
    )


def _link_norms(model: nn.Module) -> None:
    """Tell each decoder layer which norm reads its output."""
    for owner in model.modules():
        for layers in owner.children():
            if isinstance(layers, nn.ModuleList) and any(has_part(layer) == "residual" for layer in layers):
                norms = [getattr(layer, "input_layernorm", None) for layer in layers[1:]]
                for layer, norm in zip(layers, [*norms, getattr(owner, "norm", None)], strict=True):
                    if isinstance(settings := getattr(layer, "malora_settings", None), ResidualSettings):
                        settings.next_norm = norm


def _allocate_padding(model: nn.Module) -> str:
    groups = dict.fromkeys(module.group for module in model.modules() if isinstance(module, MaloraLayer))
    count = sum(_augment(group) for group in groups)
    return f"{count} group{'s' if count > 1 else ''}" if count else "none: no group of adapted layers that would gain"


def _convert_to_float8(model: nn.Module) -> None:
    """Convert the linear layers next to adapted ones that run in float8."""
    by_parent: dict[str, list[MaloraLayer]] = {}
    for name, layer in model.named_modules():
        # Else its neighbor is the model's own child, such as a head; or `model` is the layer itself.
        if isinstance(layer, MaloraLayer) and name and "." in layer.name:
            by_parent.setdefault(name.rpartition(".")[0], []).append(layer)
    for parent, adapted in by_parent.items():
        if any(config.backend == "fp8" for layer in adapted for config in layer.settings.values()):
            convert_unadapted_linears(model.get_submodule(parent), dict.fromkeys(layer.group for layer in adapted))


def _augment(group: ProjectionGroup) -> bool:
    """Allocate padded columns for the adapter that trains, and return whether they are there now.

    This is done only if all layers of the group compute it together by the fused path.
    """
    names = {layer.adapter_for_fused_path() for layer in group.layers}
    name = names.pop() if len(names) == 1 else None
    if name is None or not has_one_layout(group.layers, name):
        return False
    from malora.fused.augmented_weights import allocate_padding, is_profitable  # needs Triton

    config = group.layers[0].settings[name]
    if config.backend == "fp8" or config.lora_dropout == 0 or not is_profitable(group.layers):
        return False
    return allocate_padding(group.layers, group.cache, group.adapter_on(group.layers, name).layout.H8)
