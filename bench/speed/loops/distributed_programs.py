"""Training programs of several processes, as users write them: data parallel, with or without sharded weights.

Each process runs the program on a GPU of its own, with micro-batches of its own. They are connected by
`torch.distributed`, and have equal base models. See `bench.speed.loops.programs` for what a program is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

import malora
from bench.speed.loops.programs import (
    LEARNING_RATE,
    Batches,
    compile_layers,
    decoder_layers,
    train_captured,
    with_malora,
)


def malora_ddp(
    base: PreTrainedModel, config: PeftConfig, batches: Batches, checkpointing: str = "none", compiled: bool = False
) -> Generator[Tensor]:
    """Train our adapter under `DistributedDataParallel`, with its decoder layers compiled or not."""
    model = with_malora(base, config, checkpointing)
    if compiled:
        compile_layers(model)
    yield from train_ddp(model, batches)


def malora_captured_ddp(
    base: PreTrainedModel, config: PeftConfig, batches: Batches, checkpointing: str = "none"
) -> Generator[Tensor]:
    """Train our adapter with passes captured as CUDA graphs, and average the gradients after them."""
    model = with_malora(base, config, checkpointing)
    for parameter in model.parameters():
        if parameter.requires_grad:
            distributed.broadcast(parameter.data, src=0)  # all processes start with the first one's weights
    yield from train_captured(model, batches, averages=True)


def malora_fsdp(
    base: PreTrainedModel, config: PeftConfig, batches: Batches, checkpointing: str = "none", compiled: bool = False
) -> Generator[Tensor]:
    """Train our adapter with all weights sharded by FSDP2. The base model is on the CPU at first."""
    model = shard(with_new_adapter(base, config))
    malora.optimize_backbone(model, padding=False)
    malora.set_checkpointing(model, checkpointing)
    if compiled:
        compile_layers(model)
    yield from train_fsdp(model, batches)


def peft_ddp(base: PreTrainedModel, config: PeftConfig, batches: Batches) -> Generator[Tensor]:
    """Train PEFT's adapter under `DistributedDataParallel`."""
    yield from train_ddp(get_peft_model(base, config).train(), batches)


def peft_fsdp(base: PreTrainedModel, config: PeftConfig, batches: Batches) -> Generator[Tensor]:
    """Train PEFT's adapter with all weights sharded by FSDP2. The base model is on the CPU at first."""
    yield from train_fsdp(shard(with_new_adapter(base, config)), batches)


def train_ddp(model: nn.Module, batches: Batches) -> Generator[Tensor]:
    """Train an adapter in a plain loop. Gradients are averaged in the last micro-batch of each step."""
    wrapped = DistributedDataParallel(model)
    yield from _train(wrapped, batches, lambda is_last: nullcontext() if is_last else wrapped.no_sync())


def train_fsdp(model: nn.Module, batches: Batches) -> Generator[Tensor]:
    """Train an adapter in a plain loop. Gradients are averaged in the last micro-batch of each step."""
    assert isinstance(model, FSDPModule), "it has been sharded"

    def enter_micro_batch(is_last: bool) -> AbstractContextManager[None]:
        model.set_requires_gradient_sync(is_last)
        return nullcontext()

    yield from _train(model, batches, enter_micro_batch)


def _train(
    model: nn.Module, batches: Batches, enter_micro_batch: Callable[[bool], AbstractContextManager[None]]
) -> Generator[Tensor]:
    """Train an adapter.

    Args:
        model: The wrapped model.
        batches: This process's micro-batches.
        enter_micro_batch: Returns the context of a micro-batch, and is told if it is the last one of its step.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    for micro_batches in batches:
        for number, micro_batch in enumerate(micro_batches, 1):
            with enter_micro_batch(number == len(micro_batches)):
                with torch.autocast(parameters[0].device.type, torch.bfloat16):
                    loss = model(**micro_batch, use_cache=False).loss
                (loss / len(micro_batches)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def with_new_adapter(base: PreTrainedModel, config: PeftConfig) -> nn.Module:
    """Return a model on the CPU with a new adapter, which is initialized on the GPU if there is one."""
    with torch.device(torch.accelerator.current_accelerator() or "cpu"):
        return get_peft_model(base, config).train()


def shard(model: nn.Module) -> nn.Module:
    """Shard each decoder layer, and the rest of the model, over all processes. Layer by layer they move to the GPU."""
    for layer in decoder_layers(model):
        fully_shard(layer)
    fully_shard(model)
    return model
