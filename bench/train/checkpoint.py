"""Save and restore the state of a training run.

A checkpoint file has three parts:

1. `MAGIC`, which names the format.
2. The hex SHA-256 of part 3, and a newline.
3. The state, as `torch.save` writes it.

The last two checkpoints of a run are kept. One that does not have its hash, or does not fit the model, is set aside
under another name, and training continues from the one before it.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from bench.records.files import temporary_path

MAGIC = b"malora checkpoint 1\n"
HASH_LENGTH = 64  # characters of a hex SHA-256
STATE_ENTRIES = {"identity", "log", "parameters", "optimizer", "scheduler", "random_states"}


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
        path: The file. The checkpoint before it is in `previous_checkpoint(path)`.
        identity: Name of the configuration and of the code. A checkpoint with another identity is ignored.
        model: Model whose trainable parameters are saved.
        optimizer: Optimizer of these parameters, in their order.
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
        temporary = temporary_path(self.path)  # names the machine: the folder may be shared
        try:
            write_state(temporary, state)
            if self.path.exists():
                os.replace(self.path, previous_checkpoint(self.path))
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)  # of a full disk

    def load(self) -> TrainLog | None:
        """Restore the last state that is intact, and return its log.

        A file that is not intact is renamed, and a line on the standard error says so. All processes call this method,
        and they continue from a file only if all of them could read it.

        Returns:
            The log, or None if there is no intact checkpoint of this identity. The model is then unchanged.
        """
        damaged: list[str] = []
        log = None
        for path in (self.path, previous_checkpoint(self.path)):
            state, problem = self._read(path)
            answers = gather_object([(problem, state is not None)])
            if problems := [problem for problem, _ in answers if problem]:
                damaged.append(f"{path} {problems[0]}")
                self._set_aside(path)
            elif state and all(found for _, found in answers):
                log = self._restore(state)
                break
        if damaged and self.process_index == 0:
            how = "starts anew" if log is None else f"continues after step {log.steps}"
            ending = "s were" if len(damaged) > 1 else " was"
            message = f"{'; '.join(damaged)}: the file{ending} renamed to NAME.damaged, and training {how}."
            print(message, file=sys.stderr)
        return log

    def _read(self, path: Path) -> tuple[dict[str, Any] | None, str | None]:
        """Read and check a file, without a change of the model.

        Returns:
            The state, or None; and what is wrong with the file, or None. Both are None if there is no file, or one with
            another identity.
        """
        try:
            state = read_state(path)
            if state.get("identity") != self.identity:
                return None, None
            self._require_fit(state)
        except FileNotFoundError:
            return None, None
        except MemoryError:
            raise
        except Exception as error:  # of pickle, zip or torch.load, which name no common one
            return None, _problem(error)
        return state, None

    def _require_fit(self, state: Mapping[str, Any]) -> None:
        """Check that a state has the form of the current one.

        `copy_` would broadcast a parameter of another shape, and an optimizer takes moments of any shape.

        Raises:
            DamagedError: It has another form.
        """
        _require_same("list of entries", set(state), STATE_ENTRIES)
        _require_same("log", set(state["log"]), {entry.name for entry in fields(TrainLog)})
        _require_same("parameters", set(state["parameters"]), set(self.parameters))
        for name, parameter in self.parameters.items():
            _require_like(name, state["parameters"][name], parameter)
        self._require_optimizer(state["optimizer"])
        _require_same("scheduler", set(state["scheduler"]), set(self.scheduler.state_dict()))
        for cpu, gpu in state["random_states"]:
            for generator_state in (cpu,) if gpu is None else (cpu, gpu):
                _require_same("random numbers' dtype", generator_state.dtype, torch.uint8)
            _require_like("random numbers", cpu, torch.get_rng_state())

    def _require_optimizer(self, saved: Mapping[str, Any]) -> None:
        """Check the parameter groups, and that moments have the shape and dtype of their parameters."""
        groups: Sequence[Mapping[str, Any]] = self.optimizer.state_dict()["param_groups"]
        _require_same("optimizer's entries", set(saved), {"state", "param_groups"})
        _require_same("number of parameter groups", len(saved["param_groups"]), len(groups))
        for own, group in zip(saved["param_groups"], groups, strict=True):
            _require_same("parameter group's options", set(own), set(group))
            _require_same("parameter group", own["params"], group["params"])
        indices = [index for group in groups for index in group["params"]]
        moments = saved["state"]
        if moments:  # there are none before the first step, and never for plain SGD
            _require_same("optimizer's parameters", set(moments), set(indices))
        names = {name for one in moments.values() for name in one}
        for index, (name, parameter) in zip(indices, self.parameters.items(), strict=True):
            if index in moments:
                _require_same(f"optimizer's state of {name}", set(moments[index]), names)
                for kind, value in moments[index].items():
                    if kind != "step" and isinstance(value, Tensor):
                        _require_like(f"{kind} of {name}", value, parameter)

    def _restore(self, state: Mapping[str, Any]) -> TrainLog:
        """Put a state that was checked into the model, the optimizer, the scheduler and the generators."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.process_index < len(state["random_states"]):  # there may have been fewer processes
            cpu, gpu = state["random_states"][self.process_index]
            torch.set_rng_state(cpu)
            if gpu is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(gpu)
        return TrainLog(**state["log"])

    def _set_aside(self, path: Path) -> None:
        """Rename a file that is not intact, so that it can be examined. The first process does so."""
        if self.process_index == 0 and path.exists():  # another process may have seen what this one does not
            os.replace(path, path.with_name(f"{path.name}.damaged"))


class DamagedError(ValueError):
    """A checkpoint is not as it was written, or does not fit the model."""


def previous_checkpoint(path: Path) -> Path:
    """Return the file of the checkpoint before the one in `path`."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def remove_checkpoints(path: Path) -> None:
    """Remove the checkpoints of a run, those that were set aside, and what interrupted writes left."""
    for name in (path.name, previous_checkpoint(path).name):
        for file in (path.with_name(name), path.with_name(f"{name}.damaged")):
            file.unlink(missing_ok=True)
    for file in path.parent.glob(f".{glob.escape(path.name)}.*"):
        file.unlink(missing_ok=True)


def write_state(path: Path, state: object) -> None:
    """Write a state with the hash of its bytes, and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(MAGIC + b"0" * HASH_LENGTH + b"\n")
        hashing = _HashingFile(file)
        torch.save(state, hashing)  # type: ignore[arg-type]  # it needs no more than `write` and `flush`
        file.seek(len(MAGIC))
        file.write(hashing.digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())


def read_state(path: Path) -> dict[str, Any]:
    """Read a state onto the CPU, after a check of its hash.

    Raises:
        DamagedError: The file does not have the hash of its bytes.
        FileNotFoundError: There is no such file.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise DamagedError("is damaged, or a checkpoint of another version")
        digest, content = file.read(HASH_LENGTH + 1), file.read()
    if digest != hashlib.sha256(content).hexdigest().encode() + b"\n":
        raise DamagedError("is damaged (its contents have another hash)")
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise DamagedError("has no state of a run")
    return state


class _HashingFile:
    """Hashes all that is written to a file."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _problem(error: Exception) -> str:
    """Return what is wrong with a file, in one line."""
    first_line = str(error).partition("\n")[0]
    return first_line if isinstance(error, DamagedError) else f"is broken ({type(error).__name__}: {first_line})"


def _require_same(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise DamagedError(f"has another {what} than this run")


def _require_like(what: str, tensor: Tensor, expected: Tensor) -> None:
    """Check the shape and the dtype of a tensor."""
    found, wanted = (f"{[*one.shape]} {one.dtype}" for one in (tensor, expected))
    if found != wanted:
        raise DamagedError(f"does not fit this run ({what} is {found}, not {wanted})")


def _random_state() -> tuple[Tensor, Tensor | None]:
    """Return the states of the CPU's and the GPU's generator."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None
