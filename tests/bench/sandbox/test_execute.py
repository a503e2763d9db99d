"""Programs that try to escape the sandbox: each is contained and fails.

The harness continues.
Harmless attacks are also run without the sandbox, where they succeed. This shows that the sandbox stopped them.
"""

import os
import platform
import socket
import subprocess
import sysconfig
import time
import uuid
import venv
from pathlib import Path

import pytest

from bench.errors import UserError
from bench.sandbox import bubblewrap, execute
from bench.sandbox.execute import Outcome, require_sandbox, run_program, run_programs

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def harness_unharmed(monkeypatch):
    """Check after each test that no descriptor is left open.

    No started process is alive either.
    """
    mark = uuid.uuid4().hex
    monkeypatch.setattr(execute, "RUNNER", f"{execute.RUNNER}\n# {mark}\n")
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before
    deadline = time.monotonic() + 5  # killed processes take a moment to go
    while left := processes(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def processes(mark):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:  # ended meanwhile
            pass
    return found


@pytest.fixture(scope="session")
def sandboxed():
    try:
        require_sandbox()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(params=[False, True], ids=["sandboxed", "unsafe"])
def unsafe(request):
    if not request.param:
        request.getfixturevalue("sandboxed")
    return request.param


RIGHT = "def add(a, b):\n    return a + b\n"
TESTS = "def check(candidate):\n    assert candidate(1, 2) == 3, 'of 1 and 2'\n\ncheck(add)\n"


@pytest.mark.parametrize(
    "program, reason, detail",
    [
        (RIGHT, "passed", ""),
        ("from math import *\n" + RIGHT + "print('é · ' + chr(0x1F600), add(1, 1))", "passed", ""),
        (RIGHT + "if __name__ == '__main__':\n    add(*map(int, input().split()))", "passed", ""),
        ("def add(a, b):\n    return a - b\n", "failed", "AssertionError: of 1 and 2 (tests, line 2)"),
        ("def add(a, b):\n    raise KeyError('ключ\\x1b[2J')", "failed", r"KeyError: 'ключ\x1b[2J' (program, line 2)"),
        ("raise ValueError('\x1b[2Jgone')", "failed", "ValueError:  [2Jgone (program, line 1)"),
        ("def add(a, b)\n", "failed", "SyntaxError: expected ':'"),
        (RIGHT + "'''", "failed", "SyntaxError: unterminated triple-quoted string literal (detected at line 3)"),
        (RIGHT + "\0", "failed", "SyntaxError: source code string cannot contain null bytes"),
        (RIGHT + "# \ud800", "failed", "UnicodeEncodeError: 'utf-8' codec can't encode character"),
        ("", "failed", "NameError: name 'add' is not defined (tests, line 4)"),
        (RIGHT + "input()", "failed", "EOFError: EOF when reading a line (program, line 3)"),
        ("def add(a, b):\n    return add(a, b)", "failed", "RecursionError: maximum recursion depth exceeded"),
        ("import ctypes\nctypes.string_at(0)", "failed", "ended with status"),
    ],
)
def test_a_program_passes_if_its_tests_do(program, reason, detail, unsafe):
    outcome = run_program(program, TESTS, unsafe=unsafe)
    assert outcome.reason == reason and outcome.detail.startswith(detail)
    assert outcome.passed == (reason == "passed")


EARLY = {
    "leaves": "raise SystemExit(0)",
    "leaves at once": "import os\nos._exit(0)",
    "leaves when called": "import sys\ndef add(a, b):\n    sys.exit(0)",
    "leaves at once when called": "import os\ndef add(a, b):\n    os._exit(0)",
    "leaves when it is over": "import atexit, os\natexit.register(os._exit, 0)",
    "becomes another program": "import os, sys\nos.execv(sys.executable, ['python', '-c', 'print(1)'])",
    "dies": "import signal\nsignal.raise_signal(signal.SIGKILL)",
    "replaces check": "def check(candidate):\n    pass\ndef add(a, b):\n    pass",
    "prints success": "import os\nprint('ready\\npassed\\nOK', flush=True)\nos._exit(0)",
    "writes success everywhere": "import os\nfor fd in range(256):\n    try: os.write(fd, b'passed ' + b'0' * 64)\n"
    "    except OSError: pass\ndef add(a, b):\n    return 0",
    "floods everything": "import os\nfor fd in range(256):\n    try: os.write(fd, bytes(50_000))\n"
    "    except OSError: pass\nos._exit(0)",
    "copies everything to everything": "import os\nfor source in range(256):\n    try: text = os.read(source, 64)\n"
    "    except OSError: continue\n"
    "    for to in range(256):\n        try: os.write(to, text)\n        except OSError: pass\nos._exit(0)",
}


@pytest.mark.parametrize("name", EARLY)
def test_a_program_that_ends_before_its_tests_fails(name, unsafe):
    outcome = run_program(EARLY[name], TESTS, unsafe=unsafe)
    assert outcome.reason in ("failed", "output"), outcome


WRONG = "def add(a, b):\n    return 0\n"
BELOW = (
    WRONG
    + """
def frames():
    try:
        1 / 0
    except ZeroDivisionError as error:
        frame = error.__traceback__.tb_frame
    while frame:
        yield frame
        frame = frame.f_back
"""
)
CHEATS = {
    "exec": WRONG + "import builtins\nbuiltins.exec = print",
    "compile": WRONG
    + "import builtins\nbuiltins.compile = lambda *a, **k: real('0', '<tests>', 'exec')\nreal = compile",
    "abs": WRONG + "import builtins\nbuiltins.abs = lambda x: 0",
    "all builtins": WRONG
    + "import builtins\nvars(builtins).update({n: print for n in ('exec', 'eval', 'compile', 'abs', 'any')})",
    "exec of the runner": WRONG + "import __main__\n__main__.exec = __main__.compile = print",
    "functions of the runner": WRONG
    + "import __main__\nfor name in ('_exit', 'write', 'deque', 'traceback', 'operator', "
    "'itertools'):\n    setattr(__main__, name, print)\nraise ValueError",
    "variables of frames": BELOW + "for f in frames():\n    for name, value in [*f.f_locals.items()]:\n"
    "        if f.f_code.co_name in ('main', '_make_steps', '<module>') and f.f_globals is not globals():\n"
    "            if isinstance(value, dict) and 'tests' in value: value['tests'] = ''\n"
    "            if hasattr(value, '__next__'): next(value)",
    "the next step": BELOW + "import gc\nfor found in [*gc.get_objects(), *gc.get_referrers(exec)]:\n"
    "    if type(found).__name__ in ('starmap', 'tuple_iterator', 'map'):\n        for _ in range(9): next(found, 0)",
    "what frames refer to": BELOW + "import gc\nfor f in frames():\n    for found in gc.get_referents(f):\n"
    "        if hasattr(found, '__next__'):\n            for _ in range(9): next(found, 0)",
    "shared memory": WRONG + "import gc, mmap\nfor found in gc.get_objects():\n"
    "    if isinstance(found, mmap.mmap): print(found[:])\n    if isinstance(found, dict) and 'secret' in found: 1 / 0",
    "a tracer": WRONG
    + "import sys\ndef skip(frame, event, argument):\n    if event == 'line' and frame.f_code.co_name == "
    "'check':\n        frame.f_lineno += 1\n    return skip\nsys.settrace(skip)\nsys.setprofile(skip)",
    "check": WRONG + "def check(candidate): pass",
    "AssertionError": WRONG + "import builtins\nbuiltins.AssertionError = print",
}
CHECKED = "def check(candidate):\n    assert abs(candidate(1, 2) - 3) < 1e-6\n    return 0\n\ncheck(add)\n"


@pytest.mark.parametrize("name", CHEATS)
def test_a_wrong_program_that_changes_what_runs_it_fails(name, unsafe):
    outcome = run_program(CHEATS[name], CHECKED, unsafe=unsafe)
    assert outcome.reason == "failed", outcome
    if "raise ValueError" not in CHEATS[name]:  # the same in a right program changes nothing
        assert run_program(CHEATS[name].replace("return 0", "return a + b"), CHECKED, unsafe=unsafe).passed


@pytest.mark.parametrize("close", ["os.closerange(0, 4096)", "[os.close(fd) for fd in (0, 1, 2)]"])
def test_a_right_program_may_close_its_descriptors(close, unsafe):
    assert run_program(f"import os\n{close}\n{RIGHT}", TESTS, unsafe=unsafe) == Outcome("passed")


@pytest.mark.parametrize("make", ["os.mkdir(name)", "os.symlink('x', name)", "open(name, 'w').close()"])
def test_the_number_of_files_is_limited(make, sandboxed):
    began = time.monotonic()
    outcome = run_program(f"import os, itertools\nfor i in itertools.count():\n    name = str(i)\n    {make}", "")
    assert outcome == Outcome("output", f"more than {execute.MAX_FILES} files")
    assert time.monotonic() - began < 5
    assert run_program("import os\nfor i in range(1000): os.mkdir(str(i))", "").passed


INIT = {
    "ptrace": "libc.ptrace(16, 1, 0, 0)",
    "ptrace of itself": "libc.ptrace(0, 0, 0, 0)",
    "tgkill": "libc.syscall({tgkill}, 1, 1, 9)",
    "tkill": "libc.syscall({tkill}, 1, 9)",
    "prlimit": "libc.prlimit(1, 7, (ctypes.c_ulong * 2)(0, 0), None)",
    "prlimit by number": "libc.prlimit(2, 7, (ctypes.c_ulong * 2)(0, 0), None)",
    "process_vm_readv": "libc.process_vm_readv(1, None, 0, None, 0, 0)",
    "pidfd_open": "libc.syscall(434, 1, 0)",
}


@pytest.mark.parametrize("name", INIT)
def test_the_init_of_the_sandbox_cannot_be_touched(name, sandboxed):
    numbers = bubblewrap._OF_A_PROCESS[platform.machine()]
    call = INIT[name].format(**numbers)
    program = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nfound = {call}, ctypes.get_errno()"
    assert run_program(program, "assert found == (-1, 1), found").passed


def test_a_program_may_limit_and_signal_itself(sandboxed):
    program = "import resource, signal\nresource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))\nseen = []\n"
    program += "signal.signal(10, lambda *a: seen.append(a[0]))\nsignal.raise_signal(10)"
    assert run_program(program, "assert seen == [10], seen").passed


@pytest.mark.parametrize(
    "program, reason",
    [
        ("while True: pass", "timeout"),
        ("import time, os\nos.closerange(0, 256)\ntime.sleep(60)", "timeout"),
        ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", "timeout"),
        ("import signal\nfor s in range(1, 32):\n    if s not in (9, 19): signal.signal(s, signal.SIG_IGN)\n"
         "while True: pass", "timeout"),
        ("import threading\ndef spin():\n    while True: pass\n"
         "for _ in range(3): threading.Thread(target=spin).start()\nspin()", "timeout"),
        ("while True: print('endless')", "output"),
        ("import sys\nwhile True: sys.stderr.write('endless')", "output"),
        ("bytearray(64 << 30)", "memory"),
        ("kept = []\nwhile True: kept.append(bytearray(1 << 24))", "memory"),
        ("kept = []\nwhile True: kept = [kept]", "memory"),
        ("with open('file', 'wb') as f:\n    while True: f.write(bytes(1 << 20))", "failed"),
    ],
)  # fmt: skip
def test_limits(program, reason, unsafe):
    began = time.monotonic()
    seconds = 0.4 if reason == "timeout" else 10
    memory_bytes = 1 << 27 if reason == "memory" else 1 << 30  # malloc may reserve 128 MiB for a thread
    assert run_program(program, "", seconds=seconds, memory_bytes=memory_bytes, unsafe=unsafe).reason == reason
    assert time.monotonic() - began < 8


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'while True: pass'])",
        "import os, sys\nos.posix_spawn(sys.executable, ['python'], {})",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        "import os\nif os.fork():\n    os._exit(0)\nos.setsid()\nwhile True: print('still here')",
        "import os\nos.kill(os.getppid(), 9)",
        "import os\nos.kill(-1, 9)",
        "import os\nos.killpg(0, 9)",
        "import os\nos.kill(HARNESS, 9)",
        "import os\nos.memfd_create('out of the address space')",
        "import ctypes\nassert ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0",
        "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
        "for i in range(99):\n    with open(f'{i}', 'wb') as f: f.write(bytes(1 << 20))",
        "kept = [open('file', 'w')]\nwhile True: kept.append(open('file'))",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    ],
)
def test_neither_processes_nor_memory_escape_their_limits(program, sandboxed):
    outcome = run_program(program.replace("HARNESS", str(os.getpid())), "", seconds=5)
    assert outcome.reason == "failed", outcome


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import threading, time\nthreading.stack_size(1 << 15)\n"
        "while True: threading.Thread(target=time.sleep, args=[60]).start()",
    ],
)
def test_fork_and_thread_bombs_do_not_disturb_other_programs(program, sandboxed):
    outcomes = run_programs([(program, ""), (RIGHT, TESTS), (program, ""), (RIGHT, TESTS)], seconds=1)
    assert [outcome.passed for outcome in outcomes] == [False, True, False, True]


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX"])
def test_no_connection_leaves_the_sandbox(family, sandboxed, tmp_path):
    address = {"AF_INET": ("127.0.0.1", 0), "AF_INET6": ("::1", 0), "AF_UNIX": f"\0{uuid.uuid4().hex}"}[family]
    with socket.socket(getattr(socket, family)) as listener:
        try:
            listener.bind(address)
        except OSError as error:
            pytest.skip(f"this machine has no {family} to listen on: {error}")
        listener.listen()
        listener.setblocking(False)
        program = f"import socket\nsocket.socket(socket.{family}).connect({listener.getsockname()!r})"
        assert run_program(program, "").reason == "failed"
        with pytest.raises(BlockingIOError):
            listener.accept()
        assert run_program(program, "", unsafe=True).passed
        listener.accept()[0].close()


@pytest.mark.parametrize("family", ["AF_VSOCK", "AF_NETLINK", "AF_ALG"])
def test_no_socket_without_a_namespace_is_opened(family, sandboxed):
    outcome = run_program(f"import socket\nsocket.socket(socket.{family}, socket.SOCK_RAW)", "")
    assert outcome.detail.startswith("PermissionError")


def test_host_files_are_not_visible(sandboxed, tmp_path):
    mine = tmp_path / "secret"
    mine.write_text("of the host")
    needed = [Path(bubblewrap.interpreter()), Path(sysconfig.get_path("stdlib")).resolve()]
    home = [path for path in Path.home().glob("*") if not any(file.is_relative_to(path) for file in needed)]
    paths = [str(path) for path in (mine, Path(__file__), *home)]
    paths += ["/etc/passwd", "/etc/hostname", "/proc/self", "/sys/kernel", "/bin/sh", "/dev/tty", "/var", "/run"]
    program = f"import os\nfound = [path for path in {paths!r} if os.path.lexists(path)]"
    outcome = run_program(program, "assert not found, found")
    assert outcome.passed, outcome
    assert run_program(f"open({str(mine)!r})", "").detail.startswith("FileNotFoundError")
    assert run_program(f"text = open({str(mine)!r}).read()", "assert text == 'of the host'", unsafe=True).passed


def test_the_interpreter_cannot_be_written_to(sandboxed):
    library = Path(sysconfig.get_path("stdlib")).resolve()
    packages = sysconfig.get_path("purelib")
    paths = [str(library / "os.py"), str(library / "new.py"), str(library / "site-packages" / "new.py"), packages]
    paths += [f"{packages}/new.py", bubblewrap.interpreter(), "/new", "/dev/new", "/lib/new"]
    program = f"""
import os
done = []
for path in {paths!r}:
    for act in (lambda: open(path, "a"), lambda: os.makedirs(path + "/new"), lambda: os.chmod(path, 0o777)):
        try:
            act()
            done.append(path)
        except OSError:
            pass
"""
    modes = {path: os.stat(path).st_mode for path in paths if os.path.exists(path)}
    # A checkout below /tmp has its packages there, where the program has a folder of its own.
    outcome = run_program(program, "assert not [path for path in done if not path.startswith('/tmp/')], done")
    assert outcome.passed, outcome
    assert modes == {path: os.stat(path).st_mode for path in paths if os.path.exists(path)}  # on the host
    assert not os.path.exists(f"{packages}/new")
    assert run_program("open('new', 'w').write('but its own folder can')", "assert open('new').read()").passed


def test_the_environment_and_the_folder_are_empty(unsafe, monkeypatch):
    monkeypatch.setenv("TOKEN", "of the host")
    program = "import os\nseen = {*os.listdir(), *os.environ} - {'LD_LIBRARY_PATH', 'PWD', 'LC_CTYPE'}"
    assert run_program(program, "assert not seen, seen", unsafe=unsafe) == Outcome("passed")


def test_a_process_left_behind_does_not_delay_the_harness():
    leave = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(3)\nos._exit(0)"
    began = time.monotonic()
    assert run_program(leave, "", unsafe=True).reason == "failed"
    assert time.monotonic() - began < 2.5  # its pipes are still open


def test_outcomes_keep_the_order_of_their_programs(unsafe):
    programs = [(f"import time\ntime.sleep({(9 - i) / 100})", f"assert {i} % 3, '{i}'") for i in range(10)]
    outcomes = run_programs(iter(programs), unsafe=unsafe)
    assert [outcome.passed for outcome in outcomes] == [bool(i % 3) for i in range(10)]
    assert [outcome.detail[:17] for outcome in outcomes[::3]] == [f"AssertionError: {i}" for i in (0, 3, 6, 9)]


def test_the_sandbox_runs_from_a_virtual_environment(sandboxed, tmp_path):
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    script = "import sys\nfrom bench.sandbox.execute import run_program\nassert sys.prefix != sys.base_prefix\n"
    script += "print(run_program('import ssl, ctypes, decimal, zoneinfo', '').passed)"
    python = str(tmp_path / "env" / "bin" / "python")
    assert subprocess.run([python, "-c", script], cwd=ROOT, capture_output=True, text=True).stdout == "True\n"


def test_a_missing_bubblewrap_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for attempt in (require_sandbox, lambda: run_program("", ""), lambda: run_programs([("", "")])):
        with pytest.raises(UserError, match=r"not installed.*apt install bubblewrap.*--unsafe-code") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    require_sandbox(unsafe=True)


def test_forbidden_namespaces_are_an_error(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"uid map: Permission denied.*user namespaces.*--unsafe-code") as caught:
        require_sandbox()
    assert "\n" not in str(caught.value)


def test_unknown_machines_are_an_error(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "vax")
    with pytest.raises(UserError, match=r"not vax.*--unsafe-code"):
        bubblewrap.one_process_filter()
