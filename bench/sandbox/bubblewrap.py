"""The sandbox: bubblewrap's command line and a seccomp filter of system calls."""

from __future__ import annotations

import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

from bench.errors import UserError

OR_UNSAFELY = "or run what models write unsafely, on purpose, with --unsafe-code"


def interpreter() -> str:
    """Return the real path of the interpreter, also in a virtual environment."""
    executable: str = sys._base_executable  # type: ignore[attr-defined]  # undocumented, and nothing public has it
    return os.path.realpath(executable)


def command(folder_bytes: int) -> list[str]:
    """Return the bubblewrap command to put before the interpreter's command line.

    The caller adds `--seccomp` with the descriptor of a filter.

    Args:
        folder_bytes: Size of the working folder.

    Raises:
        UserError: Bubblewrap is not installed.
    """
    path = shutil.which("bwrap")
    if path is None:
        raise UserError(
            "Programs that models write run in a sandbox, and bubblewrap, which makes it, is not installed: install it "
            f"(apt install bubblewrap), {OR_UNSAFELY}."
        )
    library, shared_libraries = _find_files()
    words = [path, "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
    words += ["--hostname", "sandbox", "--new-session", "--die-with-parent", "--clearenv"]
    words += ["--setenv", "LD_LIBRARY_PATH", ":".join(sorted({os.path.dirname(file) for file in shared_libraries}))]
    # Bubblewrap's own root is a tmpfs without a size limit, so the last option makes it read-only. There is no /proc,
    # because it describes the host.
    words += ["--size", str(folder_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    for file in (interpreter(), str(library), *shared_libraries):
        words += ["--ro-bind", file, file]
    for packages in (str(path) for path in library.glob("*-packages")):  # packages in the standard library's folder
        words += ["--tmpfs", packages, "--remount-ro", packages]
    for device in ("/dev/null", "/dev/urandom"):
        words += ["--dev-bind", device, device]
    return [*words, "--remount-ro", "/"]


@cache
def _find_files() -> tuple[Path, list[str]]:
    """Return the standard library's folder, and the shared libraries.

    A shared library is given by the path that the loader uses.
    """
    library = Path(sysconfig.get_path("stdlib")).resolve()
    binaries = [interpreter(), *map(str, library.glob("lib-dynload/*.so"))]
    listing = subprocess.run(["ldd", *binaries], capture_output=True, text=True).stdout
    return library, sorted(set(re.findall(r"(/.*) \(0x", listing)))


# Refused system calls, by machine (Linux, asm/unistd.h): new processes; signals to other processes; sockets, since not
# all families have namespaces (AF_VSOCK), and io_uring, which could open sockets past this filter; keyrings and the
# kernel's log, which have no namespaces either; memory that the limit of the address space does not count; and what
# reads or changes another process, because the sandbox's own init runs as the same user.
_SYSTEM_CALLS = {
    "x86_64": {
        "fork": 57, "vfork": 58, "kill": 62, "unshare": 272, "socket": 41, "add_key": 248, "request_key": 249,
        "keyctl": 250, "syslog": 103, "shmget": 29, "msgget": 68, "memfd_create": 319,
        "ptrace": 101, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "perf_event_open": 298,
        "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "bpf": 321, "userfaultfd": 323,
    },
    "aarch64": {
        "kill": 129, "unshare": 97, "socket": 198, "add_key": 217, "request_key": 218,
        "keyctl": 219, "syslog": 116, "shmget": 194, "msgget": 186, "memfd_create": 279,
        "ptrace": 117, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "perf_event_open": 241,
        "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "bpf": 280, "userfaultfd": 282,
    },
}  # fmt: skip
_ON_ALL_MACHINES = {
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,
    "pidfd_open": 434,
    "pidfd_getfd": 438,
    "memfd_secret": 447,
}
# System calls whose first argument is a process or thread: those that a process makes for itself are allowed. The C
# library uses them for `raise` and `setrlimit`.
_OF_A_PROCESS = {
    "x86_64": {"tkill": 200, "tgkill": 234, "prlimit64": 302},
    "aarch64": {"tkill": 130, "tgkill": 131, "prlimit64": 261},
}
_INIT = 1  # process id of bubblewrap in the sandbox; the program is the only other process
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_CLONE_THREAD = 0x10000
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def one_process_filter() -> bytes:
    """Return a seccomp filter that allows new threads but no new processes.

    RLIMIT_NPROC is not enough: the kernel does not apply it to root, and the memory limit is per process.

    Returns:
        A classic BPF program as `struct sock_filter[]`.

    Raises:
        UserError: The system calls of this machine are unknown.
    """
    machine = platform.machine()
    if machine not in _SYSTEM_CALLS:
        known = " and ".join(_SYSTEM_CALLS)
        raise UserError(f"The sandbox works on {known}, not {machine}: use such a machine, {OR_UNSAFELY}.")
    refused = [*_SYSTEM_CALLS[machine].values(), *_ON_ALL_MACHINES.values()]
    load, if_equal, if_at_least, if_any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, not_permitted, not_implemented = 0x7FFF0000, 0x80000000, 0x50001, 0x50026
    program = [(load, 0, 0, 4), (if_equal, 1, 0, _AUDIT_ARCH[machine]), (answer, 0, 0, kill)]  # call of another ABI
    program += [(load, 0, 0, 0), (if_at_least, 0, 1, 0x40000000), (answer, 0, 0, not_permitted)]  # x32's calls
    for number in refused:
        program += [(if_equal, 0, 1, number), (answer, 0, 0, not_permitted)]
    for name, number in _OF_A_PROCESS[machine].items():
        # prlimit64 of process 0 is the caller's own. Bubblewrap's init is the only one that signals could hurt.
        test = (if_equal, 1, 0, 0) if name == "prlimit64" else (if_equal, 0, 1, _INIT)
        program += [(if_equal, 0, 4, number), (load, 0, 0, 16), test, (answer, 0, 0, not_permitted)]
        program += [(answer, 0, 0, allow)]
    program += [
        (if_equal, 0, 1, _CLONE3),
        (answer, 0, 0, not_implemented),
    ]  # its flags are in memory, which a filter cannot read
    program += [(if_equal, 0, 3, _CLONE[machine]), (load, 0, 0, 16), (if_any_bit, 1, 0, _CLONE_THREAD)]
    program += [(answer, 0, 0, not_permitted), (answer, 0, 0, allow)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
