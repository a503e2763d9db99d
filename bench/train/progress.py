"""Progress of a training run: a bar on a terminal, else a line every so often."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from multiprocessing import parent_process
from types import TracebackType
from typing import Self

from tqdm import tqdm

SECONDS_PER_LINE = 30.0
SECONDS_PER_LOSS = 1.0  # between new losses on a bar


class Progress:
    """Shows the steps, the loss, the speed and the time left of a run. Use it in a `with` block.

    On a terminal it is a bar. Elsewhere, and in worker processes, whose bars would overwrite each other, it prints
    lines to the standard error. Each line begins with the name of the run.

    Args:
        name: Name of the run.
        steps: Steps of the whole run.
        done: Steps that were done before, by an interrupted process.
        is_shown: False for processes that share the run with the one that shows it.
    """

    def __init__(self, name: str, steps: int, done: int, is_shown: bool) -> None:
        self.name, self.steps, self.done, self.is_shown = name, steps, done, is_shown
        self.start = self.last_shown = time.perf_counter()
        self.has_bar = is_shown and not parent_process() and sys.stderr.isatty()
        self.interval = SECONDS_PER_LOSS if self.has_bar else SECONDS_PER_LINE
        self.bar = tqdm(total=steps, initial=done, unit="step", desc=name, disable=not self.has_bar, leave=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.close()

    def update(self, step: int, tokens: int, loss: Callable[[], float]) -> None:
        """Show that a step is done.

        Args:
            step: Number of the step, from 1.
            tokens: Tokens trained on in this `with` block.
            loss: Returns the latest loss. It is called only when the loss is shown, because it may wait for the GPU.
        """
        if self.has_bar:
            self.bar.update()
        now = time.perf_counter()
        if not self.is_shown or now - self.last_shown < self.interval:
            return
        self.last_shown = now
        status = f"loss {loss():.3f}, {tokens / (now - self.start):,.0f} tokens/s"
        if self.has_bar:
            self.bar.set_postfix_str(status, refresh=False)
            return
        left = (now - self.start) / (step - self.done) * (self.steps - step)
        line = f"{self.name}: step {step}/{self.steps}, {status}, {tqdm.format_interval(left)} left\n"
        sys.stderr.write(line)  # by one call, so that lines of several processes do not mix
        sys.stderr.flush()
