"""Train an adapter on one mixture with one method and one seed, with accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_linear_schedule_with_warmup

import malora
from bench.records.provenance import source_hash
from bench.records.schema import RunConfig
from bench.runtime.processes import make_accelerator
from bench.runtime.progress import Progress
from bench.runtime.timer import PhaseTimer
from bench.train.batching import MAX_TOKENS, PACKED_ROW_LENGTH, Batch, Encoded, collate, shapes_of, shuffled_batches
from bench.train.checkpoint import Checkpoint, TrainLog
from bench.train.step import TrainStep
from bench.train.tracking import Log, log_nothing
from malora.backbone.model_state import can_capture

# Reading a loss from a GPU makes the host wait. Every 10 steps is often enough to notice a divergence and to draw a
# curve.
CHECK_EVERY = 10
ROUTER_EVERY = 50  # steps between router statistics
# Besides those by steps, so that a slow run loses no more than this if it is killed.
SECONDS_PER_CHECKPOINT = 60.0


# Gets the seconds of a step, its tokens, and the number of steps that are left.
FirstStep = Callable[[float, int, int], None]


class DivergedError(ArithmeticError):
    """A loss or a gradient was not finite.

    Attributes:
        log: Log of the training up to there.
    """

    def __init__(self, log: TrainLog) -> None:
        super().__init__(f"the loss or its gradient was not finite at step {log.steps} or up to {CHECK_EVERY} before")
        self.log = log


def train(
    model: PeftModel,
    encoded: Sequence[Encoded],
    config: RunConfig,
    *,
    pad_id: int,
    checkpoint: Path,
    checkpoint_every: int,
    track: Log = log_nothing,
    first_step: FirstStep | None = None,
) -> TrainLog:
    """Train the model's adapter in place.

    Training continues from the checkpoint if it belongs to the same configuration and code.

    Args:
        model: Model with a trainable adapter, on its device.
        encoded: Training examples.
        config: Configuration of the run; its learning rate is given.
        pad_id: Token id of padding.
        checkpoint: File of the checkpoint.
        checkpoint_every: Steps between checkpoints. One is also written after the last step, so that a failure in
            scoring costs no training, and in a single process every `SECONDS_PER_CHECKPOINT`.
        track: Gets every point of the curve and all router statistics, with the step.
        first_step: Called on a CPU after the first step of this process.

    Raises:
        DivergedError: A loss or gradient was not finite.
    """
    trainer = _Trainer(model, encoded, config, pad_id, checkpoint, track)
    trainer.run(checkpoint_every, first_step)
    return trainer.log


class _Trainer:
    """The state of one training run: batches, optimizer, step, checkpoint and log."""

    def __init__(
        self, model: PeftModel, encoded: Sequence[Encoded], config: RunConfig, pad_id: int, checkpoint: Path, track: Log
    ) -> None:
        self.model, self.encoded, self.config, self.pad_id, self.track = model, encoded, config, pad_id, track
        self.accelerator = make_accelerator("bf16" if config.device_type == "cuda" else "no")
        self.captures = self.accelerator.num_processes == 1 and can_capture(model)
        self.batches = shuffled_batches(
            len(encoded), batch_size=config.batch_size, epochs=config.epochs, seed=config.seed
        )
        # Those of the whole run, so that a run that is cut short has its shapes.
        self.shapes = shapes_of(encoded, self.batches) if self.captures else None
        self.last_step = min(len(self.batches), config.max_steps or len(self.batches))
        optimizer, self.scheduler = make_optimizer(model, config, len(self.batches))
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        identity = config.hash + source_hash()
        self.checkpoint = Checkpoint(
            checkpoint, identity, model, self.optimizer, self.scheduler, self.accelerator.process_index
        )
        self.log = self.checkpoint.load() or TrainLog()
        self.captures_before = self.log.captures or 0  # by an interrupted process
        self.timer = PhaseTimer(self.accelerator.device)
        self.step = self._make_step()
        self.has_router = malora.has_router(model)
        self.learning_rate = 0.0  # of the last step
        self.last_saved = time.monotonic()
        self.pending: list[Tensor] = []  # losses and gradient norms that are still on the device, each [3]

    def run(self, checkpoint_every: int, first_step: FirstStep | None = None) -> None:
        """Train to the last step; the arguments are those of `train`."""
        on_gpu = self.config.device_type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.wrapped.train()
        log, tokens_before = self.log, self.log.tokens
        progress = Progress(self.config.id, "step", self.last_step, log.steps, self.accelerator.is_main_process)

        def status(seconds: float) -> str:
            graphs = f", {self.step.captures} CUDA graphs" if self.captures else ""
            return f"loss {self._latest_loss():.3f}, {(log.tokens - tokens_before) / seconds:,.0f} tokens/s{graphs}"

        with progress, keep_input_dtype(self.model, self.accelerator.device):
            while log.steps < self.last_step:
                start = time.perf_counter()
                self._train_step()
                if first_step and not on_gpu:  # on a GPU the first step compiles, and has only begun
                    first_step(time.perf_counter() - start, log.tokens - tokens_before, self.last_step - log.steps)
                first_step = None
                if log.steps % CHECK_EVERY == 0 or log.steps == self.last_step:
                    self._read_pending()
                if log.steps % checkpoint_every == 0 or log.steps == self.last_step or self._is_checkpoint_due():
                    self._save_checkpoint()
                progress.update(log.steps, status)
        if on_gpu:
            log.peak_bytes = torch.cuda.max_memory_allocated()
        self.accelerator.wait_for_everyone()

    def _make_step(self) -> TrainStep:
        if self.captures:
            malora.optimize_backbone(self.model, loss=False)  # the step computes its own loss
        return TrainStep(self.model, self.wrapped, self.accelerator, self.config.balance_factor)

    def _latest_loss(self) -> float:
        """Return the last mean loss; before the first one, that of the last step."""
        return self.log.curve[-1]["loss"] if self.log.curve else self.pending[-1][0].item()

    def _train_step(self) -> None:
        """Train on the next batch and log it, without waiting for the device."""
        log, timer, accelerator = self.log, self.timer, self.accelerator
        chosen = self.batches[log.steps]
        timer.start()
        micro_batches = self._make_micro_batches(chosen)
        timer.end_phase("data")
        loss, balance = self.step(micro_batches)
        timer.end_phase("forward_backward")
        norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.learning_rate = float(self.scheduler.get_last_lr()[0])  # of this step, before the schedule goes on
        self.scheduler.step()
        self.optimizer.zero_grad()
        timer.end_phase("optimizer")
        log.steps += 1
        log.tokens += sum(len(self.encoded[i].ids) for i in chosen)
        self.pending.append(torch.stack([loss, balance, norm]))
        if self.has_router and log.steps % ROUTER_EVERY == 0:
            stats = malora.router_stats(self.model, micro_batches[-1].mask, all_reduce=self._sum_over_processes)
            summary = router_summary(stats.values())
            log.router.append({"step": log.steps} | summary)
            self.track({f"router/{name}": value for name, value in summary.items()}, log.steps)

    def _make_micro_batches(self, chosen: list[int]) -> list[Batch]:
        """Collate this process's share of a batch and copy it to the device."""
        accelerator, device_type = self.accelerator, self.config.device_type
        micro_batches = collate(
            [self.encoded[i] for i in chosen],
            self.pad_id,
            row_length=PACKED_ROW_LENGTH[device_type],
            max_tokens=MAX_TOKENS[device_type],
            fixed_shapes=self.shapes,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        return [batch.to(accelerator.device) for batch in micro_batches]

    def _read_pending(self) -> None:
        """Read the last steps' losses from the device and add their mean to the curve.

        The losses are summed over the processes. Gradients are already, so all processes have the same norm.

        Raises:
            DivergedError: One of them is not finite.
        """
        log = self.log
        before = sum(log.seconds.values())
        self.timer.add_to(log.seconds)
        log.step_seconds.append((sum(log.seconds.values()) - before) / len(self.pending))
        if self.captures:
            log.captures = self.captures_before + self.step.captures
        mean = torch.stack(self.pending).mean(0)
        loss, balance = self._sum_over_processes(mean[:2]).tolist()
        norm = mean[2].item()
        means = {"loss": loss, "balance_loss": balance, "grad_norm": norm}
        log.curve.append({"step": log.steps} | means)
        self.pending.clear()
        means |= {"learning_rate": self.learning_rate, "tokens": log.tokens}
        self.track({f"train/{name}": value for name, value in means.items()}, log.steps)
        if not all(map(math.isfinite, (loss, balance, norm))):
            raise DivergedError(log)

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes."""
        total = self.accelerator.reduce(tensor, reduction="sum")
        assert isinstance(total, Tensor)
        return total

    def _is_checkpoint_due(self) -> bool:
        """Return whether the last checkpoint is old.

        A checkpoint ends a mean of the curve, so it is due only where one ends anyway: the curve must not depend on the
        speed of the machine. Processes that share a run save together, and their clocks may differ.
        """
        return (
            not self.pending
            and self.accelerator.num_processes == 1
            and time.monotonic() - self.last_saved >= SECONDS_PER_CHECKPOINT
        )

    def _save_checkpoint(self) -> None:
        if self.pending:
            self._read_pending()
        self.checkpoint.save(self.log)
        self.last_saved = time.monotonic()


def make_optimizer(model: nn.Module, config: RunConfig, steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Make AdamW, and a schedule with linear warmup and decay.

    Args:
        model: Model whose trainable parameters are optimized.
        config: Configuration of the run.
        steps: Steps of the full run; the schedule is the same if `max_steps` ends it early.
    """
    assert config.learning_rate is not None, "only the base has no learning rate, and it is not trained"
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=config.device_type == "cuda",
    )
    make_scheduler: Callable[..., LRScheduler] = get_linear_schedule_with_warmup
    return optimizer, make_scheduler(optimizer, round(config.warmup_ratio * steps), steps)


def keep_input_dtype(model: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """Stop PEFT's LoRA from casting its inputs, on a GPU.

    This holds within the returned context. PEFT casts inputs to the adapter's float32, and autocast casts them back to
    bfloat16 at once. DoRA is left alone, because it computes the norms of its weights in the dtype of its inputs.
    """
    loras = [module for module in model.modules() if isinstance(module, LoraLayer)]
    has_dora = any(module.lora_variant for module in loras)
    return disable_input_dtype_casting(model, active=device.type == "cuda" and bool(loras) and not has_dora)


def router_summary(stats: Collection[malora.RouterStats]) -> dict[str, float]:
    """Average router statistics over the routed layers; `unused_experts` is their sum."""
    return {
        "entropy": sum(s.entropy for s in stats) / len(stats),
        "gate_sum": sum(s.gate_sum for s in stats) / len(stats),
        "largest_share": sum(max(s.share) for s in stats) / len(stats),
        "unused_experts": sum(len(s.unused) for s in stats),
    }
