"""Forward and backward of one batch, as fast as the device allows.

A small model's step is thousands of kernels of a few microseconds, and launching them takes the host longer than it
takes the GPU to run them. On one GPU the frozen parts therefore take the kernels of `bench.liger`, which are fewer and
larger, and a step is captured as a CUDA graph, once for each shape of batch, and replayed: the same kernels in the same
order, launched at once. Elsewhere the plain step runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

import malora
from bench.runtime.attention import exact_with_masks
from bench.runtime.logits import label_positions_only
from bench.train.batching import Batch
from malora.backbone.cuda_graphs import accumulate_grads, capture, capture_refresh, warm_up
from malora.routing import Routing

Losses = tuple[Tensor, Tensor]  # task loss, balance loss


class EagerStep:
    """One batch, kernel by kernel. Leaves the gradients in the parameters."""

    def __init__(
        self,
        model: nn.Module,
        wrapped: nn.Module,
        accelerator: Accelerator,
        balance_factor: float,
        kernels: AbstractContextManager | None = None,
    ) -> None:
        """`kernels` is entered for every forward pass."""
        self.model, self.wrapped, self.accelerator = model, wrapped, accelerator
        self.balance_factor = balance_factor
        self.kernels = kernels or nullcontext()
        self.routed = malora.has_router(model)
        self.dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else model.dtype  # of attention
        self.mark: Callable[[str], None] = lambda part: None  # called as each part of the work is done

    def __call__(self, parts: list[Batch]) -> Losses:
        losses = [self.part(part) for part in parts]
        return sum(loss for loss, _ in losses), sum(balance for _, balance in losses)

    def part(self, batch: Batch) -> Losses:
        """Forward and backward of a part; its losses are shares of the whole batch's, by label tokens."""
        positions = label_positions_only(self.model, batch.row, batch.column)
        with self.kernels, exact_with_masks(batch.ids.device), positions:
            logits = self.wrapped(
                input_ids=batch.ids,
                position_ids=batch.position,
                attention_mask=batch.attention_bias(self.dtype),
                use_cache=False,
            ).logits
        loss = F.cross_entropy(logits.float(), batch.target, reduction="sum") / batch.labels
        balance = torch.zeros_like(loss)
        if self.routed:
            balance = malora.balance_loss(self.model, batch.mask) * ((batch.target >= 0).sum() / batch.labels)
        self.mark("forward")
        self.accelerator.backward(loss + self.balance_factor * balance)
        self.mark("backward")
        return loss.detach(), balance.detach()


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Batch
    losses: Losses
    gradients: list[Tensor]
    routings: list[dict[str, Routing]]  # by routed layer

    def replay(self, batch: Batch) -> None:
        for static, new in zip(vars(self.inputs).values(), vars(batch).values(), strict=True):
            static.copy_(new, non_blocking=True)
        self.graph.replay()


class GraphedStep:
    """Captures an `EagerStep` for each shape of a part, and replays it; weights are copied once for all parts."""

    def __init__(self, eager: EagerStep) -> None:
        self.eager = eager
        self.parameters = [p for p in eager.model.parameters() if p.requires_grad]
        self.routed_layers = [
            m for m in eager.model.modules() if isinstance(m, malora.MaloraLayer) and m.has_active_router
        ]
        self.captured: dict[tuple, _Captured] = {}
        self.weights = malora.WeightCache(eager.model)  # they change after a batch, not between its parts
        self.refresh: Callable[[], None] | None = None

    def __call__(self, parts: list[Batch]) -> Losses:
        captured = [self._captured(part) for part in parts]
        losses, gradients = [], None
        self.refresh()
        for part, step in zip(parts, captured, strict=True):
            step.replay(part)
            losses.append(torch.stack(step.losses))
            gradients = accumulate_grads(gradients, step.gradients, alone=len(parts) == 1)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        for layer, routings in zip(self.routed_layers, captured[-1].routings, strict=True):
            layer.routings = dict(routings)
        loss, balance = torch.stack(losses).sum(0)
        return loss, balance

    def _captured(self, batch: Batch) -> _Captured:
        shape = (batch.ids.shape, len(batch.target))
        if shape not in self.captured:
            self.captured[shape] = self._capture(batch)
        return self.captured[shape]

    def _capture(self, batch: Batch) -> _Captured:
        inputs = Batch(*(tensor.clone() for tensor in vars(batch).values()))
        losses = None

        def run() -> None:
            nonlocal losses
            for parameter in self.parameters:
                parameter.grad = None  # new ones, in the graph's memory
            losses = self.eager.part(inputs)

        # Replays follow each other, so graphs share one pool of memory; what a graph gives back stays its own.
        pool = next(iter(self.captured.values())).graph.pool() if self.captured else None
        if self.refresh is None:
            warm_up(run, passes=1)
            self.refresh = capture_refresh(self.weights)
        with self.weights:
            graph = capture(run, passes=1, pool=pool)
        gradients = [parameter.grad for parameter in self.parameters]
        routings = [
            {adapter: routing._replace(probability=routing.probability.detach()) for adapter, routing in kept.items()}
            for kept in (layer.routings for layer in self.routed_layers)
        ]
        return _Captured(graph, inputs, losses, gradients, routings)
