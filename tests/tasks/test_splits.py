"""The split of a data set in one file: by the item, not by its place."""

import hashlib
import random

import pytest

from tasks.base import Exercise, Question
from tasks.splits import SplitRule

KEYS = [f"question {i}" for i in range(5000)]


def test_shares_are_those_of_the_rule():
    counts = {split: 0 for split in ("train", "validation", "test")}
    for key in KEYS:
        counts[SplitRule(validation=0.1, test=0.3).split_of(key)] += 1
    assert sum(counts.values()) == 5000
    for split, share in {"train": 0.6, "validation": 0.1, "test": 0.3}.items():
        assert abs(counts[split] / 5000 - share) < 5 * (share * (1 - share) / 5000) ** 0.5


def test_a_split_follows_from_the_seed_and_the_item():
    rule = SplitRule(seed=3)
    by_hand = int.from_bytes(hashlib.sha256(b"3/question 7").digest()[:8]) / 2**64
    assert rule.split_of("question 7") == ("test" if by_hand < 0.2 else "validation" if by_hand < 0.3 else "train")
    first, other = ([SplitRule(seed=seed).split_of(key) for key in KEYS] for seed in (3, 4))
    assert first == [rule.split_of(key) for key in KEYS] != other


@pytest.mark.parametrize("shares", [(0.0, 0.2), (0.1, 0), (0.5, 0.5), (-0.1, 0.2), (float("nan"), 0.2)])
def test_every_split_needs_a_share(shares):
    with pytest.raises(ValueError, match="must be above 0"):
        SplitRule(*shares)


def test_items_with_the_same_words_have_the_same_key_in_every_script():
    def key(text):
        return Question(text, ("a", "b"), 0).key

    assert key("Is ice COLD?") == key("is ice -- cold") == "is ice cold"
    assert key("Le CAFÉ noir?") == key("le cafe\u0301 noir") != key("le cafe noir")
    different = [
        "水是冷的吗？",
        "火是热的吗？",
        "पानी ठंडा है?",
        "पानी ठंडी है?",
        "गुण",
        "गण",
        "กิน",
        "กุน",
        "วันนี้",
        "วันนา",
        "+ - =",
        "☀",
        "🎈",
    ]
    assert len({key(text) for text in different}) == len(different)
    assert Exercise("?!", "x").key == "?!"
    random.Random(0).shuffle(different)
    assert all(key(text) for text in different)
