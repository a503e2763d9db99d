"""Layers that read the same input, and are computed together by the fused backend.

Each stays a module of its own, called by the model's code as before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from malora.fused.fp8_weights import Kept
    from malora.fused.packed_weights import Beside, Stack
    from malora.layer import MaloraLayer


# Layers of one parent that read the same input, under the names that model families use.
PROJECTION_GROUPS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


@contextmanager
def prefetch_packed_weights(families: list[ProjectionGroup]) -> Iterator[None]:
    """For one training pass of a model: the weights of all its fused layers are copied at once, before the first runs.

    A layer that runs again, as under gradient checkpointing, copies its own. Layers that FSDP has sharded are found
    here: while one of them runs, its weights look like any others.
    """
    for family in families:
        family.is_sharded = _are_sharded(family.layers)
    stacks = []
    if torch.is_grad_enabled():
        stacks = [stack for family in families for stack in family.stacks() if stack.held is None]
    if stacks:
        from malora.fused.packed_weights import copy_ahead  # it needs Triton, which is not everywhere

        copy_ahead(stacks)
    try:
        yield
    finally:
        for stack in stacks:
            stack.drop_ahead()


def _are_sharded(layers: list[MaloraLayer]) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for layer in layers for parameter in layer.parameters())


class ProjectionGroup:
    """Layers that read the same input. The first that is called computes for all, the others fetch their part."""

    def __init__(self) -> None:
        self.layers: list[MaloraLayer] = []
        self.is_sharded = False  # by FSDP2, when the model's last pass began
        self._stacks: dict[str, Stack] = {}
        self.tables: dict[tuple, Tensor] = {}  # of `malora.backends.copies`
        self.frozen: Kept = {}  # of the fp8 backend
        self.rooms: dict[int, int] = {}  # columns that `malora.backends.beside` made beside weights, by the layer's id
        self.beside: Beside | None = None  # what is in them while weights are held
        self.counts: Tensor | None = None  # of `malora.backends.stack`
        self._forget()

    def _forget(self) -> None:
        self._input: Tensor | None = None
        self._state: tuple = ()
        self._outputs: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: dict) -> ProjectionGroup:
        """A copy has the copied layers, and no part of a pass that the original is in the middle of."""
        copied = memo[id(self)] = ProjectionGroup()
        copied.layers = copy.deepcopy(self.layers, memo)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
        self.layers = state["layers"]

    def stacks(self) -> list[Stack]:
        """Those that have run since the last `release` and would run again, as their layers now are."""
        return [
            packed_weights
            for packed_weights in self._stacks.values()
            if all(layer.adapter_for_fused_path() == packed_weights.adapter for layer in packed_weights.layers)
        ]

    def columns_beside_input(self, like: Tensor) -> int:
        """How many columns of room the next pass would use beside an input like this; 0 where it uses none."""
        fits = self.layers[0].in_features == like.shape[-1]
        if not (fits and self.rooms and self.layers[0].training and torch.is_grad_enabled()):
            return 0
        found = [packed_weights for packed_weights in self.stacks() if packed_weights.layers == self.layers]
        uses = len(found) == 1 and found[0].config.lora_dropout and found[0].wholes(like)
        return len(self.layers) * found[0].H8 if uses else 0

    def drop_kept(self) -> None:
        """Drop copies of weights that passes without gradients have kept; a next one makes them again."""
        for packed_weights in self._stacks.values():
            packed_weights.drop_kept()

    def release(self, frozen: bool = False) -> None:
        """Drop what is kept of the adapters' weights and settings, and of frozen weights; a next pass makes it again.

        Frozen weights are many, and do not change: only if asked for, their 8-bit copies are dropped, and weights with
        room for B are plain again.
        """
        if frozen:
            self.frozen.clear()
            if self.rooms:
                from malora.fused.augmented_weights import take_back  # it needs Triton, which is not everywhere

                for layer in self.layers:
                    take_back(layer)
        self._stacks.clear()
        self.beside = None
        self._forget()

    def drop_rooms(self) -> None:
        """Drop 8-bit copies that have room for adapters of a size that no layer has any more."""
        if self.frozen:
            from malora.fused.fp8_weights import room_for  # it needs Triton, which is not everywhere

            configs = [config for layer in self.layers for config in layer.settings.values()]
            left = {0} | {room_for(config.num_experts * config.r) for config in configs}
            self.frozen = {place: found for place, found in self.frozen.items() if place[-1] in left}

    @torch.compiler.disable  # a compiled layer calls the kernels, it does not look into them
    def output(self, layer: MaloraLayer, adapter: str, x: Tensor) -> Tensor:
        """The layer's output for x [..., n], base included."""
        if x.is_inference():  # it cannot be told whether such a tensor has changed
            return self._compute([layer], adapter, x)[0]
        state = (adapter, x._version, torch.is_grad_enabled(), layer.training)
        if x is not self._input or state != self._state or id(layer) not in self._outputs:
            self._forget()
            together = [other for other in self.layers if other.adapter_for_fused_path() == adapter]
            if together == [layer] or layer not in together:
                return self._compute([layer], adapter, x)[0]
            self._outputs = {id(o): y for o, y in zip(together, self._compute(together, adapter, x), strict=True)}
            self._input, self._state = x, state
        y = self._outputs.pop(id(layer))
        if not self._outputs:
            self._forget()
        return y

    def _compute(self, layers: list[MaloraLayer], adapter: str, x: Tensor) -> list[Tensor]:
        from malora.fused import autograd, packed_weights  # they need Triton, which is not everywhere

        key = adapter + "".join(f" {id(layer)}" for layer in layers)
        if key not in self._stacks:
            self._stacks[key] = packed_weights.Stack(layers, adapter)
        return autograd.outputs(self._stacks[key], x)
