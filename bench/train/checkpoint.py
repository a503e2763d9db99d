"""Save and restore the state of a training run."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn


@dataclass
class TrainLog:
    """Measurements of a training run, from its first step on, also if it was resumed.

    Attributes:
        steps: Optimizer steps done.
        tokens: Tokens trained on.
        seconds: Seconds by phase: data, forward_backward and optimizer. Records of earlier versions may have the phases
            forward and backward.
        curve: Means over the steps since the last point: step, loss, balance_loss, grad_norm.
        router: Router statistics of the last micro-batch of single steps, over all processes.
        peak_bytes: Peak GPU memory; None on a CPU.
        step_seconds: Mean seconds per step since the last point of the curve; empty if runs trained together.
        captures: CUDA graphs captured, of shapes of micro-batches; None if passes are not captured.
    """

    steps: int = 0
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    router: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: int | None = None
    step_seconds: list[float] = field(default_factory=list)
    captures: int | None = None


class _Stateful(Protocol):
    """An optimizer or a learning-rate scheduler, also one that accelerate has wrapped."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""


class Checkpoint:
    """All state that decides how a training run continues, in one file.

    The file is written under another name and then renamed, so that an interruption leaves the previous one intact.

    Args:
        path: The file.
        identity: Name of the configuration and of the code. A checkpoint with another identity is ignored.
        model: Model whose trainable parameters are saved.
        optimizer: Optimizer of these parameters.
        scheduler: Learning-rate scheduler.
        process_index: Number of this process among those that train together. Parameters, optimizer and scheduler are
            the same in all of them, but each has its own random numbers.
    """

    def __init__(
        self,
        path: Path,
        identity: str,
        model: nn.Module,
        optimizer: _Stateful,
        scheduler: _Stateful,
        process_index: int = 0,
    ) -> None:
        self.path, self.identity, self.process_index = path, identity, process_index
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer, self.scheduler = optimizer, scheduler

    def save(self, log: TrainLog) -> None:
        """Write the current state and the log.

        All processes call it, and the first one writes the file.
        """
        random_states = gather_object([_random_state()])
        if self.process_index != 0:
            return
        state = {
            "identity": self.identity,
            "log": vars(log),
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random_states": random_states,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        torch.save(state, temporary)
        os.replace(temporary, self.path)

    def load(self) -> TrainLog | None:
        """Restore the saved state and return its log, or None.

        The log is None if no checkpoint of this identity exists.
        """
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
        if self.process_index < len(state["random_states"]):  # there may have been fewer processes
            cpu, gpu = state["random_states"][self.process_index]
            torch.set_rng_state(cpu)
            if gpu is not None:
                torch.cuda.set_rng_state(gpu)
        return TrainLog(**state["log"])


def _random_state() -> tuple[Tensor, Tensor | None]:
    """Return the states of the CPU's and the GPU's generator."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None
