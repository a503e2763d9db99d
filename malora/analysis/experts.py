"""The experts of a model's adapter as plain tensors, MALoRA's and PEFT's LoRA alike, for whoever looks into them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from malora.factors import Factors
from malora.layer import PREFIX, MaloraLayer

Experts = dict[str, Factors]  # by their module's name in the base model


def experts(model: nn.Module | Experts, adapter: str = "default") -> Experts:
    """Copies of an adapter's factors in float64 on the CPU. What this or `saved_experts` gave is given back as it is.

    A module with PEFT's LoRA has one expert, A [1, r, n] and B [1, r, m]; DoRA's magnitude is left out.

    Raises:
        ValueError: no module has such an adapter, or a value is not finite.
    """
    if isinstance(model, dict):
        return model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found, there = {}, set()
    for name, layer in base.named_modules():
        if isinstance(layer, MaloraLayer | LoraLayer):
            adapters = layer.settings if isinstance(layer, MaloraLayer) else layer.lora_A
            there.update(adapters)
            if adapter in adapters:
                found[name] = _float64(_factors(layer, adapter), name)
    if not found:
        known = sorted(there) or "none; make one with get_peft_model"
        raise ValueError(f"this {type(base).__name__} has no experts of an adapter {adapter!r}; it has {known}.")
    return found


def saved_experts(folder: Path) -> Experts:
    """The same of a routed adapter that `save_pretrained` wrote, without its base model.

    Raises:
        ValueError: the folder has no adapter of this package, or a value is not finite.
    """
    path = Path(folder) / "adapter_model.safetensors"
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items() if path.is_file() else ():
        module, _, factor = key.removeprefix("base_model.model.").rpartition(f".{PREFIX}")
        if factor in Factors._fields:
            found.setdefault(module, {})[factor] = tensor
    if not found:
        raise ValueError(f"{folder} has no adapter of malora; give a folder that save_pretrained wrote.")
    absent = dict.fromkeys(Factors._fields)
    return {module: _float64(Factors(**absent | tensors), module) for module, tensors in found.items()}


def paired_experts(
    model: nn.Module | Experts, other: nn.Module | Experts, adapter: str
) -> Iterator[tuple[str, Factors, Factors]]:
    """Module by module, the experts of the adapter of this name in both models.

    Raises:
        ValueError: as `experts`, or the models adapt different modules or sizes.
    """
    ones = experts(model, adapter)
    others = ones if other is model else experts(other, adapter)
    if differing := sorted(ones.keys() ^ others.keys()):
        raise ValueError(f"the two models adapt different modules; only one has {differing[:3]}. Adapt the same ones.")
    for name, factors in ones.items():
        sizes = [_size(factors), _size(others[name])]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{name} maps {sizes[0]} in one model and {sizes[1]} in the other; use the same base.")
        yield name, factors, others[name]


def sides(factors: Factors) -> Iterator[tuple[str, Tensor, int | None]]:
    """Sides "A" and "B": the experts [N, r, ·] multiplied out, and the rank of the subspace that they share, if any."""
    yield "A", factors.down(), len(factors.S) if factors.S is not None and factors.S.dim() == 2 else None
    yield "B", factors.up(), len(factors.S_B) if factors.S_B is not None else None


def _factors(layer: MaloraLayer | LoraLayer, adapter: str) -> Factors:
    if isinstance(layer, MaloraLayer):
        return layer.factors(adapter)
    A, B = layer.lora_A[adapter].weight.flatten(1), layer.lora_B[adapter].weight.flatten(1)
    return Factors(A=A[None], P=None, S=None, B=B.T[None], Q=None, S_B=None)


def _float64(factors: Factors, name: str) -> Factors:
    # A copy even of what is float64 already: the model may train on.
    wide = Factors(*(f if f is None else f.detach().to("cpu", torch.float64, copy=True) for f in factors))
    if not all(f is None or f.isfinite().all() for f in wide):
        raise ValueError(f"the adapter has values that are not finite in {name}: its training diverged.")
    return wide


def _size(factors: Factors) -> str:
    down = factors.S if factors.A is None else factors.A
    up = factors.S_B if factors.B is None else factors.B
    return f"{down.shape[-1]} to {up.shape[-1]}"
