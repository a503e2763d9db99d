"""HumanEval: Python functions to complete (arXiv 2107.03374).

They are completed from signature and docstring, then tested.
"""

from __future__ import annotations

from tasks.base import DataRef, Exercise, Record, Task, Writing
from tasks.fields import require_filled, text
from tasks.metrics import PASS


def parse_record(record: Record) -> Exercise:
    """Parse a record of the hub or of a folder."""
    begin, name = text(record, "prompt"), text(record, "entry_point")
    if not name.isidentifier():
        raise ValueError(f"field 'entry_point' is {name[:60]!r}, not the name of a function")
    tests = f"{require_filled('the tests', text(record, 'test'))}\ncheck({name})\n"
    solution = text(record, "canonical_solution")
    return Exercise("Complete this Python function.", solution, (begin, tests), lead=f"\n{begin}")


HUMANEVAL = Task(
    "humaneval",
    "HumanEval",
    parse_record,
    DataRef("humaneval", "openai/openai_humaneval"),
    {"test": "test"},
    # The stop strings are the publishers'. Their longest solution has 268 SmolLM2 tokens.
    Writing(PASS, max_new_tokens=320, stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint")),
)
