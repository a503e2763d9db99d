"""Log runs to TensorBoard, Weights & Biases or MLflow, through accelerate's trackers.

Trackers get figures that the run computes anyway, so they do not change it. They write below one folder and use no
network, unless their own environment variables say otherwise: `WANDB_MODE=online`, `MLFLOW_TRACKING_URI`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import is_mlflow_available, is_tensorboard_available, is_wandb_available
from filelock import FileLock

from bench.errors import UserError
from bench.records.schema import RunConfig

TRACKERS: dict[str, Callable[[], bool]] = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "mlflow": is_mlflow_available,
}
PROJECT = "malora"  # of W&B, and the experiment of MLflow
Log = Callable[[Mapping[str, float | None], int], None]  # values by name, and the step


def log_nothing(values: Mapping[str, float | None], step: int) -> None:
    """Do nothing, in place of a log to trackers."""


def require_trackers(names: tuple[str, ...]) -> None:
    """Check that trackers are installed.

    Raises:
        UserError: One of them is not.
    """
    for name in names:
        if not TRACKERS[name]():
            raise UserError(f"--track {name} needs the package {name}: pip install {name}.")


@contextmanager
def tracked(names: tuple[str, ...], config: RunConfig, folder: Path) -> Iterator[Log]:
    """Log one run inside the `with` block, which gives the function to log with.

    Args:
        names: Names in TRACKERS; none in processes other than the first.
        config: Configuration of the run, which is logged too.
        folder: Folder of all runs' logs.
    """
    if not names:
        yield log_nothing
        return
    with ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        trackers = [_start(name, config, folder) for name in names]
        for tracker in trackers:
            stack.callback(tracker.finish)

        def log(values: Mapping[str, float | None], step: int) -> None:
            known = {name: value for name, value in values.items() if value is not None}
            for tracker in trackers:
                tracker.log(known, step=step)

        yield log


def _start(name: str, config: RunConfig, folder: Path) -> GeneralTracker:
    """Start a tracker and store the configuration.

    Raises:
        UserError: It cannot start.
    """
    make: Any = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        tracker: GeneralTracker = make(config.id, folder / name)
    elif name == "wandb":
        mode = os.environ.get("WANDB_MODE", "offline")
        tracker = make(PROJECT, name=config.id, dir=str(folder), mode=mode)
    else:
        _use_local_store(folder)
        tracker = make(PROJECT, logging_dir=(folder / "mlflow").resolve().as_uri(), run_name=config.id)
    try:
        with FileLock(folder / ".lock"):  # concurrent runs would create MLflow's experiment twice
            tracker.start()
    except Exception as error:  # each library has its own, for a missing login or server
        first_line = str(error).partition("\n")[0]
        raise UserError(f"--track {name} cannot start ({type(error).__name__}: {first_line}).") from error
    tracker.store_init_configuration(_flat(config.to_json()))
    return tracker


def _use_local_store(folder: Path) -> None:
    """Make MLflow write into the folder, unless its environment names a server."""
    if "MLFLOW_TRACKING_URI" not in os.environ:
        import mlflow

        mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return values that every tracker can store; a nested one's name has a dot, and None is text."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
