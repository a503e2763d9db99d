"""Which adapter each row of a batch uses: PEFT's argument `adapter_names`.

| symbol | meaning |
| --- | --- |
| B | rows of the batch, the size of an input's first dimension |
| R | rows of one adapter |
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

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

    def join(self, parts: dict[str, Tensor], like: Tensor) -> Tensor:
        """Return the rows of all adapters in the order of the batch, [B, ...].

        Args:
            parts: Rows by adapter, [R, ...] in the dtype of `like`. An adapter without an entry gets zeros.
            like: Tensor of the shape of the result.
        """
        grouped = [
            parts[name] if name in parts else like.new_zeros(_count(index), *like.shape[1:])
            for name, index in self.rows.items()
        ]
        joined = torch.cat(grouped) if len(grouped) > 1 else grouped[0]
        return joined if self.restore is None else joined.index_select(0, self.restore)


def _count(index: Index) -> int:
    return len(index) if isinstance(index, Tensor) else int(index.stop - index.start)


class AdapterRows:
    """The adapter of each row of a batch.

    Args:
        names: Name of each row's adapter, or `NO_ADAPTER`.
        repeats: How often `generate` repeats each row one after the other, as in beam search. Layers may see the batch
            with and without these repetitions: an encoder does not get them.

    Attributes:
        flattened: Numbers of tokens that a batch has in all rows together. Some models, such as OPT, flatten batch and
            sequence. An input of two dimensions and this length has the tokens of the first row first.
    """

    def __init__(self, names: Sequence[str], repeats: int = 1) -> None:
        self.names, self.repeats = tuple(names), repeats
        self.flattened: set[int] = set()
        self._groupings: dict[tuple[int, torch.device], Grouping] = {}

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
