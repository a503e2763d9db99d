"""The hooks that make a model run in "lean" mode."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from malora.backbone.host_copies import HostMemory
from malora.backbone.recompute import LeanPass
from malora.fused.recomputation import Saving, current_saving, set_saving


class LeanMode:
    """Surrounds each forward pass of a model by a `LeanPass`.

    Args:
        model: The base model.
        layers: Its decoder layers.
        num_offloaded: Number of layers, from the first on, that keep their saved tensors in host memory.
    """

    def __init__(self, model: nn.Module, layers: list[nn.Module], num_offloaded: int) -> None:
        self.memory = HostMemory()
        self.num_offloaded = num_offloaded
        self._layers = layers
        self._active: list[tuple[LeanPass, saved_tensors_hooks, Saving | None] | None] = []
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after, always_call=True),
            *(
                layer.register_forward_pre_hook(EnterLayer(place), with_kwargs=True)
                for place, layer in enumerate(layers)
            ),
        ]

    @staticmethod
    def of(model: nn.Module) -> LeanMode | None:
        """Return the mode of a base model, or None if it runs in another one."""
        owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
        return next((owner for owner in owners if isinstance(owner, LeanMode)), None)

    def remove(self) -> None:
        """Remove the hooks, and free the pinned memory."""
        for handle in self._handles:
            handle.remove()
        while self._active:
            self._after(nn.Identity(), (), None)
        self.memory.clear()

    def _before(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        # A model may call itself. Or this one is what a KeyboardInterrupt left, after which no hook runs: free it.
        for active in self._active:
            if active is not None:
                active[0].end()
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._active.append(None)
            return
        offloaded = self._layers[: self.num_offloaded]
        weights = chain.from_iterable(chain(layer.parameters(), layer.buffers()) for layer in offloaded)
        lean = LeanPass(len(self._layers), self.num_offloaded, weights, self.memory)
        hooks = saved_tensors_hooks(lean.pack, lean.unpack)
        hooks.__enter__()
        self._active.append((lean, hooks, set_saving(lean)))

    def _after(self, model: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        """End the pass; after an exception in it, too."""
        active = self._active.pop() if self._active else None
        if active is not None:
            lean, hooks, before = active
            hooks.__exit__()
            set_saving(before)
            lean.end()

    def __getstate__(self) -> dict[str, Any]:
        """Copy or pickle the mode without the state of a pass."""
        return vars(self) | {"_active": []}


class EnterLayer:
    """A hook of one layer, which tells the pass that the layer begins."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin the layer."""
        if not torch.compiler.is_compiling() and isinstance(lean := current_saving(), LeanPass):
            lean.enter_layer(self.place, _tensors_in(kwargs.values()))


def _tensors_in(values: Any) -> Iterator[Tensor]:
    """Iterate over the tensors among values, and in tuples and lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors_in(value)
