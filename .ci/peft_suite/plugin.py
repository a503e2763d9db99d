"""pytest plugin that runs PEFT's tests with our configs in place of its own.

A test of PEFT takes its config from a table of its module, as an argument. The plugin puts our rows into these tables.
It keeps the tests that use a table, and those that `selection.toml` names, and drops all others. They are about
another method of PEFT.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import our_configs
import pytest
import torch
from peft import LoraConfig

import malora  # also registers the tuner

HERE = Path(__file__).parent
SELECTION = tomllib.loads((HERE / "selection.toml").read_text(encoding="utf-8"))
TABLES = our_configs.tables(is_all=os.environ.get("PEFT_SUITE_ALL") == "1")


class _Everything:
    """Container that has every item: PEFT's tests believe each model to be cached, and stay offline."""

    def __contains__(self, item: object) -> bool:
        return True

    def __getitem__(self, item: object) -> int:
        return 1

    def __setitem__(self, item: object, value: int) -> None: ...

    def get(self, item: object) -> int:
        """Return how often a model was used."""
        return 1


def pytest_configure(config: pytest.Config) -> None:
    """Stand in for packages that only tests of other methods use."""
    torch.set_num_threads(1)
    for name, attributes in SELECTION["absent_packages"].items():
        if name not in sys.modules:
            module = ModuleType(name)
            for attribute in attributes:
                setattr(module, attribute, type(attribute, (), {"expand": staticmethod(lambda *_, **__: _drop)}))
            sys.modules[name] = module


def _drop(function: object) -> None:
    """Decorate a test that is not collected."""


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Import a test module of PEFT and put our configs into it."""
    if module_path.stem not in TABLES:
        return None  # pytest makes a module of every file in a package
    collector: pytest.Module = pytest.Module.from_parent(parent, path=module_path)
    module = collector.obj
    utilities = importlib.import_module(f"{module.__package__}.testing_utils")
    utilities._HUB_MODEL_ACCESSES = _Everything()  # type: ignore[attr-defined]
    take_ours_for_lora(importlib.import_module(f"{module.__package__}.testing_common"), "testing_common")
    take_ours_for_lora(module, module_path.stem)
    put_configs(module, module_path.stem)
    return collector


def put_configs(module: ModuleType, name: str) -> None:
    """Replace the tables of a module, and mark the tests that have our configs."""
    ours = {id(getattr(module, table)): rows for table, rows in TABLES[name].items()}
    arguments: dict[str, str] = SELECTION["arguments"].get(name, {})
    makes_its_own: list[str] = SELECTION["makes_its_own"].get(name, [])
    for function in _tests(module):
        if function.__name__ in SELECTION["cannot_run"]:
            continue
        for i, mark in enumerate(getattr(function, "pytestmark", [])):
            if mark.name != "parametrize":
                continue
            names, rows = mark.args[:2]
            if id(rows) in ours:
                rows = ours[id(rows)]
            elif function.__name__ in SELECTION["in_rows"].get(name, []):
                rows = _rows_with_ours(rows)
            elif arguments.get(function.__name__) == names:
                rows = our_configs.CONFIGS if names == "config" else our_configs.CLASSES
            else:
                continue
            function.pytestmark[i] = pytest.mark.parametrize(names, rows).mark  # type: ignore[attr-defined]
            function.has_our_configs = True  # type: ignore[attr-defined]
        if function.__name__ in makes_its_own:
            function.has_our_configs = True  # type: ignore[attr-defined]
    if makes_its_own:
        module.LoraConfig = our_configs.LoraLike  # type: ignore[attr-defined]


def take_ours_for_lora(module: ModuleType, name: str) -> None:
    """Let functions that skip all configs but LoRA's run with ours."""
    for holder in (value for value in vars(module).values() if isinstance(value, type)):
        for function_name in SELECTION["for_lora"].get(name, []):
            function = vars(holder).get(function_name)
            if function is not None:
                names = {**vars(module), "LoraConfig": malora.MaloraConfig}
                changed = FunctionType(function.__code__, names, function_name)
                changed.__dict__.update(function.__dict__)  # with its marks
                setattr(holder, function_name, changed)


def _rows_with_ours(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return the rows that have a LoraConfig, with ours in its place. pytest may ask twice."""
    kept = [row for row in rows if any(isinstance(value, LoraConfig | malora.MaloraConfig) for value in row)]
    return [
        tuple(our_configs.like_lora(value) if isinstance(value, LoraConfig) else value for value in row) for row in kept
    ]


def _tests(module: ModuleType) -> Iterator[FunctionType]:
    classes = [
        value for value in vars(module).values() if isinstance(value, type) and value.__name__.startswith("Test")
    ]
    for holder in (module, *classes):
        for value in list(vars(holder).values()):
            if isinstance(value, FunctionType) and value.__name__.startswith("test"):
                yield value


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop tests without our configs."""
    kept = [item for item in items if getattr(item.function, "has_our_configs", False)]  # type: ignore[attr-defined]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


class Outcomes:
    """Collects the outcome and the error of each test, and writes them as JSON."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the worst outcome of a test's phases."""
        name = report.nodeid.removeprefix("peft_tests/")
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.tests[name] = {"outcome": "failed", "error": crash.message if crash else str(report.longrepr)}
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.tests.setdefault(name, {"outcome": "skipped", "error": reason})
        elif report.when == "call":
            self.tests[name] = {"outcome": "passed", "error": ""}

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        self.file.write_text(json.dumps(self.tests, indent=1), encoding="utf-8")


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Collect outcomes where they come together: not in a worker of pytest-xdist."""
    if not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(Outcomes(Path(os.environ["PEFT_SUITE_OUTCOMES"])))
