"""ROUGE-L F1 score of answers, each against the best of its references."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer

_DESCRIPTION = """
F1 score of the longest common subsequence of words (ROUGE-L), without stemming. Each answer is compared with all its
references, and the best score counts. Scores are from the package rouge-score. Its words are runs of the letters a to z
and digits. Letters of scripts other than Latin, which it ignores, are words here as well: a run of them, or each
character by itself in scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese).
"""
_INPUTS = """
Args:
    predictions: The answers.
    references: Per answer a reference, or a list of references, at least one.

Returns:
    rouge_l: Mean of the scores, from 0 to 1.
    outcomes: Per answer its score.

Examples:
    >>> metric = evaluate.load("bench/evaluate/metrics/rouge_l")
    >>> metric.compute(predictions=["the cat sat"], references=[["a dog", "The cat sat."]])
    {'rouge_l': 1.0, 'outcomes': [1.0]}
"""
_CITATION = """
@inproceedings{lin2004rouge,
  title = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
  author = {Lin, Chin-Yew},
  booktitle = {Text Summarization Branches Out},
  pages = {74--81},
  year = {2004}
}
"""

# Scripts without spaces between words: Thai to Lao, Burmese, Khmer, Japanese, Chinese.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# Points of Hebrew and Arabic, and vowel signs of Indic scripts, which Python's \w leaves out.
_MARKS = "\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0903\u093a-\u094f\u0980-\u0dff"
# Latin letters with diacritics, superscripts and subscripts separate words, as in rouge-score. So its scores of Latin
# texts stay what they are.
_LATIN = "\u00aa-\u02ff\u1d00-\u1eff\u2070-\u209c"
_WORD = re.compile(rf"[a-z0-9]+|[{_UNSPACED}]|(?:(?![{_UNSPACED}{_LATIN}a-z0-9_])[\w{_MARKS}])+")


class Words:
    """The tokenizer: rouge-score's words, and words of other scripts."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text, in lower case."""
        return _WORD.findall(text.lower())


def grade(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return the F1 score of each answer against the best of its references.

    Raises:
        ValueError: An answer has no reference.
    """
    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    scores = []
    for number, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
        if not texts:
            raise ValueError(f"answer {number} has no reference to compare it with")
        scores.append(float(scorer.score_multi(texts, prediction)["rougeL"].fmeasure))
    return scores


class RougeL(evaluate.Metric):  # type: ignore[misc, unused-ignore]  # evaluate has no types
    """The metric for `evaluate.load`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        several = datasets.Features({"predictions": text, "references": datasets.Sequence(text)})
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[several, datasets.Features({"predictions": text, "references": text})],
        )

    def _compute(self, predictions: list[str], references: list[str] | list[list[str]]) -> dict[str, Any]:
        outcomes = grade(predictions, [[texts] if isinstance(texts, str) else texts for texts in references])
        return {"rouge_l": sum(outcomes) / len(outcomes), "outcomes": outcomes}
