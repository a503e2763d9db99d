"""Start a table with two workers, end its parent by a signal, and print what became of all three as JSON.

Arguments: name of the signal, folder of results, options of the table.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from bench.cli.parser import main
from bench.runs import pool

MAX_SECONDS = 30.0


def children(pid):
    """Return the ids of a process's children, on Linux."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid):
    """Return whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < MAX_SECONDS, "waited too long"
        time.sleep(0.02)
    return time.monotonic() - start


def records(results):
    return sorted(path.name for path in (results / "runs").glob("*.json"))


def end(name, results, *options):
    pool.START_METHOD = "fork"  # a new Python takes seconds to import everything
    if (parent := os.fork()) == 0:
        os._exit(main(["table2", "--jobs", "2", "--results", str(results), *options]))
    # In the first run after the base's, so that both workers train.
    wait_until(lambda: records(results) and len(children(parent)) == 2)
    time.sleep(0.3)
    workers, before = children(parent), records(results)
    os.kill(parent, signal.Signals[name])
    start = time.monotonic()
    _, status = os.waitpid(parent, 0)
    alive_after_parent = [pid for pid in workers if is_alive(pid)]
    wait_until(lambda: not any(map(is_alive, workers)))
    seconds = time.monotonic() - start
    time.sleep(0.3)
    print(json.dumps({
        "code": os.waitstatus_to_exitcode(status),
        "alive_after_parent": alive_after_parent,
        "seconds": seconds,
        "before": before,
        "after": records(results),
        "temporary": [str(path) for path in results.rglob(".*")],
    }))  # fmt: skip


if __name__ == "__main__":
    end(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
