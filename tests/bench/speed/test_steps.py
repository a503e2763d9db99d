"""Steps: a captured step computes the same as an eager one."""

from dataclasses import replace

import pytest
import torch

from bench.models.backbone import SHAPES, backbone
from bench.speed.steps import DecodeStep, TrainStep, Workload, ignore_phase
from bench.speed.subject import Subject
from bench.speed.variants import Variant
from malora.fused.availability import interprets_triton
from tests.malora.backbone.fake_graphs import graphs  # noqa: F401  # a fixture

CPU = torch.device("cpu")
TOY = SHAPES["toy"]
needs_interpreter = pytest.mark.skipif(not interprets_triton(), reason="a GPU's Triton does not run on a CPU")


def test_decoding_over_a_static_cache_makes_the_tokens_of_generate():
    work = Workload("decode", batch=2, length=5, tokens=6, dropout=0.0, vocab_size=512)
    eager = Variant("malora-dense", "malora", "dense")
    subject = Subject(eager, backbone(TOY, None, CPU), "decode", 0.0)
    expected = DecodeStep(subject, work, 2)(ignore_phase)
    subject.variant = replace(eager, run="static")  # as a captured row decodes, without the graph
    step = DecodeStep(subject, work, 2)
    for _ in range(2):  # a second generation starts anew
        assert torch.equal(step(ignore_phase), expected) and expected.shape == (2, 6)


@pytest.mark.parametrize(
    "tokens, backend", [(8, "dense"), (24, "dense"), pytest.param(24, "fused", marks=needs_interpreter)]
)
def test_a_captured_step_trains_on_all_micro_batches(tokens, backend, graphs):  # noqa: F811
    work = Workload("train", batch=2, length=4, tokens=tokens, dropout=0.0, vocab_size=512)
    eager = Variant("malora", "malora", backend)
    trained = []
    for run in ("eager", "captured"):
        subject = Subject(eager, backbone(TOY, 1, CPU), "train", 0.0)
        subject.variant = replace(eager, run=run)
        step = TrainStep(subject, work, 2)
        for _ in range(2):
            step(ignore_phase)
        trained.append([p.detach() for p in step.parameters])
    assert step.captured.replayed and graphs.captures == 1
    for plain, replayed in zip(*trained, strict=True):
        torch.testing.assert_close(plain, replayed)
