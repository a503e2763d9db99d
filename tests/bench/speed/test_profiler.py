"""Counts of operations, written out by hand."""

from dataclasses import replace

import torch

from bench.models.backbone import SHAPES, backbone
from bench.speed.profiler import backbone_flops
from bench.speed.steps import Workload


def test_the_backbone_s_operations():
    """Count the operations of one layer of the toy.

    It has q, k, v, o of 128 × 128, three MLP matrices of 128 × 256, and a head of 128 × 512.
    """
    base = backbone(SHAPES["toy"], 1, torch.device("cpu"))
    linear, attention = 2 * (4 * 128 * 128 + 3 * 128 * 256 + 128 * 512), 2 * 64 * 128
    work = Workload("train", batch=4, length=64, tokens=256, dropout=0.0, vocab_size=512)
    assert backbone_flops(base, work) == 256 * (2 * linear + 3 * attention)
    assert backbone_flops(base, replace(work, mode="prefill")) == 256 * (linear + attention)
    assert backbone_flops(base, replace(work, mode="decode")) is None
