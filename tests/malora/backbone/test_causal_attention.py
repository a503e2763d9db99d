"""No attention mask is made without need, and none is left out that is needed."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from malora.backbone.causal_attention import CAUSAL_SDPA, no_attention_mask, without_needless_mask
from tests.conftest import make_model


def test_no_attention_mask_is_made_during_graph_capture(monkeypatch):
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)  # transformers' test for a capture
    masks = []
    forward = LlamaAttention.forward

    def record_mask(self, *args, attention_mask=None, **options):
        masks.append(attention_mask)
        return forward(self, *args, attention_mask=attention_mask, **options)

    monkeypatch.setattr(LlamaAttention, "forward", record_mask)
    model = make_model()
    with no_attention_mask(model):
        model(input_ids=torch.ones(2, 5, dtype=torch.long))
    assert masks and all(mask is None for mask in masks)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("inputs, implementation", [
    ({}, CAUSAL_SDPA), ({"attention_mask": None}, CAUSAL_SDPA), ({"attention_mask": torch.ones(1, 5)}, "sdpa"),
    ({"position_ids": torch.arange(5)[None]}, "sdpa"),
])  # fmt: skip
def test_a_mask_or_positions_of_the_batch_count(inputs, implementation):
    model = make_model()
    with without_needless_mask(model, inputs):
        assert model.config._attn_implementation == implementation


def test_layers_with_a_window_keep_their_mask():
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    shape |= {"num_key_value_heads": 1, "vocab_size": 8}
    for window, implementation in ((4, "sdpa"), (None, CAUSAL_SDPA)):
        model = MistralForCausalLM(MistralConfig(**shape, sliding_window=window))
        with without_needless_mask(model, {}):
            assert model.config._attn_implementation == implementation
