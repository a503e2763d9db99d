"""The training loop: one method, one mixture, one seed. Plain, on accelerate.

A loss or gradient that is not finite ends the run as diverged.
"""

from __future__ import annotations

import math
import sys
import time
from contextlib import AbstractContextManager
from multiprocessing import parent_process
from pathlib import Path

import torch
from accelerate import Accelerator
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

import malora
from bench.records.provenance import source_hash
from bench.records.schema import RunConfig
from bench.runtime.timer import PhaseTimer
from bench.train.batching import MAX_TOKENS, PACKED_ROW_LENGTH, Encoded, collate, schedule
from bench.train.checkpoint import TrainLog, _Checkpoint
from bench.train.step import EagerStep, GraphedStep
from malora.backbone.cuda_graphs import can_capture
from malora.backbone.liger import LigerKernels, has_liger

# Reading a loss from a GPU makes the host wait for it. Every so many steps is often enough to notice a divergence
# and to draw a curve.
CHECK_EVERY = 10
ROUTER_EVERY = 50


class DivergedError(ArithmeticError):
    """A loss or a gradient was not finite; `log` says how far training came."""

    def __init__(self, log: TrainLog) -> None:
        super().__init__(f"the loss or its gradient was not finite at step {log.steps} or up to {CHECK_EVERY} before")
        self.log = log


def train(
    model: nn.Module,
    encoded: list[Encoded],
    config: RunConfig,
    *,
    pad_id: int,
    checkpoint: Path,
    checkpoint_every: int,
) -> TrainLog:
    """Train the model's adapter in place, from its checkpoint if there is one.

    Raises:
        DivergedError: a loss or gradient was not finite.
    """
    accelerator = Accelerator(mixed_precision="bf16" if config.device_type == "cuda" else "no")
    alone = accelerator.num_processes == 1
    capture = alone and can_capture(model)
    kernels = LigerKernels(model.get_base_model()) if capture and has_liger() else None
    batches = schedule(len(encoded), batch_size=config.batch_size, epochs=config.epochs, seed=config.seed)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=config.device_type == "cuda",
    )
    # The schedule is that of the whole run even if --max-steps ends it early.
    warmup_steps = round(config.warmup_ratio * len(batches))
    scheduler = get_linear_schedule_with_warmup(optimizer, warmup_steps, len(batches))
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    state = _Checkpoint(checkpoint, config.hash + source_hash(), model, optimizer, scheduler)
    log = state.load() or TrainLog()
    watch = PhaseTimer(accelerator.device)
    step = EagerStep(model, wrapped, accelerator, config.balance_factor, kernels)
    if capture:
        step = GraphedStep(step)
    else:
        step.mark = watch.end_phase
    routed = malora.has_router(model)
    # Processes must do the same number of passes, so a batch that they share is not split further.
    max_tokens = MAX_TOKENS[config.device_type] if alone else sys.maxsize
    row = PACKED_ROW_LENGTH[config.device_type]
    pending: list[Tensor] = []
    last = min(len(batches), config.max_steps or len(batches))

    def read_pending() -> None:
        """Bring the losses of the last steps over from the device, and stop if one is not finite."""
        watch.add_to(log.seconds)
        loss, balance, norm = torch.stack(pending).mean(0).tolist()
        log.curve.append({"step": log.steps, "loss": loss, "balance_loss": balance, "grad_norm": norm})
        pending.clear()
        if not all(map(math.isfinite, (loss, balance, norm))):
            raise DivergedError(log)

    if config.device_type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wrapped.train()
    start, tokens_before = time.perf_counter(), log.tokens
    # One bar on a terminal (None: only there); workers beside each other would tear one another's.
    hidden = True if parent_process() or not accelerator.is_main_process else None
    bar = tqdm(total=last, initial=log.steps, unit="step", desc=config.id, disable=hidden, leave=False)
    with bar, keep_input_dtype(model, accelerator.device):
        while log.steps < last:
            watch.start()
            chosen = batches[log.steps][accelerator.process_index :: accelerator.num_processes]
            chosen = chosen or batches[log.steps][:1]  # a short last batch may not reach every process
            batch = [encoded[i] for i in chosen]
            parts = collate(batch, pad_id, row=row, max_tokens=max_tokens, fixed_shapes=capture)
            parts = [part.to(accelerator.device) for part in parts]
            watch.end_phase("data")
            loss, balance = step(parts)
            if capture:
                watch.end_phase("forward_backward")
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            watch.end_phase("optimizer")

            log.steps += 1
            log.tokens += sum(len(encoded[i].ids) for i in batches[log.steps - 1])
            pending.append(torch.stack([loss, balance, norm]))
            if routed and log.steps % ROUTER_EVERY == 0:
                log.router.append({"step": log.steps} | _router_summary(model, parts[-1].mask))
            if log.steps % CHECK_EVERY == 0 or log.steps == last:
                read_pending()
                speed = (log.tokens - tokens_before) / (time.perf_counter() - start)
                bar.set_postfix_str(f"loss {log.curve[-1]['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
            # The last step is kept too, so that a failure in scoring costs no training.
            if log.steps % checkpoint_every == 0 or log.steps == last:
                if pending:
                    read_pending()
                if accelerator.is_main_process:
                    state.save(log)
            bar.update()
    if config.device_type == "cuda":
        log.peak_bytes = torch.cuda.max_memory_allocated()
    accelerator.wait_for_everyone()
    return log


def keep_input_dtype(model: nn.Module, device: torch.device) -> AbstractContextManager:
    """Inside it PEFT's LoRA reads inputs as they come, on a GPU: PEFT would widen them to the adapter's float32, and
    autocast narrow them again. DoRA takes the norms of its weights in the dtype of its inputs, so it is left alone."""
    loras = [module for module in model.modules() if isinstance(module, LoraLayer)]
    plain = device.type == "cuda" and not any(module.lora_variant for module in loras)
    return disable_input_dtype_casting(model, active=plain and bool(loras))


def _router_summary(model: nn.Module, mask: Tensor) -> dict[str, float]:
    """Means over the routed layers, and how many of their experts served no token of the batch."""
    stats = malora.router_stats(model, mask).values()
    return {
        "entropy": sum(s.entropy for s in stats) / len(stats),
        "gate_sum": sum(s.gate_sum for s in stats) / len(stats),
        "largest_share": sum(max(s.share) for s in stats) / len(stats),
        "unused_experts": sum(len(s.unused) for s in stats),
    }
