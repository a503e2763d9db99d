"""The adapted layer: a frozen linear layer with gated low-rank experts.

All methods compute `y = W x + scaling · up(g(x) ⊙ down(x))` over the stacked tensors of `Factors`. Which of them exist
and which are trained is a setting. Shapes: n in, m out, N experts, r rank, d rank of the subspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge, onload_layer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from malora.adapter_layer import AdapterLayer
from malora.adapter_rows import AdapterRows, Segment
from malora.backends import BACKENDS
from malora.checkpointing import add_gradient
from malora.config import MaloraConfig, resolve_backend
from malora.factors import StackedWeights
from malora.fused.eligibility import can_fuse_stack, find_fused_adapter
from malora.fused.group import ProjectionGroup
from malora.routing import Routing, RoutingLog, WeakReference, route
from malora.stacked_layers import stacked_deltas

LINEAR_TYPES = (nn.Linear, Conv1D)  # GPT-2's Conv1D is a linear layer whose weight is [n, m]


class MaloraLinear(AdapterLayer):
    """A linear layer with experts.

    Args:
        base_layer: the frozen linear layer: an `nn.Linear` with weight [m, n], a `Conv1D` with weight [n, m], or a
            quantized linear module of gptqmodel.
        name: its name in the base model.
        log: the model's routing log, to which the layer refers weakly.
        group: the layers that read the same input; None if it reads an input of its own.
    """

    base_layer: nn.Linear  # for the fused path, which takes no other
    other_param_names = ("malora_dropout",)

    def __init__(self, base_layer: nn.Module, name: str, log: RoutingLog, group: ProjectionGroup | None = None) -> None:
        if isinstance(base_layer, Conv1D):
            n, m = base_layer.nx, base_layer.nf
        else:
            n, m = cast("nn.Linear", base_layer).in_features, cast("nn.Linear", base_layer).out_features
        super().__init__(base_layer, name, in_features=n, out_features=m)
        self.is_transposed = isinstance(base_layer, Conv1D)
        self._log, self._record = WeakReference(log), WeakReference(log.record_of(name))
        self.group = group or ProjectionGroup()
        self.group.layers.append(self)
        self.malora_dropout = nn.ModuleDict()
        self.cast_input_dtype_enabled = True  # peft.helpers.disable_input_dtype_casting switches it

    def update_layer(self, adapter: str, config: MaloraConfig) -> None:
        """Add an adapter: create its tensors and initialise them as the paper does.

        Raises:
            ValueError: the subspace is wider than the layer's input.
        """
        self.group.clear_caches()
        self.malora_dropout[adapter] = nn.Dropout(config.lora_dropout).train(self.training)
        super().update_layer(adapter, config)

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

        The output is [..., m] for x [..., n]. In a pass with `adapter_names`, each row of x gets the output of its own
        adapter instead.
        """
        if self.disable_adapters and self.merged:
            with onload_layer(self):
                self.unmerge()
        rows = None if (log := self._log()) is None else log.rows
        if rows is None and not (args or kwargs) and (fused := self.adapter_for_fused_path()):
            output: Tensor = self.group.output(self, fused, x)
            return output
        if rows is not None and not (args or kwargs) and self._can_fuse_rows(rows, x):
            pairs = zip(rows.segments(x), rows.split(x), strict=True)
            return rows.grouping(x).join([self._stacked_result(rows, segment, x, part) for segment, part in pairs])
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        offloaded = self._offloaded_factors()
        for factor in offloaded:
            factor._hf_hook.pre_forward(factor)
        if rows is None:
            for adapter in self.active_adapters:
                if adapter in self.settings:
                    y = y + self.delta(adapter, x).to(y.dtype)
        else:
            y = self._add_deltas_of_rows(rows, x, y)
        for factor in offloaded:
            factor._hf_hook.post_forward(factor, None)
        return y

    def _add_deltas_of_rows(self, rows: AdapterRows, x: Tensor, y: Tensor) -> Tensor:
        """Add to each row of y what its own adapter computes from that row of x."""
        pairs = zip(rows.segments(x), rows.split(x), strict=True)
        found = [self._delta_of_segment(rows, segment, x, part) for segment, part in pairs]
        if all(delta is None for delta in found):
            return y
        deltas = [
            torch.zeros_like(part) if delta is None else delta.to(y.dtype)
            for delta, part in zip(found, rows.split(y), strict=True)
        ]
        # One sum, because the backward pass of a sum into some rows copies the gradient of all rows.
        return y + rows.grouping(x).join(deltas)

    def _delta_of_segment(self, rows: AdapterRows, segment: Segment, x: Tensor, part: Tensor) -> Tensor | None:
        """Return what the adapters of a segment add to its part of x, or None if they do not adapt this layer."""
        if segment.names[0] not in self.settings:
            return None
        if segment.stack is None:
            return self.delta(segment.names[0], part)
        return self._stacked_result(rows, segment, x, part)

    def _stacked_result(self, rows: AdapterRows, segment: Segment, x: Tensor, part: Tensor) -> Tensor:
        """Return what the stacked adapters of a segment add to its part of x.

        Where `_can_fuse_rows` holds, it is the frozen layer's output together with that. The first layer of a group
        computes all of them, and the others fetch theirs.
        """
        assert segment.stack is not None
        weights: StackedWeights = rows.weights[segment.stack][self.name]
        key, state = (weights.layers, segment.names), (x._version, torch.is_grad_enabled(), self.training)
        source, state_before, results = rows.outputs.get(key, (None, None, {}))
        if source is not x or state != state_before or self.name not in results:
            results = self._stacked_results(segment, weights, part, fused=self._can_fuse_rows(rows, x))
        result: Tensor = results.pop(self.name)
        rows.outputs[key] = (x, state, results) if results else (None, None, {})
        return result

    def _can_fuse_rows(self, rows: AdapterRows, x: Tensor) -> bool:
        """Return whether the frozen layer and the adapters of all rows of x can be computed together."""
        return not (self.disable_adapters or self.merged) and all(
            segment.stack is not None
            and segment.names[0] in self.settings
            and all(
                can_fuse_stack(layer, self.settings[segment.names[0]], rows.weights[segment.stack][self.name], x)
                for layer in self.group.layers
                if layer.name in rows.weights[segment.stack][self.name].layers
            )
            for segment in rows.segments(x)
        )

    def _stacked_results(
        self, segment: Segment, weights: StackedWeights, x: Tensor, *, fused: bool
    ) -> dict[str, Tensor]:
        """Compute `_stacked_result` for each layer of the weights' group."""
        config, K = self.settings[segment.names[0]], len(segment.names)
        by_name = {layer.name: layer for layer in self.group.layers}
        layers = [by_name[name] for name in weights.layers]
        weights = weights.select(segment.members)
        probabilities: Sequence[Tensor]
        if fused:
            from malora.fused.stacked_group import forward_stacked_group  # needs Triton

            found, probabilities = forward_stacked_group(layers, weights, config, x)
        else:
            if not torch.is_autocast_enabled(x.device.type):
                x = self._cast_input_dtype(x, weights.down.dtype)
            x_KTn = x.reshape(K, -1, self.in_features)
            deltas, probabilities = stacked_deltas(x_KTn, weights, config, self.malora_dropout[segment.names[0]])
            found = [delta.reshape(*x.shape[:-1], delta.shape[-1]) for delta in deltas]
        results = {}
        shape = (len(x) // K, *x.shape[1:-1], config.num_experts)
        for i, (layer, y) in enumerate(zip(layers, found, strict=True)):
            if probabilities:
                for adapter, probability in zip(segment.names, probabilities[i].unbind(), strict=True):
                    y = layer.record_routing(
                        adapter, Routing(probability.reshape(shape), config.top_k, config.renormalize), y
                    )
            results[layer.name] = y
        return results

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
            routing = route(x, router, config.top_k, config.renormalize)
            routed = routing._replace(probability=routing.probability.reshape(-1, config.num_experts))
        x_Tn = self.malora_dropout[adapter](x).reshape(-1, self.in_features)
        y_Tm = BACKENDS[resolve_backend(config, x.device)].compute(x_Tn, routed, factors, config.scaling)
        y = y_Tm.reshape(*x.shape[:-1], self.out_features)
        return y if routing is None else self.record_routing(adapter, routing, y)

    def train(self, mode: bool = True) -> MaloraLinear:
        """Switch between training and evaluation."""
        self.group.clear_inference_cache()  # training may have changed the weights
        return super().train(mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and the copies of weights that were made for it."""
        self.group.clear_caches(include_frozen=self.settings.keys() <= {adapter_name})
        super().delete_adapter(adapter_name)
        self.group.drop_unused_padding()

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


# Name in the public interface. PEFT's "all-linear" finds an adapted layer by "Linear" in the name of its class.
MaloraLayer = MaloraLinear
