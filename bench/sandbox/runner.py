"""The script that the interpreter in the sandbox runs.

It is started as `python -c SCRIPT REPORT PROOF`.

REPORT is the descriptor of a pipe, and PROOF one of shared memory. The job is JSON on standard input. The script is
trusted until it writes READY. After that the program may change any module and any frame that it can reach.

So the program is the first of several steps, and all of them are made before it runs: the tests are compiled, and
functions such as `exec` are bound. Only an iterator has them, and C code runs it: no variable of a frame below the
program leads to it, and the garbage collector does not list it. The last step writes the secret into the shared memory,
which needs no descriptor. Everything else that is reachable can only report a failure.
"""

import builtins
import gc
import itertools
import json
import mmap
import operator
import resource
import sys
import traceback
import types
from collections import deque
from os import _exit, closerange, write

READY = b"ready\n"
FAILED = b"failed: "
OUT_OF_MEMORY = b"out of memory"
SECRET_BYTES = 64
MAX_DESCRIPTORS = 1 << 16


def main() -> None:
    """Run the program and its tests, then write the secret, or report the exception."""
    report, proof = map(int, sys.argv[1:])
    try:
        deque(_make_steps(report, proof), 0)
    except MemoryError:  # a longer report could fail too
        write(report, OUT_OF_MEMORY)
    except BaseException as error:
        detail = traceback.format_exception_only(error)[-1].strip()[:1000]
        places = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in ("<program>", "<tests>")]
        where = f" ({places[-1].filename[1:-1]}, line {places[-1].lineno})" if places else ""
        write(report, FAILED + f"{detail}{where}".encode(errors="replace"))
    finally:
        _exit(1)


def _make_steps(report: int, proof: int) -> "itertools.starmap[object]":
    """Return an iterator that runs a step each time: the program, the tests, and the proof that both have ended.

    Raises:
        SyntaxError: The program or the tests cannot be compiled.
    """
    job = json.load(sys.stdin)  # reads to the end, so a program that asks for input gets none
    memory = mmap.mmap(proof, SECRET_BYTES)
    closerange(3, report)  # a program cannot read what lies there, or write where it should not
    closerange(report + 1, MAX_DESCRIPTORS)
    for limit, values in job["limits"]:
        resource.setrlimit(limit, values)
    module = sys.modules["program"] = types.ModuleType("program")  # so code under `__name__ == "__main__"` is skipped
    sys.argv = sys.orig_argv = ["program"]
    write(report, READY)
    # Compiled separately: an open quote at the end of the program must not swallow the tests.
    program, tests = (compile(job[name], f"<{name}>", "exec") for name in ("program", "tests"))
    # Tests see what the program defines, and the builtins as they were before it.
    of_tests: dict[str, object] = {}
    untouched = {"__builtins__": dict(vars(builtins))}
    steps = (
        (exec, program, module.__dict__),
        (sys.settrace, None),  # a tracer could jump over lines of the tests
        (sys.setprofile, None),
        (dict.update, of_tests, module.__dict__),
        (dict.update, of_tests, untouched),
        (exec, tests, of_tests),
        (operator.setitem, memory, slice(0, SECRET_BYTES), job["secret"].encode()),
        (_exit, 0),
    )
    iterator = itertools.starmap(operator.call, steps)
    gc.freeze()  # frozen objects are not listed
    del gc.unfreeze
    return iterator


if __name__ == "__main__":
    main()
