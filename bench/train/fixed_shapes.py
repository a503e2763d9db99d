"""Choose few shapes for the micro-batches of a run, so that few CUDA graphs are captured.

A graph is captured for a shape, and kernels are compiled for it, which takes seconds with a large model. A batch of two
short examples can have any length, and padding all of them to the longest would multiply the work. So the lengths of a
run's own batches decide: of all choices of `MAX_WIDTHS` lengths, these are the ones with the least padding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# Lengths are multiples of this many tokens.
PAD_TO_MULTIPLE = 64
# `malora.capture_step` captures ten shapes. Two are left for what nobody foresees. Ten instead of eight would save one
# to three percent of the tokens in the paper's mixtures, and cost two more compilations.
MAX_WIDTHS = 8
# Batches of at most this many tokens become one sequence each. Attention masks of longer ones would take more than
# 32 MiB each.
MAX_SINGLE_ROW = 4096
# A pass over fewer tokens takes a GPU as long as over these, because it reads the same frozen weights.
MIN_TOKENS_OF_A_PASS = 128


@dataclass(frozen=True)
class FixedShapes:
    """The shapes of a run's micro-batches.

    Attributes:
        widths: Lengths in tokens, ascending. A batch becomes one sequence of the shortest length that holds it.
            If there are none, batches are packed into several sequences of equal length.
        labels: Label tokens of a micro-batch after padding. None: as many as it has input tokens.
    """

    widths: tuple[int, ...] = ()
    labels: int | None = None

    def width(self, tokens: int) -> int:
        """Return the length of a batch's single sequence."""
        return next(width for width in self.widths if width >= tokens)


def choose_shapes(
    lengths: Sequence[int], label_lengths: Sequence[int], batches: Sequence[Sequence[int]]
) -> FixedShapes:
    """Choose the shapes for the batches of a run.

    Args:
        lengths: Input tokens of each training example.
        label_lengths: Label tokens of each.
        batches: All batches of the run, as indices of the examples.
    """
    labels = max(map(len, batches)) if max(label_lengths) == 1 else None
    totals = [sum(lengths[i] for i in batch) for batch in batches]
    return FixedShapes(choose_widths(totals) if max(totals) <= MAX_SINGLE_ROW else (), labels)


def choose_widths(totals: Sequence[int], max_widths: int = MAX_WIDTHS) -> tuple[int, ...]:
    """Return the lengths, ascending multiples of `PAD_TO_MULTIPLE`, with which batches have the least padding.

    Found by dynamic programming: the best k lengths up to some length are the best k - 1 up to a shorter one, and it.

    Args:
        totals: Input tokens of each batch.
        max_widths: Maximum number of lengths.
    """
    batches_of = Counter(max(1, math.ceil(total / PAD_TO_MULTIPLE)) * PAD_TO_MULTIPLE for total in totals)
    candidates = sorted(batches_of)
    # By number of lengths: for each candidate, the least tokens of all batches up to it, and the lengths.
    nothing: tuple[int, ...] = ()
    best = [(0.0, nothing)] + [(math.inf, nothing)] * len(candidates)
    for _ in range(min(max_widths, len(candidates))):
        longer = [best[0]]
        for last, width in enumerate(candidates, 1):
            choices = [best[last]]  # with fewer lengths
            count = 0
            for first in range(last - 1, -1, -1):
                count += batches_of[candidates[first]]
                tokens, widths = best[first]
                choices.append((tokens + count * max(width, MIN_TOKENS_OF_A_PASS), (*widths, width)))
            longer.append(min(choices, key=lambda choice: (choice[0], len(choice[1]))))
        best = longer
    return best[-1][1]
