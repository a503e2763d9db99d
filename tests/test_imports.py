"""Imports run one way: tests -> bench -> {malora, tasks}; malora and tasks know neither each other nor bench."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {"malora": {"malora"}, "tasks": {"tasks"}, "bench": {"bench", "malora", "tasks"}}


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_it_may(package):
    ours = {"malora", "tasks", "bench", "tests"}
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            imported = {name.partition(".")[0] for name in names} & ours
            assert imported <= ALLOWED[package], f"{path.relative_to(ROOT)} imports {imported}"
