"""Copies of weights for all passes between two changes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from malora.layer import MaloraLayer

if TYPE_CHECKING:
    from torch import Tensor

    from malora.fused.packed_weights import Copies, Form, Stack


class WeightCache:
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

    A layer's first pass, passes without gradients, and other backends do without it. Graphs of passes inside `with`
    read what the last `refresh` left, so a graph of `refresh` goes before them. The copies stay where they are until a
    `refresh` finds that the model would train other adapters, or in another dtype or on another device, than before;
    graphs are to be captured anew then.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = (module for module in model.modules() if isinstance(module, MaloraLayer))
        self._families = list(dict.fromkeys(layer.group for layer in layers))
        self._forms: list[tuple[Stack, Form]] = []
        self._copies: list[Copies] = []
        self._units: dict[Stack, Tensor | None] = {}  # what h is multiplied by in 8 bits
        self._depth = 0  # of `with`

    def __bool__(self) -> bool:
        """Whether there is anything to refresh."""
        return bool(self._copies)

    def refresh(self) -> None:
        """Make them anew, of all layers that have been in a training pass. A backward pass of before then fails."""
        forms = [(stack, stack.form) for family in self._families for stack in family.stacks() if stack.form]
        if forms != self._forms:
            from malora.fused.packed_weights import room_for_copies  # it needs Triton, which is not everywhere

            self._hold(False)
            self._forms, self._copies, self._units = forms, room_for_copies(forms), {}
        for family in self._families:
            family.beside = None
        for copies in self._copies:
            copies.make()
            torch.autograd.graph.increment_version(copies.flat)  # a kernel of ours does not
            for stack, narrow in copies.pairs:
                self._units[stack] = stack.lay_beside(narrow, self._units.get(stack))
        self._hold(self._depth > 0)

    def _hold(self, holds: bool) -> None:
        for copies in self._copies:
            for stack, narrow in copies.pairs:
                stack.held = narrow if holds else None

    def __enter__(self) -> WeightCache:
        self._depth += 1
        self._hold(True)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        self._hold(self._depth > 0)
