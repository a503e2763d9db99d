"""Progress of training or scoring: a bar on a terminal, else a line every so often."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from types import TracebackType
from typing import Self

from tqdm import tqdm

SECONDS_PER_LINE = 30.0
SECONDS_TO_FIRST_LINE = 10.0
MIN_SECONDS_OF_PHASE = 5.0  # shorter ones have no line
SECONDS_PER_STATUS = 1.0  # between new texts on a bar
SECONDS_PER_SIGN = 30.0  # of life, while a step or a phase takes long


class Progress:
    """Shows how much of some work is done, its speed and the time left. Use it in a `with` block.

    On a terminal it is a bar. Elsewhere, and in worker processes, whose bars would overwrite each other, it prints
    lines to the standard error. Each line begins with the name of the run. While one unit takes long, a line says so.

    Args:
        name: Name of the run.
        unit: One unit of the work: "step".
        total: Units of the whole work.
        done: Units that were done before, by an interrupted process.
        is_shown: False for processes that share the run with the one that shows it.
    """

    def __init__(self, name: str, unit: str, total: int, done: int = 0, is_shown: bool = True) -> None:
        self.name, self.unit, self.total, self.done, self.is_shown = name, unit, total, done, is_shown
        self.start = self.last_shown = time.perf_counter()
        self.shown_done = done  # in the last line
        self.has_bar = is_shown and not parent_process() and sys.stderr.isatty()
        self.interval = SECONDS_PER_STATUS if self.has_bar else SECONDS_PER_LINE
        self.bar = tqdm(total=total, initial=done, unit=unit, desc=name, disable=not self.has_bar, leave=False)
        self.now_done = done
        self.signs = (
            _SignsOfLife(lambda: f"{name}: {unit} {self.now_done}/{total} is done, the next takes longer than")
            if is_shown
            else None
        )

    def __enter__(self) -> Self:
        if self.signs:
            self.signs.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.signs:
            self.signs.stop()
        self.bar.close()

    def update(self, done: int, status: Callable[[float], str]) -> None:
        """Show that more is done.

        Args:
            done: Units that are done, those of earlier processes included.
            status: Returns more to show, for the seconds since the beginning. It is called only when it is shown,
                because it may wait for the GPU.
        """
        if self.signs:
            self.signs.reset()
        self.now_done = done
        if self.has_bar:
            self.bar.update(done - self.bar.n)
        now = time.perf_counter()
        is_first = self.shown_done == self.done
        interval = min(self.interval, SECONDS_TO_FIRST_LINE) if is_first else self.interval
        if not self.is_shown or now - self.last_shown < interval:
            return
        since, self.last_shown = now - self.last_shown, now
        more, self.shown_done = done - self.shown_done, done
        text = status(now - self.start)
        if self.has_bar:
            self.bar.set_postfix_str(text, refresh=False)
            return
        # By the speed since the last line: the first steps compile kernels.
        left = since / max(1, more) * (self.total - done)
        print_line(self.name, f"{self.unit} {done}/{self.total}, {text}, {tqdm.format_interval(left)} left")


class _SignsOfLife:
    """A thread that prints a line every `SECONDS_PER_SIGN` while nothing else is shown.

    Args:
        text: Returns a line up to the number of seconds. It is called in the thread.
    """

    def __init__(self, text: Callable[[], str]) -> None:
        self._text = text
        self._interval = SECONDS_PER_SIGN
        self._since = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="signs of life")

    def start(self) -> None:
        self.reset()
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def reset(self) -> None:
        """Count the seconds from now."""
        self._since = time.monotonic()

    def _run(self) -> None:
        next_sign, since = self._interval, self._since
        while not self._stopped.wait(max(0.01, next_sign - (time.monotonic() - self._since))):
            if since != self._since:
                next_sign, since = self._interval, self._since
            seconds = time.monotonic() - since
            if seconds >= next_sign:
                _print(f"{self._text()} {seconds:.0f} s")
                next_sign += self._interval


@contextmanager
def timed_phase(name: str, what: str, is_shown: bool = True) -> Iterator[None]:
    """Print a line after the work in the `with` block if it took long: "NAME: WHAT in 12 s".

    While it takes very long, there are lines in between.

    Args:
        name: Name of the run.
        what: What has been done: "loaded the base model".
        is_shown: False for processes that share the run with the one that shows it.
    """
    start = time.perf_counter()
    signs = _SignsOfLife(lambda: f"{name}: not yet {what} after") if is_shown else None
    if signs:
        signs.start()
    try:
        yield
    finally:
        if signs:
            signs.stop()
    seconds = time.perf_counter() - start
    if is_shown and seconds >= MIN_SECONDS_OF_PHASE:
        print_line(name, f"{what} in {seconds:.0f} s")


def print_line(name: str, text: str) -> None:
    """Print a line about a run to the standard error, above a bar if there is one."""
    _print(f"{name}: {text}")


def _print(text: str) -> None:
    """Print a line by one call, so that lines of several processes do not mix."""
    with tqdm.external_write_mode(file=sys.stderr):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
