"""Change the frozen layers of an adapted model for speed, and change them back."""

from __future__ import annotations

from torch import nn

from malora.fused.fp8_linear import convert_unadapted_linears, restore_linear
from malora.fused.group import ProjectionGroup, has_one_layout
from malora.layer import MaloraLayer


def optimize_backbone(model: nn.Module) -> None:
    """Change the frozen layers of a model so that the fused backends run faster.

    Two things change, each only where it can pay:

    - With `backend="fused"` or `"auto"` and dropout, the frozen weights of large projection groups (Q, K, V; Gate, Up)
      are allocated anew with padded columns. The up projections are copied into these columns, and base and up
      projection become one GEMM. Outputs stay the same up to rounding. At the paper's ranks these weights then take
      about 5% more memory.
    - With `backend="fp8"`, the other frozen `nn.Linear` layers of the same parent (attention's output projections)
      become `Float8Linear`. Their outputs are rounded to float8, which changes them by a few percent. The printed
      model shows them.

    Call it once the model is on its device and has its adapters; call it again after adding one. On a CPU nothing runs
    differently. FSDP2 refuses padded columns, so shard a model before. `restore_backbone` undoes it.

    Args:
        model: what `get_peft_model` returned, or any model with adapters of this package.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MaloraLayer)}
    by_parent: dict[str, list[MaloraLayer]] = {}
    for name, layer in layers.items():
        # Else its neighbor is the model's own child, such as a head; or `model` is the layer itself.
        if name and "." in layer.name:
            by_parent.setdefault(name.rpartition(".")[0], []).append(layer)
    for group in dict.fromkeys(layer.group for layer in layers.values()):
        _augment(group)
    for parent, adapted in by_parent.items():
        if any(config.backend == "fp8" for layer in adapted for config in layer.settings.values()):
            convert_unadapted_linears(model.get_submodule(parent), dict.fromkeys(layer.group for layer in adapted))


def restore_backbone(model: nn.Module) -> None:
    """Undo `optimize_backbone`.

    The model then has weights without padded columns, and plain linear layers.
    """
    for module in model.modules():
        restore_linear(module)
        if isinstance(module, MaloraLayer):
            module.group.clear_caches(include_frozen=True)


def _augment(group: ProjectionGroup) -> None:
    """Allocate padded columns for the adapter that trains.

    This is done only if all layers of the group compute it together by the fused path.
    """
    names = {layer.adapter_for_fused_path() for layer in group.layers}
    name = names.pop() if len(names) == 1 else None
    if name is None or not has_one_layout(group.layers, name):
        return
    from malora.fused.augmented_weights import allocate_padding, is_profitable  # needs Triton

    config = group.layers[0].settings[name]
    if config.backend != "fp8" and config.lora_dropout > 0 and is_profitable(group.layers):
        allocate_padding(group.layers, group.cache, group.adapter_on(group.layers, name).layout.H8)
