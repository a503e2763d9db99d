"""Mean over the classes of the share of a class that is found."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from sklearn.metrics import balanced_accuracy_score

_DESCRIPTION = """
Mean over the classes of the recall of a class. All classes weigh the same, however many items they have: answering
always with the most frequent of K classes gives 1 / K. The score is scikit-learn's `balanced_accuracy_score`. Classes
without an item among the references do not count.
"""
_INPUTS = """
Args:
    predictions: The predicted classes, as integers.
    references: The correct classes, as integers.
    adjusted: True rescales the score, so that guessing gives 0. Default False.

Returns:
    balanced_accuracy: The score, from 0 to 1.

Examples:
    >>> metric = evaluate.load("bench/evaluate/metrics/balanced_accuracy")
    >>> metric.compute(predictions=[0, 0, 0, 0], references=[0, 0, 0, 1])
    {'balanced_accuracy': 0.5}
"""
_CITATION = """
@inproceedings{brodersen2010balanced,
  title = {The balanced accuracy and its posterior distribution},
  author = {Brodersen, Kay Henning and Ong, Cheng Soon and Stephan, Klaas Enno and Buhmann, Joachim M.},
  booktitle = {International Conference on Pattern Recognition},
  pages = {3121--3124},
  year = {2010}
}
"""


class BalancedAccuracy(evaluate.Metric):  # type: ignore[misc, unused-ignore]  # evaluate has no types
    """The metric for `evaluate.load`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int], adjusted: bool = False) -> dict[str, Any]:
        score = balanced_accuracy_score(references, predictions, adjusted=adjusted)
        return {"balanced_accuracy": float(score)}
