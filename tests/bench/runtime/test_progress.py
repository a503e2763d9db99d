"""Progress of a run: a bar on a terminal, lines elsewhere."""

import io
import multiprocessing
import re
import sys
import time

import pytest

from bench.runtime import progress
from bench.runtime.progress import Progress, timed_phase

LINE = re.compile(r"(run-\w+): step (\d+)/\d+, fine, [\d:]+ left")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets, in place of the time."""
    seconds = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: seconds[0])
    return seconds


def not_shown(seconds: float) -> str:
    pytest.fail("made a text without showing it")


def test_off_a_terminal_a_line_has_steps_status_and_time_left(clock, capsys):
    with Progress("run-a", "step", 40, done=10) as shown:
        clock[0] = 5.0
        shown.update(11, not_shown)
        clock[0] = 20.0  # the first line comes early
        shown.update(20, lambda seconds: f"{4000 / seconds:g} tokens/s")
        clock[0] = 41.0
        shown.update(21, not_shown)
        clock[0] = 60.0
        shown.update(24, lambda seconds: "slow")
    # Ten steps in 20 s by this process; ten more by an earlier one, which is not part of the speed. Then four in 40 s.
    first, second = capsys.readouterr().err.splitlines()
    assert first == "run-a: step 20/40, 200 tokens/s, 00:40 left"
    assert second == "run-a: step 24/40, slow, 02:40 left"


def test_only_long_phases_have_a_line(clock, capsys):
    for seconds in (4.0, 12.3):
        with timed_phase("run-a", "loaded the base model"):
            clock[0] += seconds
    with timed_phase("run-a", "loaded the base model", is_shown=False):
        clock[0] += 12.3
    assert capsys.readouterr().err == "run-a: loaded the base model in 12 s\n"


def test_while_a_step_or_a_phase_takes_long_a_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_PER_SIGN", 0.05)

    def lines() -> list[str]:
        deadline, found = time.monotonic() + 20, ""
        while found.count("\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
            found += capsys.readouterr().err
        return found.splitlines()

    with Progress("run-a", "step", 40, done=10) as shown:
        assert all(line.startswith("run-a: step 10/40 is done, the next takes longer than ") for line in lines())
        shown.update(11, lambda seconds: "fine")
        assert "run-a: step 11/40 is done, the next takes longer than 0 s" in lines()
    with timed_phase("run-a", "loaded the base model"):
        assert "run-a: not yet loaded the base model after 0 s" in lines()
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().err == ""  # nothing after the end


def test_a_process_that_shares_the_run_shows_nothing(clock, capsys):
    with Progress("run-a", "step", 40, is_shown=False) as shown:
        clock[0] = 100.0
        shown.update(1, not_shown)
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_there_is_a_bar_and_no_line(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("run-a", "step", 40, done=10) as shown:
        clock[0] = 50.0
        shown.update(11, lambda seconds: f"after {seconds:g} s")
        shown.bar.refresh()
        text = sys.stderr.getvalue()
    assert "11/40" in text and "after 50 s" in text and "\n" not in text


def work(name: str) -> None:
    """Show a run of a thousand steps in a worker process, at a line per step."""
    progress.SECONDS_PER_LINE = 0.0
    sys.stderr.isatty = lambda: True  # type: ignore[method-assign]
    with Progress(name, "step", 1000) as shown:
        for step in range(1, 1001):
            shown.update(step, lambda seconds: "fine")
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
