"""Experts of an adapter as plain tensors.

The adapters are those of this package and PEFT's LoRA.

Shapes are those of `malora.factors`: n inputs, m outputs, N experts, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from malora.adapter_layer import PREFIX, AdapterLayer
from malora.factors import Factors

Experts = dict[str, Factors]
"""Factors of an adapter by module name in the base model, float64 on the CPU."""


def extract_experts(model: nn.Module | Experts, adapter: str = "default") -> Experts:
    """Copy the factors of an adapter to the CPU in float64.

    A module with PEFT's LoRA has one expert, A [1, r, n] and B [1, r, m]. The magnitude of DoRA is left out. Experts
    that were extracted before are returned unchanged.

    Raises:
        ValueError: No module has such an adapter, or a value is not finite.
    """
    if isinstance(model, dict):
        return model
    get_base_model = getattr(model, "get_base_model", None)
    base: nn.Module = model if get_base_model is None else get_base_model()
    found: Experts = {}
    names: set[str] = set()
    for module, layer in base.named_modules():
        if isinstance(layer, AdapterLayer | LoraLayer):
            adapters = layer.settings if isinstance(layer, AdapterLayer) else layer.lora_A
            names.update(adapters)
            if adapter in adapters:
                found[module] = _to_float64(_factors(layer, adapter), module)
    if not found:
        known = sorted(names) or "none; make one with get_peft_model"
        raise ValueError(f"this {type(base).__name__} has no experts of an adapter {adapter!r}; it has {known}.")
    return found


def load_experts(folder: Path) -> Experts:
    """Read the experts from a folder that `save_pretrained` wrote.

    The base model is not needed.

    Raises:
        ValueError: The folder has no adapter of this package, or a value is not finite.
    """
    path = Path(folder) / "adapter_model.safetensors"
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items() if path.is_file() else ():
        module, _, factor = key.removeprefix("base_model.model.").rpartition(f".{PREFIX}")
        if factor in Factors._fields:
            tensors.setdefault(module, {})[factor] = tensor
    if not tensors:
        raise ValueError(f"{folder} has no adapter of malora; give a folder that save_pretrained wrote.")
    absent: dict[str, Tensor | None] = dict.fromkeys(Factors._fields)
    return {module: _to_float64(Factors(**absent | by_name), module) for module, by_name in tensors.items()}


def paired_experts(
    model: nn.Module | Experts, other: nn.Module | Experts, adapter: str
) -> Iterator[tuple[str, Factors, Factors]]:
    """Yield each module's name and its experts in both models.

    Raises:
        ValueError: As in `extract_experts`, or the models adapt different modules or modules of different sizes.
    """
    ours = extract_experts(model, adapter)
    others = ours if other is model else extract_experts(other, adapter)
    if differing := sorted(ours.keys() ^ others.keys()):
        raise ValueError(f"the two models adapt different modules; only one has {differing[:3]}. Adapt the same ones.")
    for module, factors in ours.items():
        sizes = [_size(factors), _size(others[module])]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{module} maps {sizes[0]} in one model and {sizes[1]} in the other; use the same base.")
        yield module, factors, others[module]


def projections(factors: Factors) -> Iterator[tuple[str, Tensor, int | None]]:
    """Yield the down projections and the transposed up projections, without scaling.

    The down projections are named "A", the transposed up projections "B".

    Each comes as its name, the matrices of all experts, [N, r, n] or [N, r, m], and the rank of the subspace that the
    experts share (None if they share none).
    """
    yield "A", factors.down(), None if factors.shared_S is None else len(factors.shared_S)
    yield "B", factors.up(), None if factors.S_B is None else len(factors.S_B)


def _factors(layer: AdapterLayer | LoraLayer, adapter: str) -> Factors:
    if isinstance(layer, AdapterLayer):
        return layer.factors(adapter)
    A, B = (by_name[adapter].get_parameter("weight").flatten(1) for by_name in (layer.lora_A, layer.lora_B))
    return Factors(A=A[None], P=None, S=None, B=B.T[None], Q=None, S_B=None)


def _to_float64(factors: Factors, module: str) -> Factors:
    # float64 factors are copied too, because the model may be trained further.
    copies = Factors(*(f if f is None else f.detach().to("cpu", torch.float64, copy=True) for f in factors))
    if not all(f is None or f.isfinite().all() for f in copies):
        raise ValueError(f"the adapter has values that are not finite in {module}: its training diverged.")
    return copies


def _size(factors: Factors) -> str:
    down = factors.subspace()[1] if factors.A is None else factors.A
    up = factors.up_subspace()[1] if factors.B is None else factors.B
    return f"{down.shape[-1]} to {up.shape[-1]}"
