"""Make a run, publish it, write the leaderboards and the report, and be killed on the way.

Arguments: a folder for everything that is written; folder of the base model; when to be killed:

- `never`;
- `event N`: before the N-th time that a file in the folder is opened, renamed or removed;
- `seconds S`: after this time.

The last line of the output is the number of such events.
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from bench.cli.parser import main
from bench.experiments.profiles import PROFILES
from bench.records import provenance, store
from tasks import Generator

SOURCE = Generator((("train", 16), ("validation", 4), ("test", 4)))
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir"}


def program(folder, model, when, value="0"):
    PROFILES["tiny"] = replace(
        PROFILES["tiny"],
        source=SOURCE,
        batch_size=8,
        checkpoint_every=3,
        warmup_ratio=0.0,
        mixtures={"intra": "procedural"},
    )
    provenance.ROOT = Path(folder)
    store.RESULTS = Path(folder) / "results"
    store.commit_of = lambda *arguments: "0" * 40
    results = Path(folder) / "local"
    seen = 0

    def count(event, arguments):
        nonlocal seen
        if event in EVENTS and isinstance(arguments[0], str) and arguments[0].startswith(folder):
            seen += 1
            if when == "event" and seen == int(value):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    if when == "seconds":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process as SIGKILL does: nothing is cleaned up
        signal.setitimer(signal.ITIMER_REAL, float(value))
    for command in (
        ["run", "--profile", "tiny", "--model", model, "--results", results],
        ["publish", "--profile", "tiny", "--results", results],
        ["leaderboard"],
        ["leaderboard", "--check"],
        ["export", "--output", Path(folder) / "export"],
    ):
        if code := main([str(word) for word in command]):
            sys.exit(code)
    print(seen)


if __name__ == "__main__":
    program(*sys.argv[1:])
