"""Progress of a run: a bar on a terminal, lines elsewhere."""

import io
import multiprocessing
import re
import sys
import time

import pytest

from bench.train import progress
from bench.train.progress import Progress

LINE = re.compile(r"(run-\w+): step (\d+)/\d+, loss \d\.\d{3}, [\d,]+ tokens/s, [\d:]+ left")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets, in place of the time."""
    seconds = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: seconds[0])
    return seconds


def no_loss() -> float:
    pytest.fail("read the loss without showing it")


def test_off_a_terminal_a_line_has_steps_loss_speed_and_time_left(clock, capsys):
    with Progress("run-a", steps=40, done=10, is_shown=True) as shown:
        clock[0] = 5.0
        shown.update(11, 50, no_loss)
        clock[0] = 40.0
        shown.update(20, 4000, lambda: 1.5)
        clock[0] = 41.0
        shown.update(21, 4100, no_loss)
        clock[0] = 4 * 3600.0
        shown.update(22, 5000, lambda: 2.0)
    # Ten steps in 40 s by this process; ten more by an earlier one, which is not part of the speed.
    first, second = capsys.readouterr().err.splitlines()
    assert first == "run-a: step 20/40, loss 1.500, 100 tokens/s, 01:20 left"
    assert second == "run-a: step 22/40, loss 2.000, 0 tokens/s, 6:00:00 left"


def test_a_process_that_shares_the_run_shows_nothing(clock, capsys):
    with Progress("run-a", steps=40, done=0, is_shown=False) as shown:
        clock[0] = 100.0
        shown.update(1, 50, no_loss)
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_there_is_a_bar_and_no_line(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("run-a", steps=40, done=10, is_shown=True) as shown:
        clock[0] = 50.0
        shown.update(11, 500, lambda: 1.5)
        shown.bar.refresh()
        text = sys.stderr.getvalue()
    assert "11/40" in text and "loss 1.500, 10 tokens/s" in text and "\n" not in text


def work(name: str) -> None:
    """Show a run of a thousand steps in a worker process, at a line per step."""
    progress.SECONDS_PER_LINE = 0.0
    sys.stderr.isatty = lambda: True  # type: ignore[method-assign]
    with Progress(name, steps=1000, done=0, is_shown=True) as shown:
        for step in range(1, 1001):
            shown.update(step, step, lambda: 1.0)
            time.sleep(0)


def test_lines_of_worker_processes_stay_whole(capfd):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(f"run-{letter}",)) for letter in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    lines = capfd.readouterr().err.splitlines()
    matches = [LINE.fullmatch(line) for line in lines]
    assert len(lines) == 2000 and all(matches)
    assert {name: [int(m[2]) for m in matches if m and m[1] == name] for name in ("run-a", "run-b")} == {
        name: list(range(1, 1001)) for name in ("run-a", "run-b")
    }
