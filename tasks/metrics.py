"""Names of the metrics that score answers, as they appear in records.

The references of an `Exercise` depend on the metric of its task:

metric       score                                              references
PASS         share of programs that pass their tests            start of the program, tests
LAST_NUMBER  share of answers whose last number is correct      the correct number
ROUGE_L      ROUGE-L F score against the best reference         reference texts
LIKELIHOOD   geometric mean probability of the label's tokens   none

A task with choices has no metric of its own: accuracy follows from the prompt format.
"""

from __future__ import annotations

PASS = "pass@1"
LAST_NUMBER = "exact_match"
ROUGE_L = "rougeL"
LIKELIHOOD = "likelihood"
