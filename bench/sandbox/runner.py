"""What the interpreter in the sandbox runs: `python -c THIS REPORT SECRET`, two descriptors; the job is on its input.

Trusted until it says that it is ready. Whatever it needs after that it has taken out of the modules before, for the
program may change them, knowingly or not.
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
    report, secret = map(int, sys.argv[1:])
    job = json.load(sys.stdin)  # to the end, so that a program that asks for input gets none
    for limit, values in job["limits"]:
        resource.setrlimit(limit, values)
    module = sys.modules["program"] = types.ModuleType("program")  # as if imported: its "__main__" part does not run
    sys.argv = sys.orig_argv = ["program"]
    write(report, READY)
    try:
        for part in ("program", "tests"):  # compiled apart: an open quote of the program must not swallow the tests
            exec(compile(job[part], f"<{part}>", "exec"), module.__dict__)
    except MemoryError:  # there may be none left to say more
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
