"""What the fused path needs to know when activations are recomputed or thrown away.

`malora.set_checkpointing` sets this state, and the fused path asks for it:

- A checkpointed layer runs twice. Its second run must draw the same dropout masks as the first, and packs no weights
  again: `LayerRun` keeps the seeds and the packed weights of the first run, in the order of the calls.
- In "lean" mode a forward pass saves a layer's input itself, not a copy of it: `Saving` is the pass's record.

The state belongs to a thread. This module needs no Triton.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from malora.fused.packed_weights import PackedWeights

T = TypeVar("T")


class LayerRun:
    """What the first run of a checkpointed layer keeps for its second run.

    Attributes:
        saved: Tensors that autograd has saved in the first run so far.
    """

    def __init__(self) -> None:
        self.saved = 0
        self._seeds: list[Tensor] = []
        self._packed: list[tuple[PackedWeights, int, int]] = []
        self._groups = 0
        self._saved_by_last_group = -1
        self._is_replayed = False
        self._seed_place = self._group_place = 0  # of the second run

    def seed(self, draw: Callable[[], Tensor]) -> Tensor:
        """Return the seed that `draw` returned in the first run."""
        if not self._is_replayed:
            self._seeds.append(draw())
            return self._seeds[-1]
        self._seed_place += 1
        return self._seeds[self._seed_place - 1]

    def packed(self, group: int, pack: Callable[[], PackedWeights]) -> PackedWeights:
        """Return the packed weights that `pack` returned in the first run.

        Args:
            group: The id of the adapter on the group.
            pack: Packs its weights.

        Raises:
            RuntimeError: they were changed since, or the runs call other groups.
        """
        if not self._is_replayed:
            packed = pack()
            self._packed.append((packed, packed.flat._version, group))
            return packed
        if self._group_place >= len(self._packed) or self._packed[self._group_place][2] != group:
            raise RuntimeError(
                "a checkpointed layer computes something else in its backward pass than in its forward pass. Do not "
                "switch adapters, and do not add or remove hooks of its linear layers, between the two."
            )
        packed, version, _ = self._packed[self._group_place]
        if packed.flat._version != version:
            raise RuntimeError(
                "the packed weights of a checkpointed layer changed between its forward and its backward pass. "
                "Call WeightCache.refresh() before the forward pass, not between the two."
            )
        return packed

    def end_group(self) -> None:
        """Say that the call of a projection group has ended, and autograd has saved its tensors."""
        if self._is_replayed:
            self._group_place += 1
        else:
            self._groups += 1
            self._saved_by_last_group = self.saved

    @property
    def needs_outputs(self) -> bool:
        """Whether anything that the second run computes depends on the outputs of the group that runs now.

        The second run ends with the last saved tensor. If that belongs to a group, the outputs of this group are not
        needed.
        """
        is_last = self._is_replayed and self._group_place + 1 == self._groups
        return not (is_last and self._saved_by_last_group == self.saved)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Make this the thread's run, as the first one."""
        with _layer_run(self):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Make this the thread's run, as the second one."""
        self._is_replayed, self._seed_place, self._group_place = True, 0, 0
        with _layer_run(self):
            yield


class Saving(Protocol):
    """Record of a forward pass that decides how each saved tensor is kept."""

    def keep_on_device(self, *tensors: Tensor) -> None:
        """Say that these tensors outlive the pass, so that it is no use to copy them away."""


class _State(threading.local):
    run: LayerRun | None = None
    saving: Saving | None = None


_state = _State()


@contextmanager
def _layer_run(run: LayerRun) -> Iterator[None]:
    before, _state.run = _state.run, run
    try:
        yield
    finally:
        _state.run = before


def current_run() -> LayerRun | None:
    """Return the run of a checkpointed layer that goes on in this thread, or None."""
    return _state.run


def current_saving() -> Saving | None:
    """Return the record of a pass in "lean" mode that goes on in this thread, or None."""
    return _state.saving


def set_saving(saving: Saving | None) -> Saving | None:
    """Make a record that of this thread, and return the one before."""
    before, _state.saving = _state.saving, saving
    return before
