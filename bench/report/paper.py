"""The paper's own figures, of `paper.json`."""

import json
from functools import cache
from pathlib import Path


@cache
def paper() -> dict:
    return json.loads((Path(__file__).parent / "paper.json").read_text())
