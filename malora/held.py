"""Copies of weights for all passes between two changes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from malora.layer import MaloraLayer

if TYPE_CHECKING:
    from malora.backends.stack import Copies, Narrow, Stack


class HeldWeights:
    """A model's weights as the fused backends read them, made once for several training passes.

    These backends read narrow copies, and have B beside the frozen weights. A fused optimizer's step does not raise a
    weight's version, so they cannot tell that nothing has changed, and every training pass makes its own. Who trains
    knows it:

        held = malora.HeldWeights(model)
        for batch in batches:
            held.refresh()
            with held:
                for part in batch:
                    loss_of(model, part).backward()
            optimizer.step()

    A layer's first pass, passes without gradients, and other backends do without it. Its copies stay where they are:
    graphs of passes inside `with` read what the last `refresh` left, so a graph of `refresh` goes before them.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = (module for module in model.modules() if isinstance(module, MaloraLayer))
        self._families = list(dict.fromkeys(layer.siblings for layer in layers))
        self._copies: list[Copies] = []

    def __bool__(self) -> bool:
        """Whether there is anything to refresh."""
        return bool(self._copies)

    def refresh(self) -> None:
        """Make them anew, of all layers that have been in a training pass. A backward pass of before then fails."""
        stacks = [stack for family in self._families for stack in family.stacks() if stack.has_run]
        if stacks != [stack for stack, _ in self._pairs]:
            from malora.backends.stack import room_for_copies  # it needs Triton, which is not everywhere

            self._copies = room_for_copies(stacks)
        for copies in self._copies:
            copies.make()
            torch.autograd.graph.increment_version(copies.flat)  # a kernel of ours does not
        for stack, narrow in self._pairs:
            stack.lay_beside(narrow)

    @property
    def _pairs(self) -> list[tuple[Stack, Narrow]]:
        return [pair for copies in self._copies for pair in zip(copies.stacks, copies.narrow, strict=True)]

    def __enter__(self) -> HeldWeights:
        for stack, narrow in self._pairs:
            stack.held = narrow
        return self

    def __exit__(self, *_: object) -> None:
        for stack, _ in self._pairs:
            stack.held = None
