"""Small models of several architectures, built in memory.

No test downloads anything.
"""

import gc
import os
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it, so that a test that would download fails at once

import pytest
import torch

from tests.processes import template
from tests.skip_report import SkipReport
from tests.triton_interpreter import make_interpreter_faster

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, so that its kernels are tested without a GPU
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

torch.set_num_threads(1)
if not torch.cuda.is_available():
    make_interpreter_faster()

_SHAPE: dict[str, Any] = {
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


def pytest_collection_finish(session):
    """Exempt objects that the imports made from later garbage collections.

    With them, each collection would take a third of a second.
    """
    gc.collect()
    gc.freeze()
    if not session.config.option.collectonly and session.items:
        template.start()


def pytest_unconfigure(config):
    template.stop()
    gc.unfreeze()


def pytest_configure(config):
    config.pluginmanager.register(SkipReport(config), "skip-report")


def make_model(shape: str = "llama"):
    torch.manual_seed(0)
    return SHAPES[shape]().eval()


def optimize_adapted_layers(model):
    """Pad frozen weights and convert layers to float8; leave norms and the like, which the interpreter runs slowly."""
    import malora

    malora.optimize_backbone(model, rotary=False, activation=False, norm=False, loss=False)


@pytest.fixture
def registry():
    """Forget tasks and mixtures of files after a test; returns a function that forgets them at once."""
    import tasks
    from bench.runs import run, setting

    before = dict(tasks.TASKS), dict(tasks.MIXTURES)

    def forget():
        for registered, known in zip((tasks.TASKS, tasks.MIXTURES), before, strict=True):
            registered.clear()
            registered.update(known)
        setting._build.cache_clear()
        run._ENCODED.clear()

    yield forget
    forget()


@pytest.fixture
def llama():
    return make_model()


@pytest.fixture
def ids():
    return torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
