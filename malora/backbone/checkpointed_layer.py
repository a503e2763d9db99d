"""Checkpointed decoder layers: the activations of a layer are recomputed in the backward pass.

How one layer goes:

1. The first run counts the tensors that autograd saves, and keeps none of them. It keeps the layer's input: on the
   device, or in "offload" mode as a copy in pinned host memory.
2. The backward pass asks for the first of them. The layer runs again, until as many tensors are saved as in the first
   run, and hands them out.
3. Meanwhile the input of the layer before is copied back.

`torch.utils.checkpoint` without reentrance does the first two. Three things are added here:

- The fused path packs no weights again, and draws the same dropout masks from the same seeds
  (`malora.fused.recomputation.LayerRun`). The states of torch's generators serve other dropout. A CUDA graph cannot
  have them, so a capture goes without if no other dropout is found.
- If the last group of projections in the layer is that of the last saved tensors, its GEMMs with frozen weights are
  left out. In a Llama layer that is the down projection, a fifth of all arithmetic.
- Inputs are offloaded.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from malora.backbone.host_copies import HostCopy, HostMemory
from malora.fused.recomputation import LayerRun
from malora.layer import MaloraLayer


class Offload:
    """What the layers of a model share in "offload" mode.

    Attributes:
        memory: The pinned buffers.
        last: The layer run that began last.
    """

    def __init__(self) -> None:
        self.memory = HostMemory()
        self.last: Callable[[], CheckpointedRun | None] = _no_run

    def __reduce__(self) -> tuple[type[Offload], tuple[()]]:
        """Copy or pickle it as new."""
        return Offload, ()


def _no_run() -> None:
    return None


class CheckpointedLayer:
    """Runs a layer so that its activations are recomputed, as transformers' `_gradient_checkpointing_func`.

    Args:
        layer: The layer, which is searched for dropout.
        place: Its place in its stack of layers.
        is_last: Whether it is the last one there. Its input is needed at once, so it is not offloaded.
        offload: What the layers share in "offload" mode; None in "full" mode.
    """

    def __init__(self, layer: nn.Module, place: int, is_last: bool, offload: Offload | None) -> None:
        self.mode = "full" if offload is None else "offload"
        self.place, self.is_last, self.offload = place, is_last, offload
        self._adapted = [module for module in layer.modules() if isinstance(module, MaloraLayer)]
        theirs = {part for module in self._adapted for part in module.modules()}
        self._others = [module for module in layer.modules() if module not in theirs]

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return `function(*args, **kwargs)`."""
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        if torch.compiler.is_compiling():  # the compiler recomputes by rules of its own
            return checkpoint(function, *args, use_reentrant=False, **kwargs)
        is_capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        keeps_rng_state = not is_capturing or self.has_other_dropout()
        run = CheckpointedRun(partial(function, **kwargs), args, keeps_rng_state)
        if self.offload is not None:
            run.offload_input(self.offload, self.place, self.is_last)
        return run.first(*args)

    def has_other_dropout(self) -> bool:
        """Return whether the layer has dropout of which the fused path does not keep the seeds."""
        if any(_has_active_dropout(module) for module in self._others):
            return True
        rates = (c.lora_dropout for layer in self._adapted if layer.training for c in layer.settings.values())
        return any(rates) and any(layer.adapter_for_fused_path() is None for layer in self._adapted)


def _has_active_dropout(module: nn.Module) -> bool:
    """Return whether a module drops values by itself: it is a Dropout, or has a rate that is named so."""
    own = vars(module)
    rates = [own.get("p")] if "Dropout" in type(module).__name__ else [own[name] for name in own if "drop" in name]
    return module.training and any(isinstance(rate, float) and rate > 0 for rate in rates)


class _EndOfRun(Exception):
    """The second run of a layer has saved all tensors that are needed."""


class CheckpointedRun:
    """One run of a checkpointed layer, and its recomputation.

    Args:
        function: Computes the layer.
        args: Its arguments. The first tensor is the layer's input.
        keeps_rng_state: Whether to draw the same random numbers again from the generators of torch.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], keeps_rng_state: bool) -> None:
        self.function, self.args = function, args
        self.kept = LayerRun()
        self.input: HostCopy | None = None
        self.input_requires_grad = False
        self.place = -1
        self.before: Callable[[], CheckpointedRun | None] = _no_run
        self._recomputed: dict[int, Tensor] = {}
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self._versions = [tensor._version for tensor in tensors]
        self._contexts = _autocast_contexts(self.device)
        self._rng_states = _rng_states(self.device) if keeps_rng_state else None

    def offload_input(self, offload: Offload, place: int, is_last: bool) -> None:
        """Keep the input in host memory, and free the device memory of the input of the layer before."""
        before = offload.last()
        if before is not None:
            if before.input is not None:
                before.input.release()
            if before.place + 1 == place:
                self.before = offload.last
        offload.last, self.place = weakref.ref(self), place
        x = self.args[0] if self.args else None
        if is_last or not isinstance(x, Tensor) or (x.is_leaf and x.requires_grad):  # the graph keeps such a leaf
            return
        self.input, self.input_requires_grad = HostCopy(x, offload.memory), x.requires_grad
        self.args, self._versions = self.args[1:], self._versions[1:]

    def first(self, *args: Any) -> Any:
        """Run the layer for the first time."""
        with saved_tensors_hooks(self._pack, self._unpack), self.kept.recording():
            return self.function(*args)

    def _pack(self, tensor: Tensor) -> int:
        self.kept.saved += 1
        return self.kept.saved - 1

    def _unpack(self, place: int) -> Tensor:
        if place not in self._recomputed:
            self._recompute()
        return self._recomputed.pop(place)

    def _recompute(self) -> None:
        """Run the layer again, and keep what autograd saves."""
        args = self._fetch_args()
        found = self._recomputed = {}

        def pack(tensor: Tensor) -> Tensor:
            found[len(found)] = tensor.detach()
            if len(found) == self.kept.saved:
                raise _EndOfRun
            return found[len(found) - 1]

        with ExitStack() as stack:
            for context in self._contexts:
                stack.enter_context(context())
            stack.enter_context(_random_numbers(self.device, self._rng_states))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(saved_tensors_hooks(pack, _as_it_is))
            stack.enter_context(self.kept.replaying())
            try:
                self.function(*args)
            except _EndOfRun:
                return
        raise RuntimeError(
            f"a checkpointed layer saved {self.kept.saved} tensors in its forward pass and only {len(found)} when it "
            "ran again. Its code must do the same in both; look for state that changes between two calls."
        )

    def _fetch_args(self) -> tuple[Any, ...]:
        tensors = [arg for arg in self.args if isinstance(arg, Tensor)]
        if [tensor._version for tensor in tensors] != self._versions:
            raise RuntimeError("an argument of a checkpointed layer was changed in place after its forward pass.")
        if self.input is None:
            args = self.args
        else:
            x = self.input.fetch().detach().requires_grad_(self.input_requires_grad)
            self.input.forget()
            args = (x, *self.args)
        before = self.before()
        if before is not None and before.input is not None:
            before.input.prefetch()
        return args


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _autocast_contexts(device: torch.device) -> list[Callable[[], Any]]:
    """Return functions that make contexts with the autocast settings of now."""
    cached = torch.is_autocast_cache_enabled()
    return [
        partial(
            torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind),
            cache_enabled=cached,
        )
        for kind in dict.fromkeys((device.type, "cpu"))
    ]  # fmt: skip


def _rng_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _random_numbers(device: torch.device, states: tuple[Tensor, Tensor | None] | None) -> Iterator[None]:
    """Draw the random numbers that follow the given states, and then go on as if nothing was drawn."""
    if states is None:
        yield
        return
    with torch.random.fork_rng([] if states[1] is None else [device]):
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], device)
        yield
