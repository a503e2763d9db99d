"""What all adapted layers have in common: the factors of several adapters.

Shapes are those of `malora.factors`: n in, m out, N experts, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from malora.config import MaloraConfig
from malora.factors import Factors
from malora.initialization import init_factors_, kaiming_uniform

PREFIX = "malora_"


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A frozen module with the factors of adapters.

    Each factor is an `nn.ParameterDict` by adapter name, as PEFT keeps them.

    Args:
        base_layer: The frozen module.
        name: Name of what is adapted, in the base model.
        in_features: n.
        out_features: m.
        fused_experts: Number of matrices [m, n] that the frozen weight holds. Each gets experts of its own.

    Attributes:
        settings: The config of each adapter, by its name.
    """

    adapter_layer_names = tuple(PREFIX + name for name in ("router", *Factors._fields))

    def __init__(
        self, base_layer: nn.Module, name: str, *, in_features: int, out_features: int, fused_experts: int = 1
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.in_features, self.out_features, self.fused_experts = in_features, out_features, fused_experts
        self.settings: dict[str, MaloraConfig] = {}
        for attribute in self.adapter_layer_names:
            setattr(self, attribute, nn.ParameterDict())
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter: str, config: MaloraConfig) -> None:
        """Add an adapter: create its tensors and initialise them as the paper does.

        Raises:
            ValueError: The subspace is wider than the input.
        """
        config = self.settings[adapter] = config.for_module(self.name)
        for name, shape in self._shapes(config).items():
            self._parameters_of(name)[adapter] = nn.Parameter(torch.empty(shape))
        factors = self.factors(adapter)
        if not any(tensor.is_meta for tensor in factors if tensor is not None):
            init_factors_(factors, beta=config.beta, same_start=config.same_start, has_effect=not config.init_weights)
            router = self.router(adapter)
            if router is not None:
                router.data.copy_(kaiming_uniform(router.shape))
        hook = getattr(self.base_layer, "_hf_hook", None)  # accelerate's: its weight may be on "meta" now
        self._move_adapter_to_device_of_base_layer(adapter, device=getattr(hook, "execution_device", None))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _shapes(self, config: MaloraConfig) -> dict[str, tuple[int, ...]]:
        if (config.d or 0) > self.in_features:
            raise ValueError(
                f"d={config.d} is more than the {self.in_features} inputs of {self.name}. A subspace cannot have "
                "more dimensions than the input; choose a smaller d."
            )
        return config.factor_shapes(self.in_features, self.out_features, self.fused_experts)

    def _parameters_of(self, name: str) -> nn.ParameterDict:
        """Return the parameters of one kind ("router", "A", ...), by adapter."""
        found = getattr(self, PREFIX + name)
        assert isinstance(found, nn.ParameterDict)
        return found

    def factors(self, adapter: str) -> Factors:
        """Return the adapter's stacked experts."""
        return Factors(*(self._parameter(name, adapter) for name in Factors._fields))

    def router(self, adapter: str) -> Tensor | None:
        """Return the adapter's router weight [N, n], or None if it has one expert."""
        return self._parameter("router", adapter)

    def _parameter(self, name: str, adapter: str) -> nn.Parameter | None:
        """Return a parameter, or None if the adapter has none of this kind.

        Every pass asks for all of them, and an `nn.ParameterDict` takes long to say that it has no such key.
        """
        of_kind = self._modules[PREFIX + name]
        assert of_kind is not None
        return of_kind._parameters.get(adapter)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters, as in PEFT; frozen factors stay frozen."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._keep_frozen()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train adapters or not, as in PEFT; frozen factors stay frozen."""
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        self._keep_frozen()

    def _keep_frozen(self) -> None:
        """Freeze what a method does not train.

        PEFT makes all of an active adapter trainable.
        """
        for adapter, config in self.settings.items():
            for name in config.freeze:
                self._parameters_of(name)[adapter].requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        self.settings.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def __repr__(self) -> str:
        return "malora." + super().__repr__()
