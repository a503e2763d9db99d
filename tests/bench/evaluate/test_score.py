"""Scores against values computed by hand, item by item."""

import math

import pytest
import torch

from bench.evaluate import lm_eval_model
from bench.evaluate.grade import last_number
from bench.evaluate.score import score
from bench.models.base import load, prepare
from tasks import MIXTURES, TASKS, build
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
                prompt, text = tokenizer(example.prompt)["input_ids"], tokenizer(example.prompt + choice)["input_ids"]
                log_p = model(torch.tensor([text])).logits[0].log_softmax(-1)
                value = sum(log_p[i - 1, text[i]].item() for i in range(len(prompt), len(text)))
                values.append(value / len(choice) if format == "cloze" else value)
            by_hand.append(int(max(range(len(values)), key=values.__getitem__) == example.answer))
        assert outcomes[task] == by_hand
        assert scores[task]["metric"] == metric and scores[task]["n"] == len(items)
        mean = sum(by_hand) / len(by_hand)
        assert scores[task]["value"] == pytest.approx(mean)
        assert scores[task]["stderr"] == pytest.approx((mean * (1 - mean) / (len(by_hand) - 1)) ** 0.5)


def test_scoring_uses_no_network_and_shows_no_progress_bars(base_folder, monkeypatch, capfd):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model, tokenizer = load(prepare(str(base_folder)), torch.device("cpu"))
    examples = build(MIXTURES["procedural"], SOURCE, format="letters", seed=0).test
    score(model.train(), tokenizer, examples, format="letters", batch_size=5)
    assert model.training  # scoring restores the mode
    assert "%|" not in capfd.readouterr().err  # lm-eval's progress bars


@pytest.fixture
def inter(base_folder):
    model, tokenizer = load(prepare(str(base_folder)), torch.device("cpu"))
    return model, tokenizer, build(MIXTURES["procedural-inter"], SOURCE, format="letters", seed=0)


def test_generated_answers_are_those_of_transformers(inter):
    model, tokenizer, data = inter
    tests = {"counting": data.test["counting"]}
    scores, outcomes = score(model, tokenizer, tests, format="letters", batch_size=5, generation_batch_size=5)
    by_hand = []
    for example in tests["counting"]:
        ids = tokenizer(example.prompt, return_tensors="pt", return_token_type_ids=False)
        max_new_tokens = TASKS["counting"].writing.max_new_tokens
        out = model.generate(**ids, do_sample=False, max_new_tokens=max_new_tokens)[0, ids["input_ids"].shape[1] :]
        text = tokenizer.decode(out, skip_special_tokens=True)
        by_hand.append(int(last_number(text) == last_number(example.references[0])))
    assert outcomes["counting"] == by_hand
    assert scores["counting"]["metric"] == "exact_match" and scores["counting"]["n"] == len(by_hand)


@pytest.mark.parametrize("max_labels", [1, 16, 16_384])
def test_the_likelihood_is_the_geometric_mean_over_the_labels_tokens(max_labels, inter, monkeypatch):
    monkeypatch.setattr(lm_eval_model, "MAX_LABELS", max_labels)
    model, tokenizer, data = inter
    examples = {name: items[:6] for name, items in data.validation.items()}
    scores, outcomes = score(model, tokenizer, examples, format="letters", batch_size=5)
    for domain, items in examples.items():
        for example, outcome in zip(items, outcomes[domain], strict=True):
            prompt, text = (tokenizer(t)["input_ids"] for t in (example.prompt, example.prompt + example.label))
            log_p = model(torch.tensor([text])).logits[0].log_softmax(-1)
            values = [log_p[i - 1, text[i]].item() for i in range(len(prompt), len(text))]
            assert outcome == pytest.approx(math.exp(sum(values) / len(values)), rel=1e-4)
        assert scores[domain]["value"] == pytest.approx(sum(outcomes[domain]) / len(items))
        assert scores[domain]["metric"] == "likelihood"


def test_rouge_l_lies_between_right_and_wrong(inter, monkeypatch):
    model, tokenizer, data = inter
    example = data.test["report"][0]
    answers = iter([example.references[0], "in the"])
    monkeypatch.setattr(
        lm_eval_model.LabelPositionLM, "generate_until", lambda self, requests: [next(answers) for _ in requests]
    )
    scores, outcomes = score(model, tokenizer, {"report": [example] * 2}, format="letters", batch_size=5)
    # Eight words, without the stop seven, of which the answer has two: P = 1 and R = 2/7.
    assert outcomes["report"] == [1, pytest.approx(2 * (2 / 7) / (1 + 2 / 7))]
    assert scores["report"]["value"] == pytest.approx(sum(outcomes["report"]) / 2)
