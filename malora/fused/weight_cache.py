"""Owner of all copies of weights that the fused path makes for a projection group.

There is no other owner of such copies.

The GEMMs read packed weights (`packed_weights.py`), and some read frozen weights with the up projection in columns
next to them. A copy is valid until a weight changes. That cannot be detected, because a fused optimizer does not
increase `Tensor._version`. So each copy has one of three lifetimes:

| lifetime | made by | good for |
| --- | --- | --- |
| pass | a forward pass with gradients; for a whole model at once where it has trained before | that pass |
| step | `malora.WeightCache.refresh()` | the passes inside its `with` |
| mode | the first forward pass without gradients | such passes until `train()`, `eval()` or a pass with gradients |

Copies of frozen weights (float8, and columns allocated next to them) stay until the weights change or move, or until
`malora.release_caches`. The cache holds tensors and numbers only, never a layer, a parameter or a model, so it keeps
none of them alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from malora.fused.fp8_weights import Float8Weights
from malora.fused.kernels.down_backward import split_k_counters
from malora.fused.kernels.multi_copy import Tables
from malora.fused.packed_weights import PackedBuffer, PackedLayout, PackedWeights
from malora.fused.tensor_utils import is_captured

if TYPE_CHECKING:
    from malora.config import MaloraConfig
    from malora.fused.protocol import FusedLayer

Form = tuple[torch.dtype, torch.device]  # of the matmuls


@dataclass(frozen=True, eq=False)
class LoadedUpProj:
    """The up projection that lies next to the frozen weights for all passes of a step.

    Attributes:
        packed: the packed weights that its B comes from.
        float8: the frozen weights, where they are in float8.
        up_scales: factors of h there, [G, C].
    """

    packed: PackedWeights
    float8: Float8Weights | None
    up_scales: Tensor | None


class GroupWeightCache:
    """Copies of the weights of one projection group.

    Attributes:
        float8: float8 copies of frozen weights, by the ids of their linear layers and the columns next to them.
        padding: columns that `augmented_weights.allocate_padding` put next to each weight, by its place in the group.
        loaded: the up projection in those columns, if it stays there for all passes of a step.
        copy_tables: addresses that `multi_tensor_copy` reads on the device.
    """

    def __init__(self) -> None:
        self.float8: dict[tuple[int, ...], Float8Weights] = {}
        self.padding: dict[int, int] = {}
        self.loaded: LoadedUpProj | None = None
        self.copy_tables: Tables = {}
        self._counters: Tensor | None = None

    def loaded_for(self, packed: PackedWeights, float8: Float8Weights | None) -> LoadedUpProj | None:
        """Return the up projection next to the frozen weights if it is that of `packed`.

        If it is not, the pass overwrites it with its own.
        """
        loaded = self.loaded
        if loaded is None or loaded.packed is not packed or loaded.float8 is not float8:
            self.loaded = loaded = None
        return loaded

    def split_k_counters(self, x: Tensor) -> Tensor:
        """Return the counters of `down_proj_backward` for x [T, n].

        They are zero between its calls. They outlive changes of adapters, because CUDA graphs count in them.
        """
        found = self._counters
        if found is None or found.device != x.device:
            found = split_k_counters(x)
            if not is_captured(x):  # captured zeros are zero only once the graph is replayed
                self._counters = found
        return found


class GroupAdapter:
    """One adapter on some layers of a projection group, with its packed weights.

    The packed weights are kept by lifetime.

    Attributes:
        layers: the layers that are computed together.
        layout: sizes of the packed weights.
        cache: the group's other copies of weights.
        last_form: dtype and device of the last pass with gradients.
        prefetched: lifetime "pass", made for the whole model at once.
        step: lifetime "step"; None outside of the user's `with`.
        inference: lifetime "mode", behind the state of the parameters that it was packed from.
    """

    def __init__(self, layers: list[FusedLayer], adapter: str, cache: GroupWeightCache) -> None:
        self.layers, self.adapter, self.cache = layers, adapter, cache
        self.config: MaloraConfig = layers[0].settings[adapter]
        self.layout = PackedLayout.of(layers, adapter)
        self.last_form: Form | None = None
        self.prefetched: PackedWeights | None = None
        self.step: PackedWeights | None = None
        self.inference: tuple[tuple[object, ...], PackedWeights] | None = None

    def parameters(self) -> list[Tensor]:
        """Return all layers' parameters, each layer's in the order of the layout's kinds."""
        return group_parameters(self.layers, self.adapter)

    @property
    def next_form(self) -> Form | None:
        """Dtype and device of the next pass with gradients, if it is like the last.

        They are None before the first such pass or after a move.
        """
        form = self.last_form
        return form if form and form[1] == self.layers[0].base_layer.weight.device else None

    def can_run(self) -> bool:
        """Return whether the layers would now compute this adapter by the fused path."""
        return all(layer.adapter_for_fused_path() == self.adapter for layer in self.layers)

    def take_shared(self, form: Form) -> PackedWeights | None:
        """Return packed weights that serve several passes, or were made for a whole model at once.

        Return None if there are none for the next pass with gradients, of this form.
        """
        self.last_form, prefetched, self.prefetched = form, self.prefetched, None
        for packed in (self.step, prefetched):
            if packed is not None and (packed.down.dtype, packed.down.device) == form:
                return packed
        return None

    def packed_for(self, x: Tensor, parameters: list[Tensor]) -> PackedWeights:
        """Return the packed weights for a pass over x [T, n].

        x has the dtype of the matmuls.
        """
        form = (x.dtype, x.device)
        if torch.is_grad_enabled():
            return self.take_shared(form) or self._pack(parameters, form)
        key = (*form, is_captured(x), *((p.data_ptr(), p._version) for p in parameters))
        if self.inference is None or self.inference[0] != key:
            self.inference = key, self._pack(parameters, form)
        return self.inference[1]

    def _pack(self, parameters: list[Tensor], form: Form) -> PackedWeights:
        buffer = PackedBuffer([self.layout], *form)
        buffer.fill(parameters, self.cache.copy_tables)
        return buffer.weights[0]


def group_parameters(layers: Sequence[FusedLayer], adapter: str) -> list[Tensor]:
    """Return an adapter's parameters on some layers, each layer's in the order of KINDS."""
    found: list[Tensor | None] = []
    for layer in layers:
        f = layer.factors(adapter)
        found += [layer.router(adapter), f.A, f.P, f.S, f.B]
    return [parameter for parameter in found if parameter is not None]


def pack_together(adapters: list[tuple[GroupAdapter, Form]]) -> list[tuple[PackedBuffer, list[GroupAdapter]]]:
    """Allocate a buffer per dtype and device for several adapters' packed weights.

    It is not filled yet.
    """
    by_form: dict[Form, list[GroupAdapter]] = {}
    for adapter, form in adapters:
        by_form.setdefault(form, []).append(adapter)
    return [(PackedBuffer([a.layout for a in members], *form), members) for form, members in by_form.items()]


def fill_buffer(buffer: PackedBuffer, adapters: list[GroupAdapter]) -> None:
    """Copy the current parameters of the adapters into their buffer, in one launch."""
    buffer.fill([p for adapter in adapters for p in adapter.parameters()], adapters[0].cache.copy_tables)


def prefetch(adapters: list[GroupAdapter]) -> None:
    """Pack weights of adapters that have trained before, for the next pass of each."""
    ready = [(adapter, form) for adapter in adapters if (form := adapter.next_form)]
    for buffer, group_adapters in pack_together(ready):
        fill_buffer(buffer, group_adapters)
        for adapter, packed in zip(group_adapters, buffer.weights, strict=True):
            adapter.prefetched = packed
