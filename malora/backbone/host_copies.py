"""Copies of activations in pinned host memory, made and fetched without making the host wait.

All copies of a device run on one side stream, so they run in the order of the calls, at the same time as kernels:

1. `HostCopy(tensor)` starts the copy to the host. The side stream waits for the kernels that write the tensor.
2. `release()` frees the tensor on the device. The main stream then waits for the copy, so call it some layers later.
3. `prefetch()` starts the copy back into new device memory; call it some layers before the tensor is needed.
4. `fetch()` returns the tensor. The main stream waits for the copy back.

All four can be captured into a CUDA graph. Memory is ordered by events: `Tensor.record_stream` would keep a graph from
reusing it. Off CUDA the copies are plain ones.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from malora.fused.tensor_utils import is_captured


class HostMemory:
    """Pinned buffers that are reused from step to step, and the side streams of the copies.

    A pinned allocation takes milliseconds. PyTorch rounds its size up to a power of two, so buffers have such sizes.

    A CUDA graph writes to its buffers in every replay. Other graphs may share them, if each holds a forward pass with
    its backward pass. Work that is not captured may not.
    """

    def __init__(self) -> None:
        self._free: defaultdict[tuple[torch.device, int], list[Tensor]] = defaultdict(list)
        self._free_in_graphs: defaultdict[tuple[torch.device, int], list[Tensor]] = defaultdict(list)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def take(self, num_bytes: int, device: torch.device, *, in_graph: bool) -> Tensor:
        """Return a uint8 buffer of at least `num_bytes`, for copies from a device.

        A capture takes over what the passes before it have left, because it cannot allocate.
        """
        size = 1 << max(num_bytes - 1, 1).bit_length()
        for free in (self._free_in_graphs, self._free) if in_graph else (self._free,):
            if free[device, size]:
                return free[device, size].pop()
        return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def give_back(self, buffer: Tensor, device: torch.device, *, in_graph: bool) -> None:
        """Take a buffer back.

        Its next copy comes after all earlier ones, because they run on one stream.
        """
        (self._free_in_graphs if in_graph else self._free)[device, buffer.numel()].append(buffer)

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return the side stream of a device."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def clear(self) -> None:
        """Free the buffers that are not in use."""
        self._free.clear()
        self._free_in_graphs.clear()

    def __reduce__(self) -> tuple[type[HostMemory], tuple[()]]:
        """Copy or pickle it as empty."""
        return HostMemory, ()


class HostCopy:
    """A tensor that is copied to the host and, later, back.

    Args:
        tensor: Any strides.
        memory: Gives the buffer, and takes it back when this object is gone.
    """

    def __init__(self, tensor: Tensor, memory: HostMemory) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self._memory = memory
        self._is_captured = is_captured(tensor)
        self._buffer = memory.take(tensor.nbytes, tensor.device, in_graph=self._is_captured)
        self._host = self._buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._source: Tensor | None = tensor.detach()  # on the device, until it is released
        self._loaded: Tensor | None = None  # on the device again
        self._copied = self._copy(self._host, self._source)
        self._arrived: torch.cuda.Event | None = None

    def _copy(self, to: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy on the side stream, once it has waited for the main one, and return the event of its end."""
        if self.device.type != "cuda":
            to.copy_(source)
            return None
        stream = self._memory.stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)
            event: torch.cuda.Event = stream.record_event()
            return event

    def _wait(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def release(self) -> None:
        """Free the tensor on the device, once it is on the host."""
        if self._source is not None:
            self._wait(self._copied)
            self._source = None

    def prefetch(self) -> None:
        """Start to copy the tensor back, unless it is on the device."""
        if self._loaded is None and self._source is None:
            self._loaded = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self._arrived = self._copy(self._loaded, self._host)

    def fetch(self) -> Tensor:
        """Return the tensor on the device, and keep it there."""
        if self._loaded is None and self._source is not None:
            return self._source
        self.prefetch()
        self._wait(self._arrived)
        self._arrived = None
        assert self._loaded is not None
        return self._loaded

    def forget(self) -> None:
        """Keep the tensor on the device no longer; it can be fetched again."""
        self._wait(self._arrived)
        self._loaded = self._arrived = None

    def __del__(self) -> None:
        # Memory that is still written to must not be reused, and a capture must not end before it has waited for all
        # streams. An event belongs to the capture in which it was recorded.
        if self._arrived is not None and self._is_captured == torch.cuda.is_current_stream_capturing():
            self._wait(self._arrived)
        self._memory.give_back(self._buffer, self.device, in_graph=self._is_captured)
