"""Train the adapters of several runs at once, on one frozen base model.

A step of a small model leaves most of a GPU idle. So each step takes the next batch of every run, puts their packed
sequences one below the other, and makes one forward and backward pass. The frozen layers see all sequences. Each
adapter sees the sequences of its own run (`adapter_names`). Parameters, loss, clipping, optimizer and schedule are each
run's own, so a run has the loss curve that it has alone, up to rounding. Only dropout draws other random numbers.

A run whose loss or gradient is not finite leaves the batch. The others do not notice: sequences do not influence each
other in a frozen model, and the gradients of a sum of losses are those of the single losses.

The micro-batches of a pass are padded to one shape, so that few shapes occur. On a GPU each is captured as a CUDA graph
(`bench.train.joint_step`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

import malora
from bench.models.joint import AdapterTensors, read_tensors, write_tensors
from bench.records.provenance import source_hash
from bench.records.schema import RunConfig
from bench.runtime.processes import make_accelerator
from bench.runtime.progress import Progress
from bench.runtime.timer import PhaseTimer
from bench.train.batching import (
    MAX_TOKENS,
    PACKED_ROW_LENGTH,
    Batch,
    Encoded,
    collate,
    shapes_of,
    shuffled_batches,
)
from bench.train.checkpoint import Checkpoint, TrainLog
from bench.train.fixed_shapes import FixedShapes
from bench.train.gate_scale import match_first_batch
from bench.train.joint_step import JointStep, Part, divide_parts
from bench.train.loop import (
    CHECK_EVERY,
    ROUTER_EVERY,
    SECONDS_PER_CHECKPOINT,
    DivergedError,
    make_optimizer,
    router_summary,
)
from bench.train.step import has_balance_loss
from bench.train.tracking import Log
from malora.adapter_stack import stack_adapters
from malora.gate_scale import set_mean_gate_sum

# Tokens per forward pass of all runs together, by device; more runs take more passes per step. The activations of
# 49,152 tokens of the small profile's model need some 50 GiB, and twice that while a pass of a new shape runs beside
# the memory of the captured ones.
MAX_JOINT_TOKENS = {"cuda": 49_152, "cpu": 16_384}


@dataclass(frozen=True)
class JointRun:
    """A run that trains with others.

    Attributes:
        config: Its configuration.
        adapter: Name of its adapter in the joint model.
        encoded: Its training examples.
        checkpoint: File of its checkpoint.
    """

    config: RunConfig
    adapter: str
    encoded: Sequence[Encoded]
    checkpoint: Path


@dataclass
class Trained:
    """The outcome of a run's training with others.

    Attributes:
        log: Log of its training.
        tensors: Its trained adapter, on the CPU.
        has_diverged: Whether a loss or gradient was not finite.
        together: Number of runs that trained together.
        mean_gate_sum: By which its scaling was divided; None if it was not.
        points: Values for trackers, with their steps.
    """

    log: TrainLog
    tensors: AdapterTensors
    has_diverged: bool
    together: int
    mean_gate_sum: float | None = None
    points: list[tuple[Mapping[str, float | None], int]] = field(default_factory=list)

    def restore(self, model: PeftModel, track: Log) -> TrainLog:
        """Put the trained adapter into a model with it alone, as if it had been trained there.

        Args:
            model: Model with the new adapter of the run.
            track: Gets the points of the curve and the router statistics.

        Raises:
            DivergedError: The run diverged.
        """
        for values, step in self.points:
            track(values, step)
        if self.has_diverged:
            raise DivergedError(self.log)
        write_tensors(model, self.tensors)
        if self.mean_gate_sum is not None:
            set_mean_gate_sum(model, self.mean_gate_sum)
        return self.log


def train_together(
    model: PeftModel, runs: Sequence[JointRun], *, pad_id: int, checkpoint_every: int
) -> dict[str, Trained]:
    """Train all adapters of a joint model.

    Training continues from the checkpoints of earlier calls, also in other company.

    Args:
        model: Model with all adapters, of `bench.models.joint.join_adapters`, on its device.
        runs: The runs; one per adapter. They agree in all settings that concern the batch.
        pad_id: Token id of padding.
        checkpoint_every: Steps between checkpoints, which are also written every `SECONDS_PER_CHECKPOINT`.

    Returns:
        The outcomes by the name of the adapter.
    """
    trainer = _JointTrainer(model, runs, pad_id)
    trainer.train(checkpoint_every)
    return {run.adapter: run.outcome(model, len(runs)) for run in trainer.runs}


def _on_cpu(tensors: AdapterTensors) -> AdapterTensors:
    return {layer: {kind: tensor.cpu() for kind, tensor in kinds.items()} for layer, kinds in tensors.items()}


class _Run:
    """The state of one run: batches, optimizer, checkpoint and log.

    Args:
        model: Model with all adapters.
        run: The run.
        parameter: All values that it trains.
    """

    def __init__(self, model: PeftModel, run: JointRun, parameter: nn.Parameter) -> None:
        self.config, self.adapter, self.encoded = run.config, run.adapter, run.encoded
        config = run.config
        self.batches = shuffled_batches(
            len(run.encoded), batch_size=config.batch_size, epochs=config.epochs, seed=config.seed
        )
        self.last_step = min(len(self.batches), config.max_steps or len(self.batches))
        self.parameter = parameter
        holder = nn.ParameterList([parameter])
        self.optimizer, self.scheduler = make_optimizer(holder, config, len(self.batches))
        # A run alone computes PEFT's LoRA in other tensors, so it must not continue from here.
        identity = f"{config.hash}{source_hash()} together"
        self.checkpoint = Checkpoint(run.checkpoint, identity, holder, self.optimizer, self.scheduler)
        self.log = self.checkpoint.load() or TrainLog()
        settings = [m.settings[run.adapter] for m in model.modules() if isinstance(m, malora.MaloraLayer)]
        self.has_router = any(setting.has_router for setting in settings)
        self.has_balance_loss = has_balance_loss(model, run.adapter)
        # Alone, it would then be padded to shapes that few CUDA graphs have.
        is_captured_alone = config.device_type == "cuda" and all(
            malora.BACKENDS[setting.backend].graph_safe for setting in settings
        )
        self.shapes = shapes_of(run.encoded, self.batches) if is_captured_alone else None
        self.has_diverged = False
        self.pending: list[Tensor] = []  # losses and gradient norms that are still on the device, each [3]
        self.losses: list[Tensor] = []  # of the micro-batches of this step, each [2]
        self.points: list[tuple[Mapping[str, float | None], int]] = []
        self.learning_rate = 0.0  # of the last step

    @property
    def is_training(self) -> bool:
        """Whether the run takes part in the next step."""
        return not self.has_diverged and self.log.steps < self.last_step

    @property
    def chosen(self) -> list[int]:
        """The examples of the next step."""
        return self.batches[self.log.steps]

    def update(self) -> None:
        """Clip the gradients and change the weights."""
        norm = nn.utils.clip_grad_norm_(self.parameter, self.config.max_grad_norm)
        self.optimizer.step()
        self.learning_rate = float(self.scheduler.get_last_lr()[0])  # of this step, before the schedule goes on
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.log.tokens += sum(len(self.encoded[i].ids) for i in self.chosen)
        self.log.steps += 1
        loss = torch.stack(self.losses).sum(0)
        self.losses.clear()
        self.pending.append(torch.cat([loss, norm.detach()[None].to(loss)]))

    def read_pending(self) -> None:
        """Read the last steps' losses from the device and add their mean to the curve."""
        loss, balance, norm = torch.stack(self.pending).mean(0).tolist()
        self.pending.clear()
        means = {"loss": loss, "balance_loss": balance, "grad_norm": norm}
        self.log.curve.append({"step": self.log.steps} | means)
        means |= {"learning_rate": self.learning_rate, "tokens": self.log.tokens}
        self.points.append(({f"train/{name}": value for name, value in means.items()}, self.log.steps))
        self.has_diverged = not all(map(math.isfinite, (loss, balance, norm)))

    def outcome(self, model: PeftModel, together: int) -> Trained:
        """Return the outcome of the training."""
        tensors = _on_cpu(read_tensors(model, self.adapter))
        mean = getattr(model.peft_config[self.adapter], "mean_gate_sum", None)
        return Trained(self.log, tensors, self.has_diverged, together, mean, self.points)

    def read_router(self, model: PeftModel, mask: Tensor) -> None:
        """Log the statistics of the routers, as they are after the coming update."""
        stats = malora.router_stats(model, mask, adapter=self.adapter)
        summary, step = router_summary(stats.values()), self.log.steps + 1
        self.log.router.append({"step": step} | summary)
        self.points.append(({f"router/{name}": value for name, value in summary.items()}, step))


class _JointTrainer:
    """Trains several runs step by step."""

    def __init__(self, model: PeftModel, runs: Sequence[JointRun], pad_id: int) -> None:
        device_type = runs[0].config.device_type
        self.model, self.pad_id, self.device_type = model, pad_id, device_type
        for run in runs:
            match_first_batch(model, run.adapter, run.encoded, run.config, pad_id, is_joint=True)
        self.accelerator = make_accelerator("bf16" if device_type == "cuda" else "no")
        wrapped: nn.Module = self.accelerator.prepare(model)
        if device_type == "cuda":
            malora.optimize_backbone(model, loss=False)  # the passes compute their own losses
        torch.manual_seed(runs[0].config.seed)  # of dropout, unless a checkpoint has a later state
        stacks = stack_adapters(model, [run.adapter for run in runs])
        by_name = {run.adapter: run for run in runs}
        self.runs = [  # those of a stack one after the other, so that passes compute them together
            _Run(model, by_name[name], parameter)
            for stack in stacks
            for name, parameter in zip(stack.names, stack.flat, strict=True)
        ]
        self.step = JointStep(model, wrapped, self.accelerator, runs[0].config.balance_factor, stacks)
        self.last_active: list[str] = []  # adapters that took part in the last step
        self.timer = PhaseTimer(self.accelerator.device)

    def train(self, checkpoint_every: int) -> None:
        """Train until every run is done or has diverged."""
        self.model.train()
        tokens_before = sum(run.log.tokens for run in self.runs)
        first, last = min(run.log.steps for run in self.runs), max(run.last_step for run in self.runs)
        name = f"{len(self.runs)} runs of {self.runs[0].config.mixture}"
        last_saved = {run.config.id: time.monotonic() for run in self.runs}
        with Progress(name, "step", last, first, self.accelerator.is_main_process) as progress:
            while active := [run for run in self.runs if run.is_training]:
                self._step(active)
                for run in active:
                    steps, is_last = run.log.steps, run.log.steps == run.last_step
                    is_due = time.monotonic() - last_saved[run.config.id] >= SECONDS_PER_CHECKPOINT
                    saves = steps % checkpoint_every == 0 or is_last or (is_due and steps % CHECK_EVERY == 0)
                    if steps % CHECK_EVERY == 0 or saves:
                        self._add_seconds(active)
                        run.read_pending()
                    if saves and not run.has_diverged:
                        run.checkpoint.save(run.log)
                        last_saved[run.config.id] = time.monotonic()
                progress.update(min(run.log.steps for run in active), partial(self._status, tokens_before))

    def _status(self, tokens_before: int, seconds: float) -> str:
        """Return the mean of the runs' last losses and the speed since the beginning."""
        losses = [run.log.curve[-1]["loss"] if run.log.curve else run.pending[-1][0].item() for run in self.runs]
        tokens = sum(run.log.tokens for run in self.runs) - tokens_before
        return f"loss {sum(losses) / len(losses):.3f}, {tokens / seconds:,.0f} tokens/s"

    def _add_seconds(self, active: Sequence[_Run]) -> None:
        """Add the time since the last call to the log of every run that took part: they all waited for it."""
        seconds: dict[str, float] = {}
        self.timer.add_to(seconds)
        for run in active:
            for phase, value in seconds.items():
                run.log.seconds[phase] = run.log.seconds.get(phase, 0.0) + value

    def _step(self, active: Sequence[_Run]) -> None:
        """Train each run on its next batch."""
        self.timer.start()
        if (names := [run.adapter for run in active]) != self.last_active:
            self.step.reset()
            self.last_active = names
        batches = self._collate(active)
        self.timer.end_phase("data")
        for number in range(max(map(len, batches))):
            taking_part = [(run, own) for run, own in zip(active, batches, strict=True) if number < len(own)]
            parts = {run.adapter: Part(run.adapter, run.has_balance_loss, own[number]) for run, own in taking_part}
            runs = {run.adapter: (run, number == len(own) - 1) for run, own in taking_part}
            for chunk in divide_parts([*parts.values()], MAX_JOINT_TOKENS[self.device_type]):
                losses, mask = self.step(chunk, self.pad_id)
                for part, loss in zip(chunk, losses, strict=True):
                    run, is_last = runs[part.adapter]
                    run.losses.append(loss)
                    if is_last and run.has_router and (run.log.steps + 1) % ROUTER_EVERY == 0:
                        run.read_router(self.model, mask)
                self.timer.end_phase("forward_backward")
        for run in active:
            run.update()
        self.timer.end_phase("optimizer")

    def _collate(self, active: Sequence[_Run]) -> list[list[Batch]]:
        """Make the micro-batches that each run would have alone, on the CPU.

        Runs of one seed share their batches, which are then made once.
        """
        made: dict[tuple[int, tuple[int, ...], FixedShapes | None], list[Batch]] = {}
        batches = []
        for run in active:
            key = id(run.encoded), tuple(run.chosen), run.shapes
            if key not in made:
                made[key] = collate(
                    [run.encoded[i] for i in run.chosen],
                    self.pad_id,
                    row_length=PACKED_ROW_LENGTH[self.device_type],
                    max_tokens=MAX_TOKENS[self.device_type],
                    fixed_shapes=run.shapes,
                )
            batches.append(made[key])
        return batches
