"""The script that the interpreter in the sandbox runs.

It is started as `python -c SCRIPT REPORT SECRET`.

REPORT and SECRET are file descriptors, and the job is JSON on standard input. The script is trusted until it writes
READY. After that the program may change any module, so everything needed later is imported as a name before.
"""

import json
import resource
import sys
import traceback
import types
from os import _exit, read, write

READY = b"ready\n"
FAILED = b"failed: "
OUT_OF_MEMORY = b"out of memory"
SECRET_BYTES = 64


def main() -> None:
    """Run the program and its tests, then report the secret or the exception."""
    report, secret = map(int, sys.argv[1:])
    job = json.load(sys.stdin)  # reads to the end, so a program that asks for input gets none
    for limit, values in job["limits"]:
        resource.setrlimit(limit, values)
    module = sys.modules["program"] = types.ModuleType("program")  # so code under `__name__ == "__main__"` is skipped
    sys.argv = sys.orig_argv = ["program"]
    write(report, READY)
    try:
        # Compiled separately: an open quote at the end of the program must not swallow the tests.
        for name in ("program", "tests"):
            exec(compile(job[name], f"<{name}>", "exec"), module.__dict__)
    except MemoryError:  # a longer report could fail too
        write(report, OUT_OF_MEMORY)
        _exit(1)
    except BaseException as error:
        detail = traceback.format_exception_only(error)[-1].strip()[:1000]
        places = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in ("<program>", "<tests>")]
        where = f" ({places[-1].filename[1:-1]}, line {places[-1].lineno})" if places else ""
        write(report, FAILED + f"{detail}{where}".encode(errors="replace"))
        _exit(1)
    write(report, read(secret, SECRET_BYTES))
    _exit(0)


if __name__ == "__main__":
    main()
