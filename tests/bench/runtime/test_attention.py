"""Attention in packed sequences: it equals that of their examples one by one.

No mask is made without need.
"""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention

from bench.runtime.attention import exact_with_masks, no_attention_mask
from bench.train.batching import Encoded, collate
from tests.conftest import SHAPES, make_model


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


@pytest.mark.parametrize("shape", SHAPES)
def test_examples_of_a_packed_sequence_do_not_attend_to_each_other(shape):
    """Outputs and gradients of a packed sequence are those of its examples one by one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(shape).to(device)
    texts = [[7, 3, 9, 11, 2, 5], [4, 8, 1], [6, 6, 2, 3]]
    (batch,) = [micro_batch.to(device) for micro_batch in collate([Encoded(text, 1) for text in texts], 0)]
    with exact_with_masks(device):
        packed = model(
            input_ids=batch.ids, position_ids=batch.position, attention_mask=batch.attention_bias(model.dtype)
        ).logits
    single = [model(input_ids=torch.tensor([text[:-1]], device=device)).logits[0] for text in texts]
    torch.testing.assert_close(packed[batch.mask], torch.cat([single[0], single[2], single[1]]), rtol=1e-4, atol=1e-5)
    parameter = model.get_input_embeddings().weight
    gradients = [torch.autograd.grad(x.pow(2).sum(), parameter)[0] for x in (packed[batch.mask], torch.cat(single))]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
