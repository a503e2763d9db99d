"""Forward and backward of one batch, as fast as the device allows.

A small model's step is thousands of kernels of a few microseconds, and launching them takes the host longer than the GPU
needs to run them. On one GPU a step is therefore captured as a CUDA graph, once for each shape of batch, and replayed:
the same kernels in the same order, launched at once. Elsewhere the plain step runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

import malora
from bench.data import Batch

logger = logging.getLogger(__name__)

Losses = tuple[Tensor, Tensor]  # task loss, balance loss


@contextmanager
def label_positions_only(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Inside it the model's head sees the hidden states of label positions only: its logits are [L, vocabulary]."""

    def select(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        hidden_BSh = inputs[0]
        return (hidden_BSh.flatten(0, 1).index_select(0, batch.row * hidden_BSh.shape[1] + batch.column),)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


class EagerStep:
    """One batch, kernel by kernel. Leaves the gradients in the parameters."""

    def __init__(self, model: nn.Module, wrapped: nn.Module, accelerator: Accelerator, balance_factor: float) -> None:
        self.model, self.wrapped, self.accelerator = model, wrapped, accelerator
        self.balance_factor = balance_factor
        self.routed = malora.has_router(model)
        self.after_forward: Callable[[], None] = lambda: None

    def __call__(self, batch: Batch) -> Losses:
        # No attention mask: padding stands to the right, where causal attention does not look, and without a mask
        # attention takes its fastest kernel. The balance loss is told what is padding.
        with label_positions_only(self.model, batch):
            logits = self.wrapped(input_ids=batch.ids, use_cache=False).logits
        loss = F.cross_entropy(logits.float(), batch.target)
        balance = malora.balance_loss(self.model, batch.mask) if self.routed else torch.zeros_like(loss)
        self.after_forward()
        self.accelerator.backward(loss + self.balance_factor * balance)
        return loss.detach(), balance.detach()


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Batch
    losses: Losses
    gradients: list[Tensor | None]
    routings: dict


class GraphedStep:
    """Replays an `EagerStep`. Batches of another number of examples, the last of an epoch, take the plain path."""

    def __init__(self, eager: EagerStep, batch_size: int) -> None:
        self.eager, self.batch_size = eager, batch_size
        self.parameters = [p for p in eager.model.parameters() if p.requires_grad]
        self.captured: dict[tuple, _Captured] = {}
        self.usable = True

    def __call__(self, batch: Batch) -> Losses:
        if not self.usable or len(batch.ids) != self.batch_size:
            return self.eager(batch)
        shape = (batch.ids.shape, batch.target.shape)
        if shape not in self.captured:
            try:
                self.captured[shape] = self._capture(batch)
            except RuntimeError as error:
                # Some model does what a graph cannot hold. The result is the same, only slower.
                logger.warning("no CUDA graphs in this run (%s); going on without.", str(error).splitlines()[0])
                self.usable = False
                torch.cuda.synchronize()
                return self.eager(batch)
        step = self.captured[shape]
        for static, new in zip(vars(step.inputs).values(), vars(batch).values(), strict=True):
            static.copy_(new, non_blocking=True)
        step.graph.replay()
        for parameter, gradient in zip(self.parameters, step.gradients, strict=True):
            parameter.grad = gradient
        if self.eager.routed:
            self.eager.model.base_model.routing_log.routings = step.routings
        return step.losses

    def _capture(self, batch: Batch) -> _Captured:
        inputs = Batch(*(tensor.clone() for tensor in vars(batch).values()))
        if not self.captured:
            # Libraries set themselves up in the first passes, which a graph cannot hold.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self.eager(inputs)
            torch.cuda.current_stream().wait_stream(stream)
        for parameter in self.parameters:
            parameter.grad = None  # so that the backward pass makes gradients of its own, in the graph's memory
        graph = torch.cuda.CUDAGraph()
        # Replays follow each other, so graphs share one pool of memory; what a graph gives back stays its own.
        pool = next(iter(self.captured.values())).graph.pool() if self.captured else None
        with torch.cuda.graph(graph, pool=pool):
            losses = self.eager(inputs)
        gradients = [parameter.grad for parameter in self.parameters]
        routings = dict(self.eager.model.base_model.routing_log.routings) if self.eager.routed else {}
        return _Captured(graph, inputs, losses, gradients, routings)
