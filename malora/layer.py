"""The layer: a frozen linear map and, beside it, gated low-rank experts.

All methods are one algebra, `y = W x + scaling · up(g(x) ⊙ down(x))`, over the stacked tensors of `Factors`; which of
them exist and which are trained is a setting. Shapes: n in, m out, N experts, r rank, d rank of the subspace.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from malora.backends import BACKENDS
from malora.config import MaloraConfig, resolve_backend
from malora.factors import Factors
from malora.fused.availability import has_triton, interprets_triton, warn_once
from malora.fused.group import ProjectionGroup
from malora.initialization import init_factors_, kaiming_uniform
from malora.routing import Routing, RoutingLog, route

PREFIX = "malora_"


class MaloraLayer(nn.Module, BaseTunerLayer):
    """An `nn.Linear` with experts. Each factor is a dict of parameters by adapter name, as PEFT keeps them."""

    adapter_layer_names = tuple(PREFIX + name for name in ("router", *Factors._fields))
    other_param_names = ("malora_dropout",)

    def __init__(self, base_layer: nn.Linear, name: str, log: RoutingLog, group: ProjectionGroup | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.name = name
        self.routing_log = log
        self.group = group or ProjectionGroup()
        self.group.layers.append(self)
        self.routings: dict[str, Routing] = {}  # of the model's last forward pass, by adapter
        self.settings: dict[str, MaloraConfig] = {}
        for attribute in self.adapter_layer_names:
            setattr(self, attribute, nn.ParameterDict())
        self.malora_dropout = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True  # what peft.helpers.disable_input_dtype_casting switches

    def update_layer(self, adapter: str, config: MaloraConfig) -> None:
        """Add an adapter: create its tensors and start them as the paper does."""
        self.group.release()
        self.settings[adapter] = config
        self.malora_dropout[adapter] = nn.Dropout(config.lora_dropout)
        for name, shape in self._shapes(config).items():
            getattr(self, PREFIX + name)[adapter] = nn.Parameter(torch.empty(shape))
        factors = self.factors(adapter)
        if not any(tensor.is_meta for tensor in factors if tensor is not None):
            init_factors_(factors, beta=config.beta, same_start=config.same_start)
            if config.has_router:
                router = self.malora_router[adapter]
                router.data.copy_(kaiming_uniform(router.shape))
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _shapes(self, config: MaloraConfig) -> dict[str, tuple[int, ...]]:
        n, m, N, r, d = self.in_features, self.out_features, config.num_experts, config.r, config.d
        if d is not None and d > n:
            raise ValueError(f"d={d} is more than the {n} inputs of {self.name}: a subspace of it cannot be that wide.")
        shapes: dict[str, tuple[int, ...]] = {"router": (N, n)} if config.has_router else {}
        if config.down == "A_t":
            shapes |= {"A": (N, r, n)}
        elif config.down == "P_t S":
            shapes |= {"P": (N, r, d), "S": (d, n)}
        else:
            shapes |= {"P": (N, r, d // N), "S": (N, d // N, n)}
        return shapes | ({"B": (N, r, m)} if config.up == "B_t" else {"Q": (N, r, d), "S_B": (d, m)})

    def factors(self, adapter: str) -> Factors:
        """The adapter's stacked experts."""
        tensors = (getattr(self, PREFIX + name) for name in Factors._fields)
        return Factors(*(by_adapter[adapter] if adapter in by_adapter else None for by_adapter in tensors))

    @property
    def has_active_router(self) -> bool:
        """Whether an active adapter of this layer has a router."""
        return any(name in self.malora_router for name in self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if not (args or kwargs) and (adapter := self.adapter_for_fused_path()):
            return self.group.output(self, adapter, x)
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for adapter in self.active_adapters:
            if adapter in self.settings:
                y = y + self.delta(adapter, x).to(y.dtype)
        return y

    def adapter_for_fused_path(self) -> str | None:
        """The adapter to compute together with the base, if there is one that the fused backend can."""
        active = [adapter for adapter in self.active_adapters if adapter in self.settings]
        device = self.base_layer.weight.device
        backends = {resolve_backend(self.settings[adapter], device) for adapter in active}
        if self.disable_adapters or self.merged or not backends & {"fused", "fp8"}:
            return None
        config = self.settings[active[0]]
        obstacle = None
        if len(active) > 1:
            obstacle = "several adapters at once"
        elif type(self.base_layer) is not nn.Linear:
            obstacle = f"a {type(self.base_layer).__name__}"
        elif self.group.is_sharded:  # they come and go, and are not copied or moved
            obstacle = "weights that FSDP has sharded"
        elif any(parameter.requires_grad for parameter in self.base_layer.parameters()):
            obstacle = "a base that is trained too"
        elif config.up != "B_t":
            obstacle = f"up={config.up!r}"
        elif config.down != "A_t" and not config.has_router:
            obstacle = f"one expert with down={config.down!r}"
        elif not (has_triton() if device.type == "cuda" else interprets_triton()):
            obstacle = f"on {device.type}, with Triton {'' if has_triton() else 'not '}installed"
        if obstacle:
            for asked in {self.settings[adapter].backend for adapter in active} & {"fused", "fp8"}:
                warn_once(asked, obstacle, "the dense backend")
        return None if obstacle else active[0]

    def delta(self, adapter: str, x: Tensor) -> Tensor:
        """What the adapter adds to W x, for x [..., n]."""
        config, factors = self.settings[adapter], self.factors(adapter)
        if not torch.is_autocast_enabled(x.device.type):  # autocast narrows the weights instead
            x = self._cast_input_dtype(x, factors.dtype)
        routed = None
        if config.has_router:
            routing = route(x, self.malora_router[adapter], config.top_k)
            if self.routing_log.recording:
                self.routings[adapter] = routing
            routed = routing._replace(probability=routing.probability.flatten(0, -2))
        x_Tn = self.malora_dropout[adapter](x).flatten(0, -2)
        y_Tm = BACKENDS[resolve_backend(config, x.device)].compute(x_Tn, routed, factors, config.scaling)
        return y_Tm.unflatten(0, x.shape[:-1])

    def train(self, mode: bool = True) -> MaloraLayer:
        self.group.drop_kept()  # training may have changed the weights
        return super().train(mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._keep_frozen()

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        self._keep_frozen()

    def _keep_frozen(self) -> None:
        """PEFT makes all of an active adapter trainable; a method's frozen factors must stay frozen."""
        for adapter, config in self.settings.items():
            for name in config.freeze:
                getattr(self, PREFIX + name)[adapter].requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        self.group.release(frozen=self.settings.keys() <= {adapter_name})
        self.settings.pop(adapter_name, None)
        self.group.drop_rooms()
        super().delete_adapter(adapter_name)

    def _apply(self, *args: Any, **kwargs: Any) -> MaloraLayer:
        device = self.base_layer.weight.device
        super()._apply(*args, **kwargs)
        if self.base_layer.weight.device != device:
            self.group.frozen.clear()  # they were where the weights were
        return self

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of W, [m, n] in the adapter's dtype.

        Raises:
            ValueError: the adapter has a router, so its change depends on the token.
        """
        config = self.settings[adapter]
        if config.has_router:
            raise ValueError(
                f"adapter {adapter!r} routes tokens among {config.num_experts} experts: its change depends on the "
                "input and cannot be merged into one weight. Keep it as an adapter, or use unload() to drop it."
            )
        return self.factors(adapter).delta_weight(config.scaling)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' change to the frozen weight.

        Raises:
            ValueError: an adapter has a router; or, with `safe_merge`, the merged weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.settings]
        deltas = [self.get_delta_weight(name) for name in names]  # all or none
        weight = self.get_base_layer().weight
        for name, delta in zip(names, deltas, strict=True):
            merged = weight.data + delta.to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"merging adapter {name!r} would put values that are not finite into {self.name}.")
            weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        weight = self.get_base_layer().weight
        while self.merged_adapters:
            # Not in place: who keeps the weight in another form looks at where it lies.
            weight.data = weight.data - self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Copying or pickling a model does not take along the autograd graph of its last batch."""
        return super().__getstate__() | {"routings": {}}

    def __repr__(self) -> str:
        return "malora." + super().__repr__()
