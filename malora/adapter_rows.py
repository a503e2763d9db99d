"""Which adapter each row of a batch uses: PEFT's argument `adapter_names`.

| symbol | meaning |
| --- | --- |
| B | rows of the batch, the size of an input's first dimension |
| R | rows of one adapter |
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

NO_ADAPTER = "__base__"  # PEFT's name for rows of the base model alone

Index = slice | Tensor  # a slice, or positions [R], int64


class Grouping(NamedTuple):
    """The rows of a batch, grouped by adapter.

    Attributes:
        rows: Rows of each adapter, in the order in which the adapters first appear.
        restore: Position of each row of the batch in the grouped order, [B], int64; None if both orders agree.
    """

    rows: dict[str, Index]
    restore: Tensor | None

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the rows of all adapters in the order of the batch, [B, ...].

        Args:
            parts: All rows in the grouped order, in one or several tensors.
        """
        joined = torch.cat([*parts]) if len(parts) > 1 else parts[0]
        return joined if self.restore is None else joined.index_select(0, self.restore)


class Segment(NamedTuple):
    """Rows that are computed together.

    Attributes:
        names: Their adapters, in the grouped order.
        rows: The rows. If there are several adapters, each has equally many.
        stack: Position of the adapters' stack among those in use, or None.
        members: The adapters in the stack.
    """

    names: tuple[str, ...]
    rows: Index
    stack: int | None
    members: slice


class AdapterRows:
    """The adapter of each row of a batch.

    Args:
        names: Name of each row's adapter, or `NO_ADAPTER`.
        repeats: How often `generate` repeats each row one after the other, as in beam search. Layers may see the batch
            with and without these repetitions: an encoder does not get them.

    Attributes:
        flattened: Numbers of tokens that a batch has in all rows together. Some models, such as OPT, flatten batch and
            sequence. An input of two dimensions and this length has the tokens of the first row first.
        weights: Weights of the adapters of each stack in use, by the layer's name. See `malora.adapter_stack`.
        outputs: What layers have computed for others that read the same input, until those fetch it.
    """

    def __init__(self, names: Sequence[str], repeats: int = 1) -> None:
        self.names, self.repeats = tuple(names), repeats
        self.flattened: set[int] = set()
        self.weights: list[dict[str, Any]] = []
        self.outputs: dict[Any, Any] = {}
        self._stacks: list[tuple[str, ...]] = []
        self._groupings: dict[tuple[int, torch.device], Grouping] = {}
        self._segments: dict[tuple[int, torch.device], list[Segment]] = {}

    def use_stacks(self, stacks: Sequence[Any], dtype: torch.dtype | None) -> None:
        """Compute adapters of one stack together in this pass.

        Args:
            stacks: `AdapterStack` objects.
            dtype: Dtype of the pass's matmuls; None for that of the adapters.
        """
        in_use = [stack for stack in stacks if not set(self.names).isdisjoint(stack.names)]
        self._stacks = [stack.names for stack in in_use]
        self.weights = [stack.weights(dtype or stack.flat[0].dtype) for stack in in_use]
        self._segments.clear()

    def segments(self, x: Tensor) -> list[Segment]:
        """Divide the rows of x among as few segments as possible, in the grouped order."""
        key = len(x), x.device
        if key not in self._segments:
            found: list[Segment] = []
            for name, index in self.grouping(x).rows.items():
                segment = self._segment_of(name, index)
                joined = _join_segments(found[-1], segment) if found else None
                if joined is not None:
                    found[-1] = joined
                else:
                    found.append(segment)
            self._segments[key] = found
        return self._segments[key]

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """Return the rows of x of each segment."""
        segments = self.segments(x)
        if self.grouping(x).restore is not None:
            return [x[segment.rows] for segment in segments]
        sizes = [s.rows.stop - s.rows.start for s in segments if isinstance(s.rows, slice)]  # all are
        # A slice of all rows would cost a copy in the backward pass, and several slices one each.
        return [x] if len(segments) == 1 else x.split(sizes)

    def _segment_of(self, name: str, index: Index) -> Segment:
        for number, names in enumerate(self._stacks):
            if name in names:
                place = names.index(name)
                return Segment((name,), index, number, slice(place, place + 1))
        return Segment((name,), index, None, slice(0))

    def grouping(self, x: Tensor) -> Grouping:
        """Return the grouping of the rows of x, [B, ...].

        Raises:
            ValueError: There are not as many names as rows.
        """
        key = len(x), x.device
        if key not in self._groupings:
            self._groupings[key] = _group(self.names, self._repeats_in(x), x.device)
        return self._groupings[key]

    def select(self, adapter: str, tensor: Tensor) -> Tensor:
        """Return an adapter's rows of a tensor, [R, ...]."""
        return tensor[self.grouping(tensor).rows[adapter]]

    def names_of(self, x: Tensor) -> list[str]:
        """Return the name of the adapter of each row of x."""
        return [name for name in self.names for _ in range(self._repeats_in(x))]

    def _repeats_in(self, x: Tensor) -> int:
        repeats, rest = divmod(len(x), len(self.names)) if self.names else (0, len(x))
        if not rest and (repeats in (1, self.repeats) or (x.dim() <= 2 and len(x) in self.flattened)):
            return repeats
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(self.names)} and {len(x)} respectively. Give one name per row of the batch; "
            f"{NO_ADAPTER!r} stands for the base model."
        )


def _join_segments(first: Segment, second: Segment) -> Segment | None:
    """Return a segment of one stack and the next adapter as one; None if they cannot be computed together."""
    if first.stack is None or first.stack != second.stack or first.members.stop != second.members.start:
        return None
    if isinstance(first.rows, Tensor) or isinstance(second.rows, Tensor) or first.rows.stop != second.rows.start:
        return None
    count = (first.rows.stop - first.rows.start) // len(first.names)
    if second.rows.stop - second.rows.start != count:
        return None
    return Segment(
        first.names + second.names,
        slice(first.rows.start, second.rows.stop),
        first.stack,
        slice(first.members.start, second.members.stop),
    )


# A CUDA graph cannot be captured while positions are copied to the GPU. So the pass before the capture makes them. The
# routing log's snapshot of a captured pass keeps them when they are no longer here.
@lru_cache(maxsize=64)
def _group(names: tuple[str, ...], repeats: int, device: torch.device) -> Grouping:
    """Group rows by adapter; each name stands for `repeats` rows, one after the other."""
    positions: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        positions.setdefault(name, []).extend(range(place * repeats, (place + 1) * repeats))
    rows: dict[str, Index] = {}
    for name, places in positions.items():
        if places[-1] - places[0] + 1 == len(places):  # a slice copies nothing
            rows[name] = slice(places[0], places[-1] + 1)
        else:
            rows[name] = torch.tensor(places, device=device)
    order = torch.tensor([place for places in positions.values() for place in places])
    restore = order.argsort()
    return Grouping(rows, None if torch.equal(restore, order.sort().values) else restore.to(device))
