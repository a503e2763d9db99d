"""Held-out loss and balanced accuracy in a table."""

import numpy as np
import pytest
from scipy.stats import t as student

from bench.experiments.profiles import TUNING_SEED
from bench.experiments.registry import EXPERIMENTS
from bench.records.schema import GoldAnswers, TaskScore
from bench.report.scores.experiment_page import experiment_page
from bench.report.scores.selection import LearningRates, records_frame, select
from tests.bench.records.test_store import make, score

TABLE2 = EXPERIMENTS["table2"]
CLASSES = {"lexicon": [0] * 30 + [1] * 10, "majority": [0] * 20 + [1] * 20}  # the first are uneven
TOKENS = {"lexicon": [1] * 40, "majority": [1, 3] * 20}


def run(seed, method, shift, **options):
    one = make(seed, method=method, **options)
    rng = np.random.default_rng(seed)
    gold = {
        task: GoldAnswers(
            nats=[round(float(x) + shift, 4) for x in rng.uniform(1, 2, 40)],
            label_tokens=TOKENS[task],
            classes=CLASSES[task],
        )
        for task in CLASSES
    }
    test = {task: TaskScore(**score(one.items[task]), **gold[task].summary(one.items[task])) for task in gold}
    return one.replace(test=test, gold=gold)


RUNS = [run(s, m, 0.01 * s + d, right=r) for s in (0, 1, 2) for m, d, r in (("lora", 0, 0.9), ("malora", 0.1, 0.75))]


def page(runs):
    rates = LearningRates({"lora": 2e-3, "malora": 2e-3}, TABLE2)
    return " ".join(experiment_page(select(TABLE2, "tiny", records_frame(runs), rates=rates)).split())


def test_balanced_accuracy_replaces_accuracy_where_classes_are_uneven():
    # Of 40 items MALoRA answers the first 30 correctly, which are one of two classes: (100 + 0) / 2, and 75 plain.
    text = page(RUNS)
    assert "| MALoRA | 0.002 | 1,234 | 50.0 (75.0) | 75.0 | 62.5 ± 0.0 |" in text
    assert "Scores are accuracy, balanced accuracy of lexicon in percent" in text
    without = page([one.replace(gold=None) for one in RUNS])
    assert "| MALoRA | 0.002 | 1,234 | 75.0 | 75.0 | 75.0 ± 0.0 |" in without and "balanced" not in without


def test_the_loss_is_per_label_token_and_its_difference_is_paired():
    def loss(one):
        return np.mean([sum(g.nats) / sum(g.label_tokens) for g in one.gold.values()])

    means = {
        method: np.mean([loss(one) for one in RUNS if one.config.method == method]) for method in ("lora", "malora")
    }
    # Every item loses 0.1 nats: 0.1 per token of the first task, 0.05 of the second, whose items have two on average.
    text = page(RUNS)
    assert means["malora"] - means["lora"] == pytest.approx(0.075, abs=1e-4)
    assert f"| {means['malora']:.3f}, +0.075 [+0.07" in text and f"| {means['lora']:.3f} |" in text
    assert "held-out loss" in text and "are one family in Holm's correction" in text


def test_a_task_at_floor_stays_in_the_table_and_leaves_the_means():
    alone = run(TUNING_SEED, "lora", 0, rate=6e-4)
    score_of = alone.test["majority"].replace(value=0.5, guess=0.5, stderr=0.08)
    alone = alone.replace(
        config=alone.config.replace(mixture="procedural/majority"),
        validation={"majority": score_of},
        test={"majority": alone.test["majority"]},
    )
    text = page([*RUNS, alone])
    assert "| MALoRA | 0.002 | 1,234 | 50.0 (75.0) | *75.0*, at floor | 50.0 ± 0.0 |" in text
    assert "+0.100 [+0.1" in text and "counts neither in the means nor in the comparisons" in text


def test_losses_and_scores_are_one_family_of_tests():
    rng = np.random.default_rng(7)
    noisy = [
        run(s, m, float(rng.normal(d, 0.1)), right=r + 0.025 * int(rng.integers(-2, 3)))
        for s in range(4)
        for m, d, r in (("lora", 0.0, 0.8), ("malora", 0.2, 0.8))
    ]
    text = page(noisy)
    losses = {m: np.array([[sum(one.gold[t].nats) / sum(TOKENS[t]) for t in CLASSES] for one in noisy
                           if one.config.method == m]).mean(1) for m in ("lora", "malora")}  # fmt: skip
    d = losses["malora"] - losses["lora"]
    p = 2 * student.sf(abs(d.mean()) / (d.std(ddof=1) / 2), 3)
    shown = float(text.split("p=")[1].split()[0])
    assert shown == pytest.approx(min(1, 2 * p), rel=0.5) and shown > 1.2 * p  # corrected for two tests
