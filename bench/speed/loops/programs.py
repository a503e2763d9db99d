"""Training programs as users write them. Each is a row of the measurement.

A program gets a frozen base model and batches, and trains an adapter in a loop of its own. It is a generator: it yields
the loss after each optimizer step, which is where its time is taken. Nothing else is particular to the measurement.

The README's program is `malora_captured` with `train_captured`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable

import torch
from peft import PeftConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import PreTrainedModel

import malora
from bench.speed.baselines import LigerKernels

MicroBatch = dict[str, Tensor]  # the arguments of a model: input_ids and labels, both [batch, length]
Batches = Iterable[list[MicroBatch]]  # the micro-batches of each optimizer step

# The value does not affect the time. A small one keeps the loss finite over the whole measurement.
LEARNING_RATE = 1e-5


def floor(
    base: PreTrainedModel, batches: Batches, compiled: bool = False, checkpointed: bool = False
) -> Generator[Tensor]:
    """Run a frozen model without an adapter: forward, and backward to the activations.

    No adapter on the model can be faster.
    """
    base.train().enable_input_require_grads()
    if compiled:
        compile_layers(base)
    if checkpointed:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for micro_batches in batches:
        for micro_batch in micro_batches:
            with torch.autocast(base.device.type, torch.bfloat16):
                loss = base(**micro_batch, use_cache=False).loss
            (loss / len(micro_batches)).backward()
        yield loss


def train(model: nn.Module, batches: Batches) -> Generator[Tensor]:
    """Train an adapter in a plain loop."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    for micro_batches in batches:
        for micro_batch in micro_batches:
            with torch.autocast(parameters[0].device.type, torch.bfloat16):
                loss = model(**micro_batch, use_cache=False).loss
            (loss / len(micro_batches)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def peft(base: PreTrainedModel, config: PeftConfig, batches: Batches, compiled: bool = False) -> Generator[Tensor]:
    """Train PEFT's adapter, with its decoder layers compiled or not."""
    model = get_peft_model(base, config).train()
    if compiled:
        compile_layers(model)
    yield from train(model, batches)


def peft_captured(base: PreTrainedModel, config: PeftConfig, batches: Batches) -> Generator[Tensor]:
    """Train PEFT's adapter with compiled decoder layers, and forward and backward captured as CUDA graphs."""
    model = get_peft_model(base, config).train()
    compile_layers(model)
    yield from train_captured(model, batches)


def peft_liger(base: PreTrainedModel, config: PeftConfig, batches: Batches) -> Generator[Tensor]:
    """Train PEFT's adapter with Liger's kernels and loss."""
    with LigerKernels(base):
        yield from train(get_peft_model(base, config).train(), batches)


def peft_checkpointed(base: PreTrainedModel, config: PeftConfig, batches: Batches) -> Generator[Tensor]:
    """Train PEFT's adapter with the gradient checkpointing of transformers."""
    model = get_peft_model(base, config).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    yield from train(model, batches)


def peft_quantized(base: PreTrainedModel, config: PeftConfig, batches: Batches) -> Generator[Tensor]:
    """Train PEFT's adapter on a quantized base with gradient checkpointing, as PEFT's guide of QLoRA does."""
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    yield from train(get_peft_model(base, config).train(), batches)


def malora_plain(
    base: PreTrainedModel, config: PeftConfig, batches: Batches, checkpointing: str = "none", compiled: bool = False
) -> Generator[Tensor]:
    """Train our adapter in a plain loop, with its decoder layers compiled or not."""
    model = with_malora(base, config, checkpointing)
    if compiled:
        compile_layers(model)
    yield from train(model, batches)


def malora_captured(
    base: PreTrainedModel, config: PeftConfig, batches: Batches, checkpointing: str = "none"
) -> Generator[Tensor]:
    """Train our adapter with forward and backward captured as CUDA graphs."""
    model = with_malora(base, config, checkpointing)
    yield from train_captured(model, batches)


def with_malora(base: PreTrainedModel, config: PeftConfig, checkpointing: str) -> nn.Module:
    """Return the model with our adapter, a faster backbone, and a mode of checkpointing."""
    model = on_device(base, config)
    malora.optimize_backbone(model, padding=checkpointing in ("none", "lean"))  # else memory counts more
    malora.set_checkpointing(model, checkpointing)
    return model


def train_captured(model: nn.Module, batches: Batches, *, averages: bool = False) -> Generator[Tensor]:
    """Train an adapter with forward and backward captured as CUDA graphs.

    Args:
        model: The adapted model.
        batches: The micro-batches of each step.
        averages: Whether to average the gradients over the processes of `torch.distributed`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    step = malora.capture_step(model)
    for micro_batches in batches:
        with torch.autocast(parameters[0].device.type, torch.bfloat16):
            losses = step(micro_batches, scale=1 / len(micro_batches))
        if averages:
            step.average_gradients()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield losses[-1]


def on_device(base: PreTrainedModel, config: PeftConfig) -> nn.Module:
    """Return the model with a new adapter, which is initialized on the GPU: on the CPU it takes minutes at 7B."""
    with torch.device(base.device):
        return get_peft_model(base, config).train()


def compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer. They share their code, so that one of them is compiled and the others reuse it."""
    for layer in decoder_layers(model):
        layer.compile()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a model."""
    return [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]
