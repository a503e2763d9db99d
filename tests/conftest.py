"""Small models of several shapes, made on the spot; nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it: a test that would reach out fails at once

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels are tested without a GPU
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

torch.set_num_threads(1)

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
}

SHAPES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE, num_key_value_heads=2)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SHAPE, num_key_value_heads=2)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SHAPE)),
}


def make_model(shape: str = "llama"):
    torch.manual_seed(0)
    return SHAPES[shape]().eval()


@pytest.fixture
def llama():
    return make_model()


@pytest.fixture
def ids():
    return torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
