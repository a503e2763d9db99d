"""Forward and backward pass of one batch.

A training step of a small model launches thousands of kernels of a few microseconds each. Launching them takes the host
longer than running them takes the GPU. On one GPU the step is therefore captured as a CUDA graph, once per shape of a
micro-batch, and replayed: the same kernels in the same order, but with one launch. The frozen layers then use fewer and
larger kernels (`malora.optimize_backbone`). Elsewhere `EagerStep` runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

import malora
from bench.runtime.attention import attention_windows, exact_with_masks, masks_for, packed_attention_bias
from bench.runtime.logits import label_positions_only
from bench.train.batching import Batch
from malora.backbone.cuda_graphs import accumulate_grads, capture, capture_refresh, warm_up
from malora.routing import Routing, RoutingLog

Losses = tuple[Tensor, Tensor]  # task loss and balance loss, both []
Step = Callable[[list[Batch]], Losses]
Shape = tuple[torch.Size, int]  # of the ids and of the targets


class EagerStep:
    """Runs a batch kernel by kernel and leaves the gradients in the parameters.

    Args:
        model: Model to train.
        wrapped: The same model as `accelerator.prepare` returned it.
        accelerator: Runs the backward pass and decides the precision.
        balance_factor: Weight of the balance loss.

    Raises:
        UserError: The model's attention cannot be confined to the examples of a packed sequence.

    Attributes:
        end_phase: Called with "forward" or "backward" when that phase of a micro-batch ends.
    """

    def __init__(
        self,
        model: PeftModel,
        wrapped: nn.Module,
        accelerator: Accelerator,
        balance_factor: float,
    ) -> None:
        self.model, self.wrapped, self.accelerator = model, wrapped, accelerator
        self.balance_factor = balance_factor
        self.has_router = malora.has_router(model)
        # The balance loss is added here, with a mask for packed rows, and so not by the model.
        self.router_options = {"output_router_logits": False} if self.has_router else {}
        in_bfloat16 = accelerator.mixed_precision == "bf16"
        self.num_processes = accelerator.num_processes
        self.all_reduce = partial(accelerator.reduce, reduction="sum") if self.num_processes > 1 else None
        self.attention_dtype = torch.bfloat16 if in_bfloat16 else next(model.parameters()).dtype
        self.windows = attention_windows(model)
        self.end_phase: Callable[[str], None] = lambda phase: None

    def __call__(self, micro_batches: list[Batch]) -> Losses:
        """Run all micro-batches of a batch and return this process's summands of the losses.

        The gradients are those of the losses of the whole batch, in every process.
        """
        with self.accelerator.no_sync(self.wrapped):  # the last backward pass adds up the gradients of all processes
            losses = [self.run_micro_batch(batch) for batch in micro_batches[:-1]]
        losses.append(self.run_micro_batch(micro_batches[-1]))
        loss, balance = losses[0]
        for more_loss, more_balance in losses[1:]:
            loss, balance = loss + more_loss, balance + more_balance
        return loss, balance

    def run_micro_batch(self, batch: Batch) -> Losses:
        """Run forward and backward of a micro-batch.

        Returns:
            Its summands of the losses of the batch. The sums are over micro-batches, weighted by label tokens, and over
            processes.
        """
        masks = masks_for(self.windows, partial(packed_attention_bias, batch.example, self.attention_dtype))
        at_labels = label_positions_only(self.model, batch.row, batch.column)
        with exact_with_masks(batch.ids.device), at_labels:
            logits = self.wrapped(
                input_ids=batch.ids,
                position_ids=batch.position,
                attention_mask=masks,
                use_cache=False,
                **self.router_options,
            ).logits
        loss = F.cross_entropy(logits.float(), batch.target, reduction="sum") / batch.labels
        balance = torch.zeros_like(loss)
        if self.has_router:
            balance = malora.balance_loss(self.model, batch.mask, all_reduce=self.all_reduce) * batch.share
        self.end_phase("forward")
        total = loss + self.balance_factor * balance
        if self.num_processes > 1:
            total = total * self.num_processes  # DistributedDataParallel divides the sum of the gradients by it
        self.accelerator.backward(total)
        self.end_phase("backward")
        return loss.detach(), balance.detach()


@dataclass
class _CapturedMicroBatch:
    """A CUDA graph of a micro-batch and the tensors that it reads and writes.

    Attributes:
        graph: Forward and backward pass.
        inputs: Tensors that the graph reads.
        losses: Task loss and balance loss that it writes.
        gradients: Gradients that it writes, in the order of the trainable parameters.
        routings: Routings that it writes, by layer and adapter.
    """

    graph: torch.cuda.CUDAGraph
    inputs: Batch
    losses: Losses
    gradients: list[Tensor]
    routings: dict[str, dict[str, Routing]]

    def replay(self, batch: Batch) -> None:
        """Copy the batch into the inputs and launch the graph."""
        for static, new in zip(vars(self.inputs).values(), vars(batch).values(), strict=True):
            static.copy_(new, non_blocking=True)
        self.graph.replay()


class GraphedStep:
    """An `EagerStep` captured as a CUDA graph per micro-batch shape, and replayed.

    Weights change after a batch and not between its micro-batches, so they are packed once per batch, in a graph of
    their own.

    Args:
        eager: Step to capture.
    """

    def __init__(self, eager: EagerStep) -> None:
        self.eager = eager
        self.parameters = [p for p in eager.model.parameters() if p.requires_grad]
        tuner = eager.model.base_model
        self.log = tuner.routing_log if isinstance(tuner, malora.MaloraModel) else RoutingLog()
        self.captured: dict[Shape, _CapturedMicroBatch] = {}
        self.weights = malora.WeightCache(eager.model)
        self.refresh: Callable[[], None] | None = None  # captured with the first micro-batch

    def __call__(self, micro_batches: list[Batch]) -> Losses:
        """Run all micro-batches of a batch and return the losses.

        The gradients are left in the parameters.
        """
        captured = [self._captured(batch) for batch in micro_batches]
        assert self.refresh is not None, "the first capture sets it"
        self.refresh()
        losses: list[Tensor] = []
        gradients: list[Tensor] | None = None
        for batch, graph in zip(micro_batches, captured, strict=True):
            graph.replay(batch)
            losses.append(torch.stack(graph.losses))
            gradients = accumulate_grads(gradients, graph.gradients, alone=len(micro_batches) == 1)
        for parameter, gradient in zip(self.parameters, gradients or [], strict=True):
            parameter.grad = gradient
        self.log.routings = captured[-1].routings
        loss, balance = torch.stack(losses).sum(0)
        return loss, balance

    def _captured(self, batch: Batch) -> _CapturedMicroBatch:
        shape = (batch.ids.shape, len(batch.target))
        if shape not in self.captured:
            self.captured[shape] = self._capture(batch)
        return self.captured[shape]

    def _capture(self, batch: Batch) -> _CapturedMicroBatch:
        inputs = Batch(*(tensor.clone() for tensor in vars(batch).values()))
        losses: list[Losses] = []  # of each call; the last one is the captured one

        def run() -> None:
            for parameter in self.parameters:
                parameter.grad = None  # so that the graph allocates gradients in its own memory
            losses[:] = [self.eager.run_micro_batch(inputs)]

        # Graphs are replayed one after the other, so they share one memory pool. Tensors that are kept here, such as
        # the gradients, stay allocated, so that no other graph writes to their memory.
        pool = next(iter(self.captured.values())).graph.pool() if self.captured else None
        if self.refresh is None:
            warm_up(run, passes=1)
            self.refresh = capture_refresh(self.weights)
        with self.weights:
            graph = capture(run, passes=1, pool=pool)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        assert len(gradients) == len(self.parameters), "every trainable parameter takes part in the loss"
        routings = {
            layer: {adapter: Routing(kept.probability.detach(), kept.top_k) for adapter, kept in of_layer.items()}
            for layer, of_layer in self.log.routings.items()
        }
        return _CapturedMicroBatch(graph, inputs, losses[-1], gradients, routings)
