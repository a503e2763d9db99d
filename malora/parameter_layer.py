"""Adapters on bare parameters, such as the fused expert weights of transformers' Mixtral and Qwen-MoE.

A module that is not linear may hold the weights of its E experts in one parameter. The adapter cannot add to their
outputs, which only the module's own code sees. It replaces the parameter during the forward pass instead:

    W_e + scaling · U_e D_e

Each fused expert e has an adapter of its own. A subspace that the method shares is shared by the E experts. The method
must have no router, because the change of a weight cannot depend on the token. The changed weight is a copy, which
autograd keeps for the backward pass. PEFT's LoRA does the same (`target_parameters`, 0.21).

| parameter | layout |
| --- | --- |
| 3-D | [E, m, n], or [E, n, m] if the module says `is_transposed`, as gpt-oss's does |
| 2-D | [m, n], one expert |

n is the size of the input, m that of the output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from malora.adapter_layer import AdapterLayer


class ParamWrapper(AdapterLayer):
    """A frozen module, one parameter of which has adapters.

    PEFT finds it by the name of this class. A module with several adapted parameters has a wrapper for each, one around
    the other.

    Args:
        base_layer: The frozen module, or its wrapper for another parameter.
        parameter_name: Name of the parameter in the frozen module.
        name: Name of the parameter in the base model.
    """

    def __init__(self, base_layer: nn.Module, parameter_name: str, name: str) -> None:
        module = base_layer.get_base_layer() if isinstance(base_layer, ParamWrapper) else base_layer
        shape = getattr(module, parameter_name).shape
        is_transposed = len(shape) == 3 and getattr(module, "is_transposed", False)
        m, n = (shape[-1], shape[-2]) if is_transposed else shape[-2:]
        experts = shape[0] if len(shape) == 3 else 1
        super().__init__(base_layer, name, in_features=n, out_features=m, fused_experts=experts)
        self.parameter_name, self.is_transposed = parameter_name, is_transposed

    @property
    def parameter(self) -> nn.Parameter:
        """The frozen parameter."""
        return self.get_base_layer().get_parameter(self.parameter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the frozen module returns with the changed weights."""
        weights: dict[str, Tensor] = {}
        module: nn.Module = self
        while isinstance(module, ParamWrapper):
            if module.disable_adapters and module.merged:
                module.unmerge()
            if not (module.disable_adapters or module.merged) and module.settings.keys() & set(module.active_adapters):
                weights[module.parameter_name] = module.adapted_weight()
            module = module.base_layer
        if not weights:
            return module(*args, **kwargs)
        # As in PEFT, another parameter that is tied to this one keeps its value.
        return torch.func.functional_call(module, weights, args, kwargs, tie_weights=False)

    def adapted_weight(self) -> Tensor:
        """Return the parameter with the changes of the active adapters, in its layout and dtype.

        Raises:
            ValueError: accelerate has offloaded the parameter or the factors.
        """
        weight: Tensor = self.parameter
        # Autocast would change the dtype. It knows no device "meta".
        with nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False):
            for adapter in self.active_adapters:
                if adapter in self.settings:
                    weight = self._add(weight, adapter)
        return weight

    def _add(self, weight: Tensor, adapter: str) -> Tensor:
        factors, scaling = self.factors(adapter), self.settings[adapter].scaling
        if hasattr(self.get_base_layer(), "_hf_hook") and any(t is not None and t.is_meta for t in (weight, *factors)):
            raise ValueError(
                f"{self.name} is offloaded. accelerate loads it after the adapter would have changed it. Keep modules "
                "with target_parameters on a device, or merge the adapter before the model is dispatched."
            )
        if weight.itemsize == 1:  # float8 has no sums
            return _to_float8(weight.to(factors.dtype) + self.get_delta_weight(adapter), weight.dtype)
        up, down = factors.up().mT.to(weight.dtype), factors.down().to(weight.dtype)
        left, right = (down.mT, up.mT) if self.is_transposed else (up, down)
        # One operation, so that the change is never in memory by itself.
        matrices = weight.view(self.fused_experts, *weight.shape[-2:])
        return torch.baddbmm(matrices, left, right, alpha=scaling).view(weight.shape)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the adapter's change of the parameter, in its layout and the adapter's dtype."""
        factors = self.factors(adapter)
        delta = self.settings[adapter].scaling * (factors.up().mT @ factors.down())
        return (delta.mT if self.is_transposed else delta).reshape(self.parameter.shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' change to the parameter.

        Raises:
            ValueError: With `safe_merge`, the merged parameter is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.settings:
                merged = self._add_to_base(self.get_delta_weight(name))
                if safe_merge and not torch.isfinite(merged.float()).all():
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {name} seems to be broken: merging it would "
                        f"put values that are not finite into {self.name}."
                    )
                self.parameter.data = merged
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract the change of all merged adapters from the parameter."""
        while self.merged_adapters:
            self.parameter.data = self._add_to_base(-self.get_delta_weight(self.merged_adapters.pop()))

    @torch.no_grad()
    def _add_to_base(self, delta: Tensor) -> Tensor:
        weight = self.parameter
        if weight.itemsize == 1:
            return _to_float8(weight.to(delta.dtype) + delta, weight.dtype)
        return weight + delta.to(weight.dtype)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the frozen module, with the adapters of all its parameters merged if `merge` is true."""
        module: nn.Module = self
        while isinstance(module, ParamWrapper):
            if merge:
                module.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            module = module.base_layer
        return module

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype | None]:
        """Tell PEFT where new factors belong, and in which dtype."""
        weight = self.parameter
        return weight.device, None if weight.itemsize == 1 else weight.dtype

    def extra_repr(self) -> str:
        """Name the parameter, because a module may have several wrappers."""
        return f"parameter_name={self.parameter_name!r}"


def check_target_parameters(model: nn.Module, targets: Iterable[str]) -> None:
    """Refuse targets that match no parameter of a model, or one that cannot be adapted.

    Raises:
        ValueError: There is such a target.
    """
    parameters = dict(_parameters(model))
    for target in targets:
        found = {name: weight for name, weight in parameters.items() if f".{name}".endswith(f".{target}")}
        if not found:
            raise ValueError(
                f"target_parameters {target!r} matches no parameter of this {type(model).__name__}. Give the last "
                f"parts of names, such as {_examples(parameters)}."
            )
        for name, weight in found.items():
            if weight is None:
                raise ValueError(
                    f"target_parameters: {name} is computed from another tensor by torch.nn.utils.parametrize. Remove "
                    "the parametrization, or leave the parameter out."
                )
            if not (weight.dim() in (2, 3) and weight.is_floating_point()):
                raise ValueError(
                    f"target_parameters: {name} has dtype {weight.dtype} and shape {tuple(weight.shape)}. Only "
                    "matrices of floating-point numbers can be adapted, [m, n] or [experts, m, n]. Leave it out."
                )


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter | None]]:
    """Yield names in the base model, and parameters; None for a parameter that has a parametrization."""
    for name, module in model.named_modules():
        prefix = f"{name.replace('.base_layer', '')}." if name else ""
        for own, parameter in module.named_parameters(recurse=False):
            yield prefix + own, parameter
        for own in getattr(module, "parametrizations", ()):
            yield prefix + own, None


def _examples(parameters: dict[str, nn.Parameter | None]) -> list[str]:
    """Return some names of fused expert weights, or of other matrices if there are none."""
    by_size = {n: [name for name, p in parameters.items() if p is not None and p.dim() == n] for n in (2, 3)}
    names = by_size[3] or by_size[2]
    return sorted({".".join(name.split(".")[-2:]) for name in names})[:6]


def _to_float8(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a weight to float8, with values out of range at its bounds, which would be NaN."""
    limits = torch.finfo(dtype)
    return weight.clamp(limits.min, limits.max).to(dtype)
