"""Sweeps change one option and keep the paper's proportions."""

import torch
from torch import nn

from bench.speed.layer_sweep import SWEEPS, sweep_rows
from bench.speed.steps import Workload

WORK = Workload("train", batch=1, length=4, tokens=16, dropout=0.1, vocab_size=8)


def rows(sweep, method="malora"):
    return [row for row in sweep_rows(sweep, [method], nn.Linear(64, 96), WORK) if row.variant.backend == "dense"]


def test_a_sweep_changes_its_own_option_only():
    options = [row.options for row in rows("rank")]
    assert [one["r"] for one in options] == list(SWEEPS["rank"])
    assert {(one["num_experts"], one["top_k"], one["lora_dropout"]) for one in options} == {(8, 2, 0.1)}
    assert [one["lora_alpha"] / one["r"] for one in options] == [2] * len(options)
    assert [one["d"] for one in options] == [11, 21, 43, 64, 64]  # the paper's 32 / 12 of the rank, up to the width
    assert "d" not in rows("rank", "molora")[0].options


def test_a_sweep_of_tokens_changes_the_work():
    assert [row.work.tokens for row in rows("tokens")] == list(SWEEPS["tokens"])
    assert {row.work.tokens for row in rows("experts")} == {WORK.tokens}


def test_a_layer_keeps_its_weights_between_sessions():
    torch.manual_seed(0)
    row, phases, layers = rows("top-k")[0], [], []
    for _ in range(2):
        with row.session() as step:
            step(phases.append)
            layers.append(row.layer)
    assert phases == ["forward", "backward"] * 2 and layers[0] is layers[1] and row.about["trainable"] > 0
