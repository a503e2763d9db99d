"""HumanEval: Python functions to complete (arXiv 2107.03374).

They are completed from signature and docstring, then tested.
"""

from __future__ import annotations

from tasks.base import DataRef, Exercise, Record, Task, Writing
from tasks.metrics import PASS


def parse_record(record: Record) -> Exercise:
    """Parse a record of the hub or of a folder."""
    tests = f"{record['test']}\ncheck({record['entry_point']})\n"
    return Exercise(
        "Complete this Python function.",
        record["canonical_solution"],
        (record["prompt"], tests),
        lead=f"\n{record['prompt']}",
    )


HUMANEVAL = Task(
    "humaneval",
    "HumanEval",
    parse_record,
    DataRef("humaneval", "openai/openai_humaneval"),
    {"test": "test"},
    # The stop strings are the publishers'. Their longest solution has 268 SmolLM2 tokens.
    Writing(PASS, max_new_tokens=320, stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint")),
)
