"""The few shapes that the micro-batches of a run are padded to."""

import itertools
import random

import pytest

from bench.experiments.profiles import PROFILES
from bench.train.batching import Encoded, collate, shapes_of, shuffled_batches
from bench.train.fixed_shapes import MAX_SINGLE_ROW, MAX_WIDTHS, MIN_TOKENS_OF_A_PASS, choose_widths


def examples(count, longest, seed=0, label=lambda rng: 1):
    """Examples of random lengths, most of them short."""
    rng = random.Random(seed)
    return [Encoded([1] * min(longest, 20 + int(rng.expovariate(1 / 90))), label(rng)) for _ in range(count)]


@pytest.mark.parametrize("mixture", ["intra", "inter-open"])
def test_few_shapes_occur_in_a_run_of_the_paper_profile(mixture):
    """Written answers have labels of many lengths, and 1,001 examples leave a smaller batch at the end of an epoch."""
    profile = PROFILES["paper"].on(mixture)
    written = mixture != "intra"
    encoded = examples(1001, profile.max_length, label=lambda rng: rng.randint(1, 15) if written else 1)
    batches = shuffled_batches(len(encoded), batch_size=profile.batch_size, epochs=profile.epochs, seed=0)
    fixed = shapes_of(encoded, batches)
    shapes, tokens, padded = set(), 0, 0
    for chosen in batches:
        (batch,) = collate([encoded[i] for i in chosen], 0, fixed_shapes=fixed)
        shapes.add((*batch.ids.shape, len(batch.target)))
        assert batch.mask.sum() == sum(len(encoded[i].ids) - 1 for i in chosen)
        tokens, padded = tokens + int(batch.mask.sum()), padded + batch.ids.numel()
    assert 1 < len(shapes) <= MAX_WIDTHS and tokens > 0.8 * padded


def test_the_lengths_are_those_with_the_least_padding():
    rng = random.Random(1)
    totals = [rng.choice((40, 90, 170, 200, 310, 500, 700)) + rng.randint(-20, 20) for _ in range(60)]

    def tokens(widths):
        return sum(max(MIN_TOKENS_OF_A_PASS, min(w for w in widths if w >= total)) for total in totals)

    longest = -(-max(totals) // 64) * 64
    shorter = range(64, longest, 64)
    best = min(tokens((*chosen, longest)) for chosen in itertools.combinations(shorter, 3))
    widths = choose_widths(totals, max_widths=4)
    assert list(widths) == sorted(widths) and len(widths) <= 4 and tokens(widths) == best
    assert choose_widths([70, 70, 60]) == (128,)  # a pass over 64 tokens would be no faster


def test_large_batches_are_packed_into_several_sequences():
    encoded = examples(64, 1024)
    fixed = shapes_of(encoded, [list(range(64))])
    assert sum(len(code.ids) for code in encoded) > MAX_SINGLE_ROW and fixed.widths == () and fixed.labels == 64
