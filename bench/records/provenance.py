"""The commit, sources, packages and machine of a record."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import time
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench.records.schema import Provenance

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("malora", "tasks", "bench")  # the code that a run's outcome depends on
MAX_COMMITS = 200  # searched for matching sources; each costs a `git show` per file
PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "lm-eval", "accelerate", "datasets")


@cache
def commit_of(sources: str, likely: str | None) -> str | None:
    """Return a commit whose sources have this hash, or None if this clone has none.

    Args:
        sources: Hash as of `source_hash`.
        likely: Commit to try first; then the latest ones are tried.
    """
    try:
        commits = _git("rev-list", f"--max-count={MAX_COMMITS}", "HEAD", "--", *SOURCES).splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return next((commit for commit in filter(None, [likely, *commits]) if source_hash_of(commit) == sources), None)


def provenance(device: torch.device, jobs: int) -> Provenance:
    """Describe the code, the packages and the machine of a run.

    `jobs` is the number of runs that share the machine.
    """
    commit, dirty = _git_state()
    return Provenance(
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        commit=commit,
        dirty=dirty,
        source_sha256=source_hash(),
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        device=device_name(device),
        cuda=torch.version.cuda if device.type == "cuda" else None,
        driver=_driver() if device.type == "cuda" else None,
        concurrent_runs=jobs,
    )


def device_name(device: torch.device) -> str:
    """Return the name of a GPU or of this machine's CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


@cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@cache
def _git_state() -> tuple[str | None, bool | None]:
    """Return the commit and whether the sources differ from it.

    The result is (None, None) without a git history.
    """
    try:
        commit = _git("rev-parse", "HEAD").strip()
        return commit, bool(_git("status", "--porcelain", "--", *SOURCES).strip())
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, encoding="utf-8").stdout


@cache
def source_hash() -> str:
    """Return the hex sha256 of the Python sources in the working tree.

    The hash is over names and contents.
    """
    paths = sorted(path for name in SOURCES for path in (ROOT / name).rglob("*.py"))
    return _hash_sources((path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths)


@cache
def source_hash_of(commit: str) -> str | None:
    """Return `source_hash` of a commit, or None if this clone does not have it."""
    try:
        names = _git("ls-tree", "-r", "--name-only", commit, "--", *SOURCES).splitlines()
        names = sorted((n for n in names if n.endswith(".py")), key=lambda name: ROOT / name)
        return _hash_sources((name, _git("show", f"{commit}:{name}")) for name in names)
    except (OSError, subprocess.CalledProcessError):
        return None


def _hash_sources(files: Iterable[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for name, text in files:
        digest.update(f"{name}\n{len(text)}\n{text}".encode())
    return digest.hexdigest()
