"""Tensors that autograd does not save because they are cheap to compute again.

A function whose output is cheap to compute from tensors that are saved anyway announces it:

    y = norm(s, weight)
    note(y, norm, s, weight)

While a model runs in "lean" mode (`malora.set_checkpointing`), an operation that would save y for its backward pass
then saves how to compute it, and y is freed. The backward pass calls `norm(s, weight)` when it needs y. Nothing that is
announced may take a GEMM.

What is kept of a Llama layer is two residual sums, queries, keys, values, the output of the attention, gate and up, and
what is as narrow as the adapters. The activations of the first layers are needed last. Some of them wait in pinned host
memory until then: `LeanPass` says when they leave and when they come back.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from malora.backbone.host_copies import HostCopy, HostMemory
from malora.fused.recomputation import current_saving

# Smaller tensors are not worth the launch of a copy to the host, bytes.
MIN_OFFLOADED_BYTES = 1 << 22


def note(output: Tensor, function: Callable[..., Tensor], *inputs: Any) -> None:
    """Announce that `function(*inputs)` computes `output` again.

    It has no effect outside of a pass in "lean" mode, and in compiled code. A change of `output` or of an input in
    place is noticed if it is one of torch's; kernels of other libraries do not leave a trace.

    Args:
        output: A contiguous tensor that fills its memory. Views of it are recognized.
        function: Returns a tensor of the same shape, strides and dtype. It runs without gradients and without
            autocast, on the stream of the backward pass. It must not refer to a module or a large tensor.
        inputs: Tensors that the backward pass keeps anyway, weights, and numbers or other constants.
    """
    if not torch.compiler.is_compiling() and isinstance(saving := current_saving(), LeanPass):
        saving.note(output, function, inputs)


class _Geometry(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Geometry:
        return cls(tensor.shape, tensor.stride(), int(tensor.storage_offset()))


class _OnDevice:
    """A saved tensor that stays where it is."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor.detach(), tensor._version  # the tensor itself may lead to its own node

    def get(self) -> Tensor:
        if self._tensor._version != self._version:
            raise RuntimeError(
                f"a tensor {tuple(self._tensor.shape)} that is needed for gradients was changed in place: it is at "
                f"version {self._tensor._version}, expected {self._version}."
            )
        return self._tensor


class _OnHost:
    """A saved tensor whose memory is copied to the host."""

    def __init__(self, copy: HostCopy, tensor: Tensor) -> None:
        self._copy, self._dtype, self._geometry = copy, tensor.dtype, _Geometry.of(tensor)

    def get(self) -> Tensor:
        return self._copy.fetch().view(self._dtype).as_strided(*self._geometry)


class _Constant:
    """An input that is no tensor."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def get(self) -> Any:
        return self._value


class _Recipe:
    """How to compute a tensor again. The result is kept until all operations that saved the tensor have had it."""

    def __init__(
        self, function: Callable[..., Tensor], inputs: list[_OnDevice | _OnHost | _Constant], device_type: str
    ) -> None:
        self.users = 0
        self._function, self._inputs, self._device_type = function, inputs, device_type
        self._made: Tensor | None = None

    def get(self) -> Tensor:
        made, self._made = self._made, None
        if made is None:
            inputs = [saved.get() for saved in self._inputs]
            with torch.no_grad(), torch.autocast(self._device_type, enabled=False):
                made = self._function(*inputs)
        self.users -= 1
        if self.users > 0:
            self._made = made
        return made


class _Recomputed:
    """A saved tensor that is computed again."""

    def __init__(self, recipe: _Recipe, tensor: Tensor) -> None:
        recipe.users += 1
        self._recipe, self._geometry = recipe, _Geometry.of(tensor)

    def get(self) -> Tensor:
        return self._recipe.get().as_strided(*self._geometry)


_Saved = _OnDevice | _OnHost | _Recomputed


class _Known(NamedTuple):
    """What is known of some memory on the device."""

    memory: StorageWeakRef  # while it exists, no other memory gets the same identity
    version: int
    dtype: torch.dtype


class LeanPass:
    """A forward pass in "lean" mode, and its backward pass.

    It refers to no module: a routing that the model's log keeps leads to this object through the autograd graph.

    Args:
        num_layers: Layers of the model.
        num_offloaded: Number of layers, from the first on, that keep their saved tensors in host memory.
        resident: Tensors that outlive the pass, such as weights.
        memory: Pinned buffers.
    """

    def __init__(self, num_layers: int, num_offloaded: int, resident: Iterable[Tensor], memory: HostMemory) -> None:
        self._num_offloaded, self._memory = num_offloaded, memory
        self._layer = -1  # the one that runs
        self._layer_backward = num_layers  # the last one whose backward pass has begun
        self._resident: dict[int, StorageWeakRef] = {}
        self.keep_on_device(*resident)
        self._notes: dict[int, tuple[_Known, _Recipe]] = {}
        self._copies: dict[int, tuple[_Known, HostCopy]] = {}
        self._copies_of: defaultdict[int, list[weakref.ref[HostCopy]]] = defaultdict(list)
        # The copies share the forward pass evenly. A layer's memory is freed once its share is over, and fetched when
        # the backward pass gets there.
        self._turn_of: defaultdict[int, list[int]] = defaultdict(list)
        for layer in range(num_offloaded):
            turn = -(-(layer + 1) * num_layers // num_offloaded)
            self._turn_of[min(turn, num_layers - 1)].append(layer)

    def keep_on_device(self, *tensors: Tensor) -> None:
        """Do not offload these tensors, because they outlive the pass."""
        if self._num_offloaded:
            storages = [tensor.untyped_storage() for tensor in tensors if _is_plain(tensor)]
            self._resident |= {storage._cdata: StorageWeakRef(storage) for storage in storages}

    def enter_layer(self, layer: int, tensors: Iterable[Tensor]) -> None:
        """Begin a layer.

        Args:
            layer: Its place in the model.
            tensors: Arguments that all layers share, such as masks.
        """
        if layer < self._num_offloaded:
            self.keep_on_device(*tensors)
        self._layer = layer
        self._release(self._turn_of.get(layer, ()))

    def end(self) -> None:
        """End the forward pass."""
        self._release(range(self._num_offloaded))
        self._num_offloaded = 0
        self._notes.clear()
        self._copies.clear()

    def _release(self, layers: Iterable[int]) -> None:
        for copy in self._copies_in(layers):
            copy.release()

    def _copies_in(self, layers: Iterable[int]) -> list[HostCopy]:
        found = (reference() for layer in layers for reference in self._copies_of[layer])
        return [copy for copy in found if copy is not None]

    def note(self, output: Tensor, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        """See `note`."""
        storage = output.untyped_storage()
        if output.is_contiguous() and storage.nbytes() == output.nbytes:
            kept = [self._keep(given) if isinstance(given, Tensor) else _Constant(given) for given in inputs]
            self._notes[storage._cdata] = _known(output), _Recipe(function, kept, output.device.type)

    def pack(self, tensor: Tensor) -> tuple[int, _Saved]:
        """Return what autograd saves in place of a tensor."""
        if _is_plain(tensor):
            known, recipe = self._notes.get(tensor.untyped_storage()._cdata, (None, None))
            if known is not None and recipe is not None and _is_still(known, tensor):
                return self._layer, _Recomputed(recipe, tensor)
        return self._layer, self._keep(tensor)

    def unpack(self, saved: tuple[int, _Saved]) -> Tensor:
        """Return the tensor."""
        layer, kept = saved
        while self._layer_backward > layer:  # the backward pass has reached another layer
            self._layer_backward -= 1
            for copy in self._copies_in(self._turn_of.get(self._layer_backward, ())):
                copy.prefetch()
        return kept.get()

    def _keep(self, tensor: Tensor) -> _OnDevice | _OnHost:
        if not 0 <= self._layer < self._num_offloaded or not _is_plain(tensor):
            return _OnDevice(tensor)
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        # A part of some memory is not copied as a whole. Expanded tensors have less memory than elements.
        if key in self._resident or not MIN_OFFLOADED_BYTES <= num_bytes <= 2 * tensor.nbytes:
            return _OnDevice(tensor)
        known, copy = self._copies.get(key, (None, None))
        if known is None or copy is None or not _is_still(known, tensor):
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            copy = HostCopy(whole, self._memory)
            self._copies[key] = _known(tensor), copy
            self._copies_of[self._layer].append(weakref.ref(copy))
        return _OnHost(copy, tensor)


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor has memory of its own; a quantized or sharded one may consist of others."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def _known(tensor: Tensor) -> _Known:
    return _Known(StorageWeakRef(tensor.untyped_storage()), tensor._version, tensor.dtype)


def _is_still(known: _Known, tensor: Tensor) -> bool:
    """Return whether a tensor in the same memory has not been changed since."""
    return known.version == tensor._version and known.dtype == tensor.dtype
