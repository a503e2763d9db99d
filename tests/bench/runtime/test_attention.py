"""Attention in packed sequences: it equals that of their examples one by one."""

from functools import partial

import pytest
import torch

from bench.errors import UserError
from bench.runtime.attention import (
    attention_windows,
    exact_with_masks,
    masks_for,
    packed_attention_bias,
    require_packing,
)
from bench.train.batching import Encoded, collate
from tests.bench.base_types import ALL, UNFIT, make_base
from tests.conftest import make_model


def test_a_token_attends_to_earlier_tokens_of_its_example():
    (batch,) = collate([Encoded([5, 6, 7, 8], 2), Encoded([9, 10, 11], 1)], pad_id=0)
    attends = (packed_attention_bias(batch.example, torch.float32)[0, 0, :6, :6] == 0).int().tolist()
    assert attends == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]  # fmt: skip


TEXTS = [[7, 3, 9, 11, 2, 5, 8, 8, 31, 7, 12], [4, 8, 1], [6, 6, 2, 3, 40, 17, 22]]  # windows are shorter


@pytest.mark.parametrize("name", ALL)
def test_a_packed_sequence_attends_as_its_examples_one_by_one(name):
    """Outputs and gradients are those of plain forward passes, with the windows of each layer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_base(name).to(device)
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    (batch,) = [micro_batch.to(device) for micro_batch in collate([Encoded(text, 1) for text in TEXTS], 0)]
    masks = masks_for(attention_windows(model), partial(packed_attention_bias, batch.example, model.dtype))
    with exact_with_masks(device):
        packed = model(input_ids=batch.ids, position_ids=batch.position, attention_mask=masks).logits
    single = [model(input_ids=torch.tensor([text[:-1]], device=device)).logits[0] for text in TEXTS]
    torch.testing.assert_close(packed[batch.mask], torch.cat([single[0], single[2], single[1]]), rtol=1e-3, atol=1e-4)
    gradients = [torch.autograd.grad(x.pow(2).mean(), embeddings)[0] for x in (packed[batch.mask], torch.cat(single))]
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-4 * gradients[0].abs().max().item())


@pytest.mark.parametrize("name", ALL)
def test_models_that_keep_examples_apart_are_accepted(name):
    require_packing(make_base(name))
    require_packing(make_base(name).bfloat16())


@pytest.mark.parametrize("name", UNFIT)
def test_models_that_do_not_keep_examples_apart_are_refused(name):
    """A bidirectional one, positions that begin elsewhere, a recurrent state, and masks that are not understood."""
    for model in (make_base(name), make_base(name).bfloat16()):
        with pytest.raises(UserError, match=r"cannot be used here|has no mask"):
            require_packing(model)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"attention_chunk_size": 4}, "chunked_attention"),
        ({"_attn_implementation": "flash_attention_2"}, "flash_attention_2"),
    ],
)
def test_attention_without_a_known_mask_is_refused(changes, reason):
    model = make_model()
    for name, value in changes.items():
        model.config.__dict__["_attn_implementation_internal" if name.startswith("_") else name] = value
    with pytest.raises(UserError, match=reason):
        attention_windows(model)
