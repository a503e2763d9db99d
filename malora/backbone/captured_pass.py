"""One training pass as a CUDA graph: its inputs, outputs and gradients. `malora.backbone.capture` has one per shape."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from malora.backbone.cuda_graphs import capture
from malora.backbone.nested import map_tensors, tensors_of
from malora.layer import MaloraLayer
from malora.routing import RoutingLog

# Forward and backward of a micro-batch, with a factor of the loss; returns the outputs.
Pass = Callable[[Any, "Tensor | float | None"], Any]

MAX_WAITING_BYTES = 1 << 26  # of gradients of a pass that are not yet added to those of the passes before


class Gradients:
    """The memory to which all graphs of a model add their gradients.

    Args:
        model: Its trainable parameters have the gradients. Those that are there move into this memory.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.sums: list[Tensor] = []
        for parameter in self.parameters:  # one after the other, so that there are never two of all gradients
            total = torch.zeros_like(parameter)
            if parameter.grad is not None:
                parameter.grad = total.copy_(parameter.grad)
            self.sums.append(total)

    def prepare(self, chosen: list[int]) -> None:
        """Put the sums into the `.grad` of some parameters, with the value that was there."""
        unset, sources, targets = [], [], []
        for index in chosen:
            parameter, total = self.parameters[index], self.sums[index]
            if parameter.grad is None:
                unset.append(total)
            elif parameter.grad is not total:
                sources.append(parameter.grad)
                targets.append(total)
            parameter.grad = total
        if unset:  # the foreach functions refuse empty lists
            torch._foreach_zero_(unset)
        if sources:
            torch._foreach_copy_(targets, sources)

    def add_pass(self, run: Callable[[], Any]) -> tuple[Any, list[int]]:
        """Run a pass and add its gradients to the sums.

        Gradients are added many at a time, because a launch for each takes longer than the sums, and are freed then.

        Returns:
            What `run` returns, and the indices of the parameters that got a gradient.
        """
        before = [parameter.grad for parameter in self.parameters]
        waiting: list[tuple[Tensor, Tensor]] = []  # sums, and what is to be added to them
        trained: dict[int, None] = {}

        def add_waiting() -> None:
            if waiting:
                sums, gradients = zip(*waiting, strict=True)
                torch._foreach_add_(sums, gradients)
                waiting.clear()

        def take(index: int, parameter: Tensor) -> None:
            assert parameter.grad is not None
            if any(total is self.sums[index] for total, _ in waiting):  # one launch adds to each sum once
                add_waiting()
            waiting.append((self.sums[index], parameter.grad))
            parameter.grad = None
            trained[index] = None
            if sum(gradient.nbytes for _, gradient in waiting) >= MAX_WAITING_BYTES:
                add_waiting()

        hooks = [p.register_post_accumulate_grad_hook(partial(take, i)) for i, p in enumerate(self.parameters)]
        for parameter in self.parameters:
            parameter.grad = None  # so that the gradients are those of this pass alone
        try:
            outputs = run()
            add_waiting()
        finally:
            for parameter, gradient, hook in zip(self.parameters, before, hooks, strict=True):
                parameter.grad = gradient
                hook.remove()
        return outputs, sorted(trained)


class CapturedPass:
    """A CUDA graph of forward and backward, and the tensors that it reads and writes."""

    def __init__(
        self,
        model: nn.Module,
        forward_backward: Pass,
        micro_batch: Any,
        scale: Tensor | float | None,
        gradients: Gradients,
        pool: Any,
        stream: torch.cuda.Stream | None,
    ) -> None:
        device = next(model.parameters()).device
        self.inputs = map_tensors(lambda tensor: tensor.detach().to(device, copy=True), micro_batch)
        self.scale = None if scale is None else torch.empty((), device=device)
        self.gradients = gradients
        self.log = _routing_log(model)

        def run() -> None:
            with _autocast_without_cache(device.type):
                outputs, self.trained = gradients.add_pass(lambda: forward_backward(self.inputs, self.scale))
            self.outputs = map_tensors(Tensor.detach, outputs)
            self.routing = self.log.snapshot()
            self.log.restore(self.routing)  # drops the autograd graph of the pass

        self.graph = capture(run, passes=0, pool=pool, stream=stream)

    def replay(self, micro_batch: Any, scale: Tensor | float | None) -> Any:
        """Copy the micro-batch into the inputs, launch the graph, and return copies of the outputs."""
        for static, new in zip(tensors_of(self.inputs), tensors_of(micro_batch), strict=True):
            static.copy_(new, non_blocking=True)
        if isinstance(scale, Tensor):
            assert self.scale is not None
            self.scale.copy_(scale, non_blocking=True)
        elif scale is not None:
            assert self.scale is not None
            self.scale.fill_(scale)
        self.gradients.prepare(self.trained)
        self.graph.replay()
        self.log.restore(self.routing)
        return map_tensors(Tensor.clone, self.outputs)


def _autocast_without_cache(device_type: str) -> AbstractContextManager[Any]:
    """Return the autocast that is active, without its cache: that may hold weights cast outside of the graph."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, dtype=torch.get_autocast_dtype(device_type), cache_enabled=False)


def _routing_log(model: nn.Module) -> RoutingLog:
    """Return the routing log of the model's adapted layers; an empty one if there are none."""
    for module in model.modules():
        if isinstance(module, MaloraLayer) and module.routing_log is not None:
            return module.routing_log
    return RoutingLog()
