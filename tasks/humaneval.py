"""HumanEval: Python functions to be completed from signature and docstring, then tested (arXiv 2107.03374)."""

from __future__ import annotations

from tasks.base import PASS, DataRef, Exercise, Task, Writing


def question(record: dict) -> Exercise:
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
    question,
    DataRef("humaneval", "openai/openai_humaneval"),
    {"test": "test"},
    # The publishers' stop strings, and their longest solution has 268 SmolLM2 tokens.
    Writing(PASS, max_new_tokens=320, stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint")),
)
