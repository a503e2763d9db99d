"""Greedy decoding, token by token against transformers."""

import pytest
import torch
from peft import get_peft_model

import malora
from bench.evaluate.generate import CHECK_EVERY, generate
from tests.bench.base_types import ALL, make_base
from tests.conftest import make_model

PROMPTS = [[7, 3, 9, 11, 2, 5], [4], [6, 6, 2, 3, 1, 5, 9, 8, 7, 7, 3], [12, 30], [44, 2, 17, 5]]
END = 13
MAX_NEW_TOKENS = 40


def make_routed_model(device="cpu"):
    model = get_peft_model(make_model(), malora.METHODS["malora"]()).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "malora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(1), std=0.3)
    return model.to(device)


def transformers_generate(model, prompt, end):
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=end,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    return out[: out.index(end)] if end in out else out


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_tokens_are_those_of_transformers(batch_size):
    """transformers generates one prompt at a time, so that it has no padding."""
    model = make_routed_model()
    ends = {tuple(p): transformers_generate(model, p, END) for p in PROMPTS}
    end = next(t for t in ends[tuple(PROMPTS[0])][CHECK_EVERY + 3 :])  # a token that is generated after the first check
    expected = [transformers_generate(model, prompt, end) for prompt in PROMPTS]
    assert len({len(text) for text in expected}) > 1  # some end early
    assert generate(model, PROMPTS, max_new_tokens=MAX_NEW_TOKENS, batch_size=batch_size, end=[end]) == expected


@pytest.mark.parametrize("name", ALL)
def test_tokens_are_those_of_plain_forward_passes(name):
    """For every type of base model: with windows shorter than a text, and with eager attention."""
    model = make_base(name)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        for _ in range(12):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        expected.append(ids[0, len(prompt) :].tolist())
    assert generate(model, PROMPTS, max_new_tokens=12, batch_size=3, end=[]) == expected


def test_a_batch_ends_when_all_texts_are_done(monkeypatch):
    model, steps = make_routed_model(), []
    monkeypatch.setattr("bench.evaluate.generate._Decoder._advance", lambda self: steps.append(1))
    texts = generate(model, PROMPTS, max_new_tokens=MAX_NEW_TOKENS, batch_size=8, end=[], stopped=lambda tokens: True)
    assert len(steps) == CHECK_EVERY - 1 and {len(text) for text in texts} == {CHECK_EVERY}


def test_one_token_or_no_prompt():
    model = make_routed_model()
    assert [len(text) for text in generate(model, PROMPTS, max_new_tokens=1, batch_size=2, end=[])] == [1] * len(
        PROMPTS
    )
    assert generate(model, [], max_new_tokens=4, batch_size=2, end=[]) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", [None, "lora", "dora", "malora"])
def test_a_captured_step_generates_what_the_eager_one_does(method, monkeypatch):
    """Generate for two batches of one shape and a last one of another shape.

    There are two of one shape, so that the graph is replayed for another batch.
    """
    model = make_model().to("cuda", torch.bfloat16)  # as `bench.models.base.load` loads it
    if method:
        model = get_peft_model(model, malora.METHODS[method]()).cuda().eval()
    captured = generate(model, PROMPTS, max_new_tokens=MAX_NEW_TOKENS, batch_size=2, end=[END])
    monkeypatch.setattr("bench.evaluate.generate.can_capture", lambda model: False)
    assert captured == generate(model, PROMPTS, max_new_tokens=MAX_NEW_TOKENS, batch_size=2, end=[END])
