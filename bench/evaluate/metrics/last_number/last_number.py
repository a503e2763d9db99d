"""Share of answers whose last number is the correct one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """
Share of the answers whose last number equals the last number of the reference, as GSM8K is scored. The numbers are
compared by value: "1,000", "1000.0" and "1 000" are equal.
"""
_INPUTS = """
Args:
    predictions: The answers.
    references: Per answer a text that ends with the correct number, such as "18" or "#### 1,800".

Returns:
    last_number: Share of the answers that are correct, from 0 to 1.
    outcomes: Per answer 1 if it is correct, else 0.

Examples:
    >>> metric = evaluate.load("bench/evaluate/metrics/last_number")
    >>> metric.compute(predictions=["It costs $1,000.00."], references=["#### 1000"])
    {'last_number': 1.0, 'outcomes': [1]}
"""
_CITATION = """
@article{cobbe2021training,
  title = {Training Verifiers to Solve Math Word Problems},
  author = {Cobbe, Karl and Kosaraju, Vineet and Bavarian, Mohammad and Chen, Mark and Jun, Heewoo and Kaiser, Lukasz
            and Plappert, Matthias and Tworek, Jerry and Hilton, Jacob and Nakano, Reiichiro and Hesse, Christopher and
            Schulman, John},
  journal = {arXiv preprint arXiv:2110.14168},
  year = {2021}
}
"""

# Hyphens and dashes that are written as a minus: U+2010, U+2011, U+2013, U+2212, U+FE63, U+FF0D. U+2014 is none.
_MINUS = str.maketrans(dict.fromkeys("\u2010\u2011\u2013\u2212\ufe63\uff0d", "-"))
_CURRENCY = "$€£¥₹"
# Digits in groups, or without. Commas (of thousands, or Indian), apostrophes or spaces separate groups: no-break,
# figure, thin and narrow. With plain spaces, "9 100 101" may be a number or three. It is a number unless another number
# stands before it, or a word goes on after it, as in "12 200-page books".
_GROUPED = (
    r"\d{1,3}(?:,\d{3})+(?!\d)",
    r"\d{1,2}(?:,\d{2})+,\d{3}(?!\d)",
    r"[1-9]\d{0,2}(?:['’]\d{3})+(?!\d)",
    r"[1-9]\d{0,2}(?P<gap>[\u00a0\u2007\u2009\u202f])\d{3}(?:(?P=gap)\d{3})*(?!\d)",
    r"(?<!\d )[1-9]\d{0,2}(?: \d{3})+(?!\w|-\w)",
)
_WHOLE = rf"(?:{'|'.join(_GROUPED)}|\d+)"
_FRACTION = r"(?P<whole>\d+ )?(?P<above>\d+)/(?P<below>0*[1-9]\d*)(?![\d/]|\.\d)"
_DECIMAL = rf"(?P<number>{_WHOLE}(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE](?P<exponent>[+-]?\d{{1,3}})(?!\w))?"
# A minus after a digit, a letter or a bracket is a dash, a hyphen or a subtraction.
_SIGN = rf"(?:(?<![\w)\]}}.])(?P<minus>-)[{_CURRENCY}]?)?"
_NUMBER = re.compile(rf"{_SIGN}(?:(?<![\d/.,]){_FRACTION}|{_DECIMAL})")


def last_number(text: str) -> Fraction | None:
    """Return the value of the last number in a text, or None if it has none.

    Understood are signs, groups of digits, decimals, powers of ten ("1.5e3"), fractions ("3/4", "1 1/2", "½") and
    LaTeX's spellings of these.
    """
    found = list(_NUMBER.finditer(_plain(text)))
    return _value(found[-1]) if found else None


def _plain(text: str) -> str:
    """Return the text with one spelling of signs, fractions and separators."""
    text = text.translate(_MINUS).replace("{,}", ",").replace("\\,", "\u2009").replace("\\!", "").replace("\\$", "$")
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    return re.sub(
        r"(\d?)([¼-¾⅐-⅞])",
        lambda match: f"{match[1]} {unicodedata.normalize('NFKC', match[2])}".replace("\u2044", "/").lstrip(),
        text,
    )


def _value(match: re.Match[str]) -> Fraction:
    if match["above"]:
        value = _exact(match["above"]) / _exact(match["below"])
        if match["whole"] and value >= 1:  # "2 10/5" are two numbers
            return value
        value += _exact(match["whole"] or "0")
    else:
        value = _exact(re.sub(r"[^\d.]", "", match["number"])) * Fraction(10) ** int(match["exponent"] or 0)
    return -value if match["minus"] else value


def _exact(digits: str) -> Fraction:
    """Return the value of digits with at most one point; `int` would refuse more than 4,300 of them."""
    return Fraction(Decimal(digits.strip()))


def grade(predictions: Sequence[str], references: Sequence[str]) -> list[int]:
    """Return 1 for each answer whose last number is that of its reference, else 0.

    Raises:
        ValueError: A reference has no number, so that no answer could be correct.
    """
    outcomes = []
    for prediction, reference in zip(predictions, references, strict=True):
        correct = last_number(reference)
        if correct is None:
            raise ValueError(f"the reference has no number: {reference[:60]!r}")
        outcomes.append(int(last_number(prediction) == correct))
    return outcomes


class LastNumber(evaluate.Metric):  # type: ignore[misc, unused-ignore]  # evaluate has no types
    """The metric for `evaluate.load`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        outcomes = grade(predictions, references)
        return {"last_number": sum(outcomes) / len(outcomes), "outcomes": outcomes}
