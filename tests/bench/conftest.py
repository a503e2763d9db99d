"""Fixtures of the harness: a small base model, settings, and provenance.

The base model is random, and the settings train it for a few steps.
"""

import sys
import types
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForCausalLM

from bench.experiments.profiles import PROFILES
from bench.models import tiny
from bench.records import provenance
from bench.records.schema import Provenance
from bench.runs.setting import RunSettings
from bench.speed import rounds
from tasks import Generator

SOURCE = Generator((("train", 40), ("validation", 20), ("test", 12)))


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """Folder of a Llama of random weights with the tokenizer of the tiny profile."""
    folder = tmp_path_factory.mktemp("base") / "random-llama"
    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def setting(base_folder, tmp_path):
    """Settings of runs on the random base; their records go to `tmp_path`."""
    return make_setting(base_folder, tmp_path)


def make_setting(base_folder, results, **options):
    """Make settings of the tiny profile with less data.

    They have two seeds and a checkpoint every five steps.
    """
    profile = replace(
        PROFILES["tiny"], source=SOURCE, rates=(1e-3, 1e-2), seeds=2, batch_size=8, checkpoint_every=5, warmup_ratio=0.0
    )
    return RunSettings(profile, str(base_folder), SOURCE, "intra", results, **options)


def stand_in_for_liger(monkeypatch, apply):
    """Replace Liger, which needs a GPU, by a function that changes a model."""
    fake = types.ModuleType("liger_kernel.transformers")
    fake._apply_liger_kernel_to_instance = apply
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", fake)


@pytest.fixture
def fresh_accelerator():
    """Let each test choose its precision.

    Otherwise accelerate keeps the precision of the first Accelerator of a process.
    """
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def short_rounds(monkeypatch):
    """Shorten the rounds of the speed benchmark to a few steps."""
    monkeypatch.setattr(rounds, "WARM_SECONDS", 0.02)
    monkeypatch.setattr(rounds, "ROUND_SECONDS", 0.02)


# Provenance of a record from a clean checkout.
CLEAN = Provenance(
    time="2026-01-01T00:00:00Z",
    commit="0" * 40,
    dirty=False,
    source_sha256="x",
    python="3.12.0",
    packages=dict.fromkeys(("torch", "transformers", "peft"), "1.0"),
    device="a CPU",
    cuda=None,
    driver=None,
    concurrent_runs=1,
)


@pytest.fixture
def history(monkeypatch):
    """Give this clone three commits, with known hashes of their sources."""
    sources = {"later": "y", CLEAN.commit: CLEAN.source_sha256, "earlier": "z"}
    monkeypatch.setattr(provenance, "_git", lambda *arguments: "\n".join(sources))
    monkeypatch.setattr(provenance, "source_hash_of", sources.get)
    provenance.commit_of.cache_clear()
    yield
    provenance.commit_of.cache_clear()
