"""Models of variants: they share the frozen weights.

Liger's patches are active only while one is loaded.
"""

from dataclasses import replace

import pytest
import torch

from bench.models.backbone import SHAPES, backbone
from bench.speed import subject as bench_subject
from bench.speed.baselines import registered_baselines
from bench.speed.subject import Subject
from bench.speed.variants import Variant, variants
from tests.bench.conftest import stand_in_for_liger

CPU = torch.device("cpu")
TOY = SHAPES["toy"]


def test_ligers_functions_are_there_only_while_its_row_runs(monkeypatch):
    from transformers.models.llama import modeling_llama

    original, fused = modeling_llama.rotate_half, object()

    def apply(model, **_):
        modeling_llama.rotate_half = fused
        modeling_llama.__builtins_dict___0 = {}  # torch.compile leaves such names

    stand_in_for_liger(monkeypatch, apply)
    monkeypatch.setattr(bench_subject, "has_liger", lambda: True)
    monkeypatch.setattr(modeling_llama, "__builtins_dict___0", None, raising=False)  # so that it is gone in the end
    del modeling_llama.__builtins_dict___0
    subject = Subject(variants()["floor-liger"], backbone(TOY, 1, CPU), "prefill", 0.0)
    assert modeling_llama.rotate_half is original
    subject.load()
    assert modeling_llama.rotate_half is fused
    subject.park()
    assert modeling_llama.rotate_half is original


def test_all_variants_share_one_set_of_frozen_weights():
    base = backbone(TOY, 1, CPU)
    before = {name: p.clone() for name, p in base.named_parameters()}
    with registered_baselines():
        rows = variants()
        for name in ("floor", "peft-lora", "peft-dora", "malora-dense", "asylora-dense-compiled", "molora-loop"):
            subject = Subject(replace(rows[name], run="eager"), base, "train", 0.05)
            shared = {id(p) for p in base.parameters()}
            assert shared <= {id(p) for p in subject.model.parameters()}, name
            assert all(p.any() and not p.is_meta for p in subject.own), name
            subject.load()
            ids = torch.randint(0, 512, (2, 8))
            subject.model(input_ids=ids, labels=ids).loss.backward()
            assert all((p.grad is not None) == p.requires_grad for p in subject.model.parameters()), name
            subject.park()
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


@pytest.mark.parametrize(
    "backend, mode, liger, expected",
    [
        ("fused", "train", False, {"padding"}),
        ("fused", "train", True, {"padding", "rotary", "activation", "norm"}),
        ("fused", "prefill", False, None),
        ("fused", "prefill", True, {"rotary", "activation", "norm"}),
        ("fp8", "decode", False, set()),
        ("dense", "train", False, None),
    ],
)
def test_the_backbone_is_optimized_while_it_is_loaded(backend, mode, liger, expected, monkeypatch):
    """Check that frozen layers are optimized as the variant and the mode need.

    Weights are padded for training with the fused backends and run in float8 with fp8; parking frees both.
    """
    calls = []
    monkeypatch.setattr(
        "malora.optimize_backbone", lambda _, **parts: calls.append({part for part in parts if parts[part]})
    )
    monkeypatch.setattr("malora.release_caches", lambda model: calls.append(model))
    subject = Subject(Variant("malora", "malora", backend, liger=liger), backbone(TOY, 1, CPU), mode, 0.0)
    assert calls == []
    subject.load()
    subject.park()
    assert calls == [*([] if expected is None else [expected]), subject.model]
