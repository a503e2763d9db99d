"""Forward and backward pass of one batch, through `malora.capture_step`.

On one GPU each shape of a micro-batch becomes a CUDA graph, and the frozen layers use fewer and larger kernels
(`malora.optimize_backbone`). On a CPU, and with several processes, every pass runs kernel by kernel.
"""

from __future__ import annotations

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

Losses = tuple[Tensor, Tensor]  # task loss and balance loss, both []


class TrainStep:
    """Runs a batch and leaves the gradients in the parameters.

    Args:
        model: Model to train.
        wrapped: The same model as `accelerator.prepare` returned it.
        accelerator: Decides the precision and the number of processes.
        balance_factor: Weight of the balance loss.

    Raises:
        UserError: The model's attention cannot be confined to the examples of a packed sequence.
    """

    def __init__(
        self,
        model: PeftModel,
        wrapped: nn.Module,
        accelerator: Accelerator,
        balance_factor: float,
    ) -> None:
        self.model, self.balance_factor = model, balance_factor
        self.has_balance_loss = has_balance_loss(model)
        # The balance loss is added here, with a mask for packed rows, and so not by the model.
        self.router_options = {"output_router_logits": False} if malora.has_router(model) else {}
        in_bfloat16 = accelerator.mixed_precision == "bf16"
        self.num_processes = accelerator.num_processes
        self.all_reduce = partial(accelerator.reduce, reduction="sum") if self.num_processes > 1 else None
        self.attention_dtype = torch.bfloat16 if in_bfloat16 else next(model.parameters()).dtype
        self.windows = attention_windows(model)
        self.step = malora.capture_step(wrapped, self._losses)

    @property
    def captures(self) -> int:
        """Number of CUDA graphs captured so far."""
        return self.step.captures

    def __call__(self, micro_batches: list[Batch]) -> Losses:
        """Run all micro-batches of a batch and return this process's summands of the losses.

        The gradients are those of the losses of the whole batch, in every process.
        """
        losses = [outputs["losses"] for outputs in self.step([vars(batch) for batch in micro_batches])]
        loss, balance = torch.stack(losses).sum(0)
        return loss, balance

    def _losses(self, wrapped: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss of a micro-batch to differentiate, and its parts.

        These are summands of the losses of the batch. The sums are over micro-batches, weighted by label tokens, and
        over processes.
        """
        batch = Batch(**tensors)
        masks = masks_for(self.windows, partial(packed_attention_bias, batch.example, self.attention_dtype))
        at_labels = label_positions_only(self.model, batch.row, batch.column)
        with exact_with_masks(batch.ids.device), at_labels:
            logits = wrapped(
                input_ids=batch.ids,
                position_ids=batch.position,
                attention_mask=masks,
                use_cache=False,
                **self.router_options,
            ).logits
        loss = F.cross_entropy(logits.float(), batch.target, reduction="sum") / batch.labels
        balance = torch.zeros_like(loss)
        if self.has_balance_loss:
            balance = malora.balance_loss(self.model, batch.mask, all_reduce=self.all_reduce) * batch.share
        total = loss + self.balance_factor * balance
        if self.num_processes > 1:
            total = total * self.num_processes  # DistributedDataParallel divides the sum of the gradients by it
        return {"loss": total, "losses": torch.stack([loss, balance])}


def has_balance_loss(model: nn.Module, adapter: str | None = None) -> bool:
    """Return whether a router is trained, which a balance loss can change.

    The loss of a frozen router would only move the tokens that reach it.

    Args:
        model: Model with adapters.
        adapter: Name of the adapter that counts; None if all do.
    """
    layers = [module for module in model.modules() if isinstance(module, malora.MaloraLayer)]
    settings = [setting for layer in layers for name, setting in layer.settings.items() if adapter in (None, name)]
    return any(setting.has_router and "router" not in setting.freeze for setting in settings)
