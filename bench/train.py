"""The training loop: one method, one mixture, one seed. Plain, on accelerate.

A loss or gradient that is not finite ends the run as diverged.
"""

from __future__ import annotations

import math
import os
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

import malora
from bench.data import MOST_TOKENS, ROW, Encoded, collate, schedule
from bench.liger import LigerKernels, has_liger
from bench.record import RunConfig, source_hash
from bench.step import EagerStep, GraphedStep, can_capture

# Reading a loss from a GPU makes the host wait for it. Every so many steps is often enough to notice a divergence
# and to draw a curve.
CHECK_EVERY = 10
ROUTER_EVERY = 50


@dataclass
class TrainLog:
    """What training measured, a part before a resume included.

    Seconds are by part: data, forward, backward, optimizer; forward and backward are one
    part, forward_backward, where a step is one CUDA graph.
    """

    steps: int = 0
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)  # step, loss, balance_loss, grad_norm: means since last
    router: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: int | None = None  # of the GPU's memory


class DivergedError(ArithmeticError):
    """A loss or a gradient was not finite; `log` says how far training came."""

    def __init__(self, log: TrainLog) -> None:
        super().__init__(f"the loss or its gradient was not finite at step {log.steps} or up to {CHECK_EVERY} before")
        self.log = log


class Stopwatch:
    """Seconds by part of a step, without making the host wait: on a GPU, events that are read at the end."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str | None, Any]] = []

    def start(self) -> None:
        self._mark(None)

    def done(self, part: str) -> None:
        """What ran since the last mark was `part`."""
        self._mark(part)

    def _mark(self, part: str | None) -> None:
        if self.on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((part, now))

    def add_to(self, seconds: dict[str, float]) -> None:
        """Add what was measured since the last call."""
        if self.on_gpu:
            torch.cuda.synchronize()
        for (_, before), (part, now) in zip(self.marks, self.marks[1:], strict=False):
            if part is not None:
                passed = before.elapsed_time(now) / 1000 if self.on_gpu else now - before
                seconds[part] = seconds.get(part, 0.0) + passed
        self.marks.clear()


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
    watch = Stopwatch(accelerator.device)
    step = EagerStep(model, wrapped, accelerator, config.balance_factor, kernels)
    if capture:
        step = GraphedStep(step)
    else:
        step.mark = watch.done
    routed = malora.has_router(model)
    # Processes must do the same number of passes, so a batch that they share is not split further.
    most_tokens = MOST_TOKENS[config.device_type] if alone else sys.maxsize
    row = ROW[config.device_type]
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
    with bar, narrow_inputs(model, accelerator.device):
        while log.steps < last:
            watch.start()
            chosen = batches[log.steps][accelerator.process_index :: accelerator.num_processes]
            chosen = chosen or batches[log.steps][:1]  # a short last batch may not reach every process
            batch = [encoded[i] for i in chosen]
            parts = collate(batch, pad_id, row=row, most_tokens=most_tokens, recur=capture)
            parts = [part.to(accelerator.device) for part in parts]
            watch.done("data")
            loss, balance = step(parts)
            if capture:
                watch.done("forward_backward")
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            watch.done("optimizer")

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


def narrow_inputs(model: nn.Module, device: torch.device) -> AbstractContextManager:
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


class _Checkpoint:
    """All that decides how a run goes on. Whole or not there; read by the same configuration and code only."""

    def __init__(self, path: Path, identity: str, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        self.path, self.identity = path, identity
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer, self.scheduler = optimizer, scheduler

    def save(self, log: TrainLog) -> None:
        state = {
            "identity": self.identity,
            "log": vars(log),
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        torch.save(state, temporary)
        os.replace(temporary, self.path)

    def load(self) -> TrainLog | None:
        """Restore the state and return its log; None where there is nothing to go on from."""
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        if state["identity"] != self.identity:
            return None
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])
        return TrainLog(**state["log"])
