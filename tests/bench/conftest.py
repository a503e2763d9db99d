"""A base model of random weights with the tiny profile's words, and settings that train it for a few steps."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import tiny
from bench.profiles import PROFILES
from bench.run import Setting
from tasks import Generator

SOURCE = Generator((("train", 40), ("validation", 20), ("test", 12)))


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "random-llama"
    words = tiny.tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(words),
        pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, bos_token_id=None,
    )).save_pretrained(folder)  # fmt: skip
    words.save_pretrained(folder)
    return folder


@pytest.fixture
def setting(base_folder, tmp_path):
    return make_setting(base_folder, tmp_path)


def make_setting(base_folder, results, **options):
    profile = replace(
        PROFILES["tiny"], source=SOURCE, rates=(1e-3, 1e-2), seeds=2, batch_size=8, checkpoint_every=5, warmup_ratio=0.0
    )
    return Setting(profile, str(base_folder), SOURCE, "intra", "letters", results, **options)
