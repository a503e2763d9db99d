"""The adapted layer: a frozen linear layer with gated low-rank experts.

All methods compute `y = W x + scaling · up(g(x) ⊙ down(x))` over the stacked tensors of `Factors`. Which of them exist
and which are trained is a setting. Shapes: n in, m out, N experts, r rank, d rank of the subspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from malora.backends import BACKENDS
from malora.checkpointing import add_gradient
from malora.config import MaloraConfig, resolve_backend
from malora.factors import Factors
from malora.fused.eligibility import find_fused_adapter
from malora.fused.group import ProjectionGroup
from malora.initialization import init_factors_, kaiming_uniform
from malora.routing import Routing, RoutingLog, WeakReference, route

PREFIX = "malora_"

LINEAR_TYPES = (nn.Linear, Conv1D)  # GPT-2's Conv1D is a linear layer whose weight is [n, m]


class MaloraLinear(nn.Module, BaseTunerLayer):
    """A linear layer with experts.

    Each factor is an `nn.ParameterDict` by adapter name, as PEFT keeps them.

    Args:
        base_layer: the frozen linear layer: an `nn.Linear` with weight [m, n], a `Conv1D` with weight [n, m], or a
            quantized linear module of gptqmodel.
        name: its name in the base model.
        log: the model's routing log, to which the layer refers weakly.
        group: the layers that read the same input; None if it reads an input of its own.

    Attributes:
        settings: the config of each adapter, by its name.
    """

    adapter_layer_names = tuple(PREFIX + name for name in ("router", *Factors._fields))
    other_param_names = ("malora_dropout",)

    def __init__(self, base_layer: nn.Module, name: str, log: RoutingLog, group: ProjectionGroup | None = None) -> None:
        super().__init__()
        self.base_layer = cast("nn.Linear", base_layer)  # for the fused path, which takes no other
        self.is_transposed = isinstance(base_layer, Conv1D)
        if isinstance(base_layer, Conv1D):
            self.in_features, self.out_features = base_layer.nx, base_layer.nf
        else:
            self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.name = name
        self._log, self._record = WeakReference(log), WeakReference(log.record_of(name))
        self.group = group or ProjectionGroup()
        self.group.layers.append(self)
        self.settings: dict[str, MaloraConfig] = {}
        for attribute in self.adapter_layer_names:
            setattr(self, attribute, nn.ParameterDict())
        self.malora_dropout = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True  # peft.helpers.disable_input_dtype_casting switches it

    def update_layer(self, adapter: str, config: MaloraConfig) -> None:
        """Add an adapter: create its tensors and initialise them as the paper does.

        Raises:
            ValueError: the subspace is wider than the layer's input.
        """
        self.group.clear_caches()
        config = self.settings[adapter] = config.for_module(self.name)
        self.malora_dropout[adapter] = nn.Dropout(config.lora_dropout).train(self.training)
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
        return config.factor_shapes(self.in_features, self.out_features)

    def _parameters_of(self, name: str) -> nn.ParameterDict:
        """Return the parameters of one kind ("router", "A", ...), by adapter."""
        found = getattr(self, PREFIX + name)
        assert isinstance(found, nn.ParameterDict)
        return found

    def factors(self, adapter: str) -> Factors:
        """Return the adapter's stacked experts."""
        by_name = {name: self._parameters_of(name) for name in Factors._fields}
        return Factors(**{name: found[adapter] if adapter in found else None for name, found in by_name.items()})

    def router(self, adapter: str) -> Tensor | None:
        """Return the adapter's router weight [N, n], or None if it has one expert."""
        routers = self._parameters_of("router")
        return routers[adapter] if adapter in routers else None

    @property
    def routing_log(self) -> RoutingLog | None:
        """The routing log of the layer's model; None if the model is gone."""
        return self._log()

    def waiting_gradients(self, adapter: str) -> list[Tensor]:
        """Return the list that `record_routing` takes waiting gradients from."""
        record = self._record()
        return [] if record is None else record.waiting.setdefault(adapter, [])

    @property
    def routings(self) -> dict[str, Routing]:
        """The routing of the model's last forward pass, by adapter."""
        record = self._record()
        return {} if record is None else record.routings

    def record_routing(self, adapter: str, routing: Routing, y: Tensor) -> Tensor:
        """Keep a routing in the log while that records, and return `y`, the output that was computed by it.

        If the layer runs again in a backward pass, as under reentrant gradient checkpointing, the routing gets the
        gradient that waits for it.
        """
        log, record = self._log(), self._record()
        if log is None or record is None:
            return y
        if log.recording:
            record.routings[adapter] = routing
        elif torch.is_grad_enabled() and (waiting := record.waiting.get(adapter)):
            return add_gradient(y, routing.probability, waiting.pop())
        return y

    @property
    def has_active_router(self) -> bool:
        """True if an active adapter of this layer has a router."""
        return any(self.router(name) is not None for name in self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the frozen layer's output plus that of the active adapters.

        The output is [..., m] for x [..., n].
        """
        if self.disable_adapters and self.merged:
            with onload_layer(self):
                self.unmerge()
        if not (args or kwargs) and (fused := self.adapter_for_fused_path()):
            output: Tensor = self.group.output(self, fused, x)
            return output
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        offloaded = self._offloaded_factors()
        for factor in offloaded:
            factor._hf_hook.pre_forward(factor)
        for adapter in self.active_adapters:
            if adapter in self.settings:
                y = y + self.delta(adapter, x).to(y.dtype)
        for factor in offloaded:
            factor._hf_hook.post_forward(factor, None)
        return y

    def _offloaded_factors(self) -> list[Any]:
        """Return the parameters that accelerate loads before a forward pass and offloads after it.

        Its hooks run when a module is called, and nobody calls an `nn.ParameterDict`.
        """
        if not hasattr(self.base_layer, "_hf_hook"):  # accelerate hooks a layer as a whole
            return []
        return [factor for name in self.adapter_layer_names if hasattr(factor := getattr(self, name), "_hf_hook")]

    def adapter_for_fused_path(self) -> str | None:
        """Return the adapter that can be computed together with the frozen layer, or None."""
        return find_fused_adapter(self, is_sharded=self.group.is_sharded)

    def delta(self, adapter: str, x: Tensor) -> Tensor:
        """Return what the adapter adds to W x, [..., m] for x [..., n]."""
        config, factors = self.settings[adapter], self.factors(adapter)
        if not torch.is_autocast_enabled(x.device.type):  # autocast casts the weights instead
            x = self._cast_input_dtype(x, factors.dtype)
        routing = routed = None
        router = self.router(adapter)
        if router is not None:
            routing = route(x, router, config.top_k)
            routed = routing._replace(probability=routing.probability.reshape(-1, config.num_experts))
        x_Tn = self.malora_dropout[adapter](x).reshape(-1, self.in_features)
        y_Tm = BACKENDS[resolve_backend(config, x.device)].compute(x_Tn, routed, factors, config.scaling)
        y = y_Tm.reshape(*x.shape[:-1], self.out_features)
        return y if routing is None else self.record_routing(adapter, routing, y)

    def train(self, mode: bool = True) -> MaloraLinear:
        """Switch between training and evaluation."""
        self.group.clear_inference_cache()  # training may have changed the weights
        return super().train(mode)

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
        """Remove an adapter and the copies of weights that were made for it."""
        self.group.clear_caches(include_frozen=self.settings.keys() <= {adapter_name})
        self.settings.pop(adapter_name, None)
        self.group.drop_unused_padding()
        super().delete_adapter(adapter_name)

    def _apply(self, *args: Any, **kwargs: Any) -> MaloraLinear:
        device = self.weight.device
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self.weight.device != device:
            self.group.clear_float8()  # they are where the weights were
        return self

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the adapter's change of the frozen weight, in its layout and the adapter's dtype.

        Raises:
            ValueError: the adapter has a router, so its change depends on the token.
        """
        config = self.settings[adapter]
        if config.has_router:
            raise ValueError(
                f"adapter {adapter!r} routes tokens among {config.num_experts} experts: its change depends on the "
                "input and cannot be merged into one weight. Keep it as an adapter, or use unload() to drop it."
            )
        delta = self.factors(adapter).delta_weight(config.scaling)
        return delta.T if self.is_transposed else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' change to the frozen weight.

        A quantized weight is dequantized and quantized again, as PEFT's LoRA does.

        Raises:
            ValueError: an adapter has a router; the weight cannot be dequantized; or, with `safe_merge`, the merged
                weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.settings]
        if names:
            self.check_mergeable()
        deltas = [self.get_delta_weight(name) for name in names]  # all or none
        for name, delta in zip(names, deltas, strict=True):
            merged = self._add_to_base(delta)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken: merging it would put "
                    f"values that are not finite into {self.name}."
                )
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract the change of all merged adapters from the frozen weight."""
        if self.merged:
            self.check_mergeable()
        while self.merged_adapters:
            # Not in place: copies of the weight are known by its address.
            self.set_base_weight(self._add_to_base(-self.get_delta_weight(self.merged_adapters.pop())))

    @torch.no_grad()
    def _add_to_base(self, delta: Tensor) -> Tensor:
        """Return the frozen weight plus a change of it.

        It has the dtype of the weight, or of the change if the weight is quantized.
        """
        weight = self.get_base_weight()
        return weight + delta.to(weight.dtype) if self.quantization_backend is None else weight.to(delta.dtype) + delta

    def check_mergeable(self) -> None:
        """Refuse a frozen weight that no change can be added to.

        Raises:
            ValueError: the weight is quantized, and PEFT cannot dequantize it.
        """
        backend, weight = self.quantization_backend, self.weight
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(  # PEFT would dequantize it to garbage
                f"cannot change the weight of {self.name}: bitsandbytes packed it in an inference pass on this CPU, "
                "which cannot be undone exactly. Load the base again and merge before the first pass, or use a GPU."
            )
        if backend is not None and backend.supports_merge:
            return
        shape = (self.in_features, self.out_features) if self.is_transposed else (self.out_features, self.in_features)
        if backend is not None or not weight.is_floating_point() or (weight.shape != shape and not weight.is_meta):
            raise ValueError(
                f"cannot merge into {self.name}: its weight, {type(weight).__name__} {weight.dtype} "
                f"{tuple(weight.shape)} in a {type(self.base_layer).__name__}, cannot be dequantized and quantized "
                "again. Keep the adapter, or load the base without quantization to merge."
            )

    def __repr__(self) -> str:
        return "malora." + super().__repr__()


# Name in the public interface. PEFT's "all-linear" finds an adapted layer by "Linear" in the name of its class.
MaloraLayer = MaloraLinear
