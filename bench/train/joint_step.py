"""Forward and backward pass of the micro-batches of several runs at once, through `malora.capture_step`.

The micro-batches of a pass are padded to one shape and put one below the other. So few shapes occur, and on a GPU each
of them is one CUDA graph.

Shapes:
    K: runs in the pass
    R, C: packed sequences of each run, tokens per packed sequence
    L: label tokens of each run
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

import malora
from bench.runtime.attention import attention_windows, exact_with_masks, masks_for, packed_attention_bias
from bench.runtime.logits import label_positions_only
from bench.train.batching import IGNORED_TARGET, Batch
from malora.adapter_stack import AdapterStack

# Each shape of a pass is a CUDA graph. The largest number of sequences of eight runs has few values, and the last batch
# of an epoch is smaller.
MAX_GRAPHS = 16


class Part(NamedTuple):
    """The micro-batch of one run in a pass.

    Attributes:
        adapter: The run's adapter.
        has_router: Whether it has a balance loss.
        batch: The micro-batch, on the CPU.
    """

    adapter: str
    has_router: bool
    batch: Batch


class JointStep:
    """Runs passes and leaves the gradients in the parameters.

    Args:
        model: Model with the adapters of all runs.
        wrapped: The same model as `accelerator.prepare` returned it.
        accelerator: Decides the precision.
        balance_factor: Weight of the balance losses.
        stacks: The adapters' parameters.

    Raises:
        UserError: The model's attention cannot be confined to the examples of a packed sequence.
    """

    def __init__(
        self,
        model: PeftModel,
        wrapped: nn.Module,
        accelerator: Accelerator,
        balance_factor: float,
        stacks: Sequence[AdapterStack],
    ) -> None:
        self.model, self.wrapped, self.balance_factor = model, wrapped, balance_factor
        in_bfloat16 = accelerator.mixed_precision == "bf16"
        self.attention_dtype = torch.bfloat16 if in_bfloat16 else next(model.parameters()).dtype
        self.windows = attention_windows(model)
        self.on_gpu = accelerator.device.type == "cuda"
        # The balance losses are added here, with a mask for packed sequences, and so not by the model.
        self.router_options = {"output_router_logits": False} if malora.has_router(model) else {}
        self.step = malora.capture_step(nn.ModuleList([wrapped, *stacks]), self._losses, max_graphs=MAX_GRAPHS)

    def __call__(self, parts: Sequence[Part], pad_id: int) -> tuple[Tensor, Tensor]:
        """Run forward and backward.

        Args:
            parts: A micro-batch of each run.
            pad_id: Token id of padding.

        Returns:
            Task loss and balance loss of each run, [K, 2]; and the padding mask of the sequences, [K·R, C].
        """
        joined = join_parts(parts, pad_id)
        if self.on_gpu:  # a copy from pageable memory waits for the GPU
            joined = {name: v.pin_memory() if isinstance(v, Tensor) else v for name, v in joined.items()}
        outputs = self.step.backward(joined)
        return outputs["losses"], outputs["mask"]

    def reset(self) -> None:
        """Drop all graphs, because other runs will take part."""
        self.step.reset()

    def _losses(self, _: nn.Module, joined: dict[str, Any]) -> dict[str, Tensor]:
        """Return the sum of all losses to differentiate, and the losses of each run."""
        example, adapters = joined["example"], joined["adapters"]
        masks = masks_for(self.windows, partial(packed_attention_bias, example, self.attention_dtype))
        at_labels = label_positions_only(self.model, joined["row"], joined["column"])
        with exact_with_masks(example.device), at_labels:
            logits = self.wrapped(
                input_ids=joined["ids"],
                position_ids=joined["position"],
                attention_mask=masks,
                use_cache=False,
                adapter_names=[name for name in adapters for _ in range(len(example) // len(adapters))],
                **self.router_options,
            ).logits
        each = F.cross_entropy(logits.float(), joined["target"], reduction="none")
        loss_K = each.view(len(adapters), -1).sum(1) / joined["labels"]
        mask, share = example > 0, joined["share"]
        none = torch.zeros_like(loss_K[0])
        balances = [
            malora.balance_loss(self.model, mask, adapter=name) * share[k] if has_router else none
            for k, (name, has_router) in enumerate(zip(adapters, joined["routers"], strict=True))
        ]
        balance_K = torch.stack(balances)
        total = loss_K.sum() + self.balance_factor * balance_K.sum()
        return {"loss": total, "losses": torch.stack([loss_K, balance_K], 1), "mask": mask}


def join_parts(parts: Sequence[Part], pad_id: int) -> dict[str, Any]:
    """Put micro-batches one below the other, padded to the shape of the largest.

    Returns:
        "ids", "position", "example": As in `Batch`, [K·R, C]. Padding belongs to no example.
        "row", "column", "target": As in `Batch`, [K·L]. Padding has the target `IGNORED_TARGET`.
        "labels", "share": As in `Batch`, of each run, [K].
        "adapters", "routers": Adapter of each run, and whether it has a router.
    """
    batches = [part.batch for part in parts]
    rows, width = (max(batch.ids.shape[side] for batch in batches) for side in (0, 1))
    labels = max(len(batch.target) for batch in batches)

    def sequences(tensors: Sequence[Tensor], fill: int = 0) -> Tensor:
        joined = torch.full((len(tensors), rows, width), fill)
        for place, tensor in zip(joined, tensors, strict=True):
            place[: tensor.shape[0], : tensor.shape[1]] = tensor
        return joined.flatten(0, 1)

    def at_labels(tensors: Sequence[Tensor], fill: int = 0) -> Tensor:
        joined = torch.full((len(tensors), labels), fill)
        for place, tensor in zip(joined, tensors, strict=True):
            place[: len(tensor)] = tensor
        return joined.flatten()

    return {
        "ids": sequences([batch.ids for batch in batches], pad_id),
        "position": sequences([batch.position for batch in batches]),
        "example": sequences([batch.example for batch in batches]),
        "row": at_labels([batch.row + k * rows for k, batch in enumerate(batches)]),
        "column": at_labels([batch.column for batch in batches]),
        "target": at_labels([batch.target for batch in batches], IGNORED_TARGET),
        "labels": torch.stack([batch.labels for batch in batches]),
        "share": torch.stack([batch.share for batch in batches]),
        "adapters": tuple(part.adapter for part in parts),
        "routers": tuple(part.has_router for part in parts),
    }


def divide_parts(parts: Sequence[Part], max_tokens: int) -> Iterator[Sequence[Part]]:
    """Divide micro-batches among passes of about equally many runs.

    A pass has at most `max_tokens` tokens after padding, or one micro-batch.
    """
    rows, width = (max(part.batch.ids.shape[side] for part in parts) for side in (0, 1))
    passes = -(-len(parts) // max(1, max_tokens // (rows * width)))
    for first in range(passes):
        yield parts[first * len(parts) // passes : (first + 1) * len(parts) // passes]
