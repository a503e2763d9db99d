"""GSM8K: grade-school word problems with worked solutions (arXiv 2110.14168).

They are scored by the last number written.
"""

from __future__ import annotations

import re

from tasks.base import DataRef, Exercise, Record, Task, Writing
from tasks.fields import text
from tasks.metrics import LAST_NUMBER


def parse_record(record: Record) -> Exercise:
    """Parse a record of the hub or of a folder.

    The calculator annotations (`<<1+1=2>>`) are removed. A solution ends with `####` and the number to find.
    """
    solution = re.sub(r"<<.*?>>", "", text(record, "answer"))
    _, mark, number = solution.rpartition("####")
    if not mark or not re.fullmatch(r"-?\d[\d,]*(\.\d+)?", number.strip(), re.ASCII):
        raise ValueError(f"field 'answer' does not end with '#### NUMBER': {solution[-60:]!r}")
    return Exercise(text(record, "question").strip(), solution, (number.strip(),))


GSM8K = Task(
    "gsm8k",
    "GSM8K",
    parse_record,
    DataRef("gsm8k", "openai/gsm8k", "main"),
    {"train": "train", "test": "test"},
    Writing(LAST_NUMBER, max_new_tokens=256),  # 99% of the training solutions have fewer than 220 SmolLM2 tokens
)
