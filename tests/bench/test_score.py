"""lm-eval's scores against the same computed by hand, item by item."""

import pytest
import torch

from bench.model import load, prepare
from bench.score import score
from tasks import MIXTURES, build
from tests.bench.conftest import SOURCE


@pytest.mark.parametrize("format, metric", [("letters", "acc"), ("cloze", "acc_norm")])
def test_lm_eval_agrees_with_the_likelihoods_by_hand(format, metric, base_folder):
    model, tokenizer = load(prepare(str(base_folder)), torch.device("cpu"))
    examples = build(MIXTURES["procedural"], SOURCE, format=format, seed=0).test
    scores, outcomes = score(model, tokenizer, examples, format=format, batch_size=5)
    for task, items in examples.items():
        by_hand = []
        for example in items:
            values = []
            for choice in example.choices:
                prompt, whole = tokenizer(example.prompt)["input_ids"], tokenizer(example.prompt + choice)["input_ids"]
                log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
                value = sum(log_p[i - 1, whole[i]].item() for i in range(len(prompt), len(whole)))
                values.append(value / len(choice) if format == "cloze" else value)
            by_hand.append(int(max(range(len(values)), key=values.__getitem__) == example.answer))
        assert outcomes[task] == by_hand
        assert scores[task]["metric"] == metric and scores[task]["n"] == len(items)
        mean = sum(by_hand) / len(by_hand)
        assert scores[task]["value"] == pytest.approx(mean)
        assert scores[task]["stderr"] == pytest.approx((mean * (1 - mean) / (len(by_hand) - 1)) ** 0.5)


def test_scoring_touches_neither_the_network_nor_the_caches(base_folder, monkeypatch, capfd):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model, tokenizer = load(prepare(str(base_folder)), torch.device("cpu"))
    examples = build(MIXTURES["procedural"], SOURCE, format="letters", seed=0).test
    score(model.train(), tokenizer, examples, format="letters", batch_size=5)
    assert model.training  # left as it was found
    assert "%|" not in capfd.readouterr().err  # lm-eval's progress bars
