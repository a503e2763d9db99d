"""Make runs, publish them, write the leaderboards and the report, and be killed on the way.

Arguments: `run`, or `jobs` for two runs in worker processes; a folder for everything that is written; folder of the
base model; when to be killed:

- `never`;
- `event N`: before the N-th time that a file in the folder is opened, renamed or removed by this process;
- `seconds S`: after this time.

Each event is a line of the output, with the command and the kind of file, and then comes the number of events. At the
end of `never` the pages are compared with the records.
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from bench.cli.parser import main
from bench.experiments.profiles import PROFILES
from bench.records import provenance, store
from bench.runs import pool
from tasks import Generator

SOURCE = Generator((("train", 16), ("validation", 4), ("test", 4)))
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir"}
RUNS = {
    "run": ["run"],
    "jobs": ["table2", "--methods", "lora", "--seeds", "1", "--jobs", "2"],  # that of the base, and one of LoRA
}


def program(runs, folder, model, when, value="0"):
    PROFILES["tiny"] = replace(
        PROFILES["tiny"],
        source=SOURCE,
        batch_size=8,
        eval_batch_size=8,
        checkpoint_every=3,
        warmup_ratio=0.0,
        mixtures={"intra": "procedural"},
    )
    pool.START_METHOD = "fork"  # a new Python takes seconds to import everything
    provenance.ROOT = Path(folder)
    store.RESULTS = Path(folder) / "results"
    store.commit_of = lambda *arguments: "0" * 40
    results = Path(folder) / "local"
    seen, command, process = 0, [], os.getpid()

    def count(event, arguments):
        nonlocal seen
        if event in EVENTS and isinstance(arguments[0], str) and arguments[0].startswith(folder):
            if os.getpid() != process:
                return  # a worker
            seen += 1
            os.write(1, f"{command[0]} {Path(arguments[0]).suffix}\n".encode())
            if when == "event" and seen == int(value):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    if when == "seconds":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process as SIGKILL does: nothing is cleaned up
        signal.setitimer(signal.ITIMER_REAL, float(value))
    for command in (
        [*RUNS[runs], "--profile", "tiny", "--model", model, "--results", results],
        ["publish", "--profile", "tiny", "--results", results],
        ["leaderboard"],
        ["report", "--output", Path(folder) / "html" / "report.html"],
        ["export", "--output", Path(folder) / "export"],
    ):
        if code := main([str(word) for word in command]):
            sys.exit(code)
    print(seen)
    if when == "never":
        sys.exit(main(["leaderboard", "--check"]))


if __name__ == "__main__":
    program(*sys.argv[1:])
