"""Keep a model's answers while it is scored, so that a killed run goes on where it was.

The journal of a run is a file with one line per batch of the model, in the order of the batches:

    HASH [KEY, SECONDS, ANSWERS]

- `KEY` is the hash of the batch's inputs, so an answer is used for exactly these inputs only.
- `HASH` is that of the run's identity and the rest of the line. So a line does not verify if it is damaged, was cut
  short by a kill, or belongs to other weights, settings or code. Such a line is ignored, and its batch is run again.

lm-eval has a cache of its own (`use_cache`), which asks the model for the missing requests only. These would be in
other batches than before. Their padding differs, so scores could differ by rounding. A journal keeps whole batches, so
the other batches are those of a scoring without interruption.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HASH_LENGTH = 64  # characters of a hex SHA-256

Recall = Callable[[Any, Callable[[], Any]], Any]  # see `AnswerJournal.recall`


def compute_always(inputs: Any, compute: Callable[[], Any]) -> Any:
    """Compute an answer, in place of `AnswerJournal.recall`."""
    return compute()


class AnswerJournal:
    """The answers that a run has so far, in a file.

    Args:
        path: The file. It is created with the first answer.
        identity: Name of everything besides a batch's inputs that its answers depend on.

    Attributes:
        recalled_seconds: Seconds that the answers took which were recalled and not computed again.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity
        self.recalled_seconds = 0.0
        self._known: dict[str, tuple[float, Any]] = {}
        self._ends_in_a_line = True
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return
        self._ends_in_a_line = content.endswith(b"\n") or not content
        for line in content.split(b"\n"):
            if line[:HASH_LENGTH] == self._hash(line[HASH_LENGTH + 1 :]):
                key, seconds, answers = json.loads(line[HASH_LENGTH + 1 :])
                self._known[key] = seconds, answers
        if not self._known:  # of other weights, settings or code, and so of no use
            path.unlink(missing_ok=True)
            self._ends_in_a_line = True

    def recall(self, inputs: Any, compute: Callable[[], Any]) -> Any:
        """Return the answers to a batch: those in the journal, or new ones, which are added to it.

        Args:
            inputs: All that tells the batch from others of the run, as JSON values.
            compute: Returns the answers, as JSON values. Tuples in them are recalled as lists.
        """
        key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
        if key in self._known:
            seconds, answers = self._known[key]
            self.recalled_seconds += seconds
            return answers
        start = time.perf_counter()
        answers = compute()
        self._append(json.dumps([key, time.perf_counter() - start, answers]).encode())
        return answers

    def _append(self, content: bytes) -> None:
        """Add a line.

        The disk need not have it at once: if the machine stops, what is lost or cut short is computed again.
        """
        line = self._hash(content) + b" " + content + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(line if self._ends_in_a_line else b"\n" + line)
        self._ends_in_a_line = True

    def _hash(self, content: bytes) -> bytes:
        return hashlib.sha256(f"{self.identity}\n".encode() + content).hexdigest().encode()
