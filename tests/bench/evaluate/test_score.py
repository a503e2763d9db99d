"""Scores against values computed by hand, item by item."""

import math
import random
import re
from dataclasses import replace

import datasets
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from sklearn.metrics import recall_score

from bench.evaluate import lm_eval_model
from bench.evaluate.grade import last_number
from bench.evaluate.lm_eval_tasks import choice_config, quiet_lm_eval
from bench.evaluate.score import score
from bench.models.base import load, prepare
from bench.records.schema import TaskScore
from bench.runtime import progress
from tasks import MIXTURES, TASKS, Example, build, procedural
from tests.bench.conftest import SOURCE


@pytest.mark.parametrize(
    "format, metric, summed", [("letters", "acc", False), ("cloze", "acc_norm", False), ("cloze", "acc", True)]
)
def test_lm_eval_agrees_with_the_likelihoods_by_hand(format, metric, summed, base_folder):
    model, tokenizer = load(prepare(str(base_folder)), torch.device("cpu"))
    examples = build(MIXTURES["procedural"], SOURCE, format=format, seed=0).test
    scores, outcomes, gold = score(model, tokenizer, examples, format=format, batch_size=5, summed=summed)
    for task, items in examples.items():
        by_hand, losses = [], []
        for example in items:
            values = []
            for choice in example.choices:
                prompt, text = tokenizer(example.prompt)["input_ids"], tokenizer(example.prompt + choice)["input_ids"]
                log_p = model(torch.tensor([text])).logits[0].log_softmax(-1)
                value = sum(log_p[i - 1, text[i]].item() for i in range(len(prompt), len(text)))
                values.append(value / len(choice.removeprefix(" ")) if metric == "acc_norm" else value)
                if choice == example.label:
                    losses.append((-value, len(text) - len(prompt)))
            by_hand.append(int(max(range(len(values)), key=values.__getitem__) == example.answer))
        assert outcomes[task] == by_hand
        nats, tokens = (list(column) for column in zip(*losses, strict=True))
        assert gold[task].nats == pytest.approx(nats, rel=1e-4) and gold[task].label_tokens == tokens
        assert scores[task]["loss"] == pytest.approx(sum(nats) / sum(tokens), rel=1e-4)
        assert scores[task]["guess"] == pytest.approx(sum(1 / len(e.choices) for e in items) / len(items))
        assert gold[task].classes is None and "balanced" not in scores[task]  # declared by none of these tasks
        assert scores[task]["metric"] == metric and scores[task]["n"] == len(items)
        mean = sum(by_hand) / len(by_hand)
        assert scores[task]["value"] == pytest.approx(mean)
        assert scores[task]["stderr"] == pytest.approx((mean * (1 - mean) / (len(by_hand) - 1)) ** 0.5)


def test_tasks_with_classes_have_balanced_accuracy(base_folder, monkeypatch):
    model, tokenizer = load(prepare(str(base_folder)), torch.device("cpu"))
    monkeypatch.setitem(TASKS, "lexicon", replace(TASKS["lexicon"], has_classes=True))
    examples = build(MIXTURES["procedural/lexicon"], SOURCE, format="cloze", seed=0).test
    examples = {"lexicon": [*examples["lexicon"], *examples["lexicon"][:1] * 30]}
    scores, outcomes, gold = score(model, tokenizer, examples, format="cloze", batch_size=32)
    labels = [example.label for example in examples["lexicon"]]
    one, right = TaskScore(**scores["lexicon"]), outcomes["lexicon"]
    wrong_or_right = [label if r else "another" for label, r in zip(labels, right, strict=True)]
    recalls = recall_score(labels, wrong_or_right, labels=sorted(set(labels)), average=None)
    assert one.balanced == pytest.approx(recalls.mean()) and one.classes == len(set(labels)) == len(recalls)
    assert one.largest_class == max(map(labels.count, labels)) / len(labels) and one.is_uneven
    assert not one.replace(largest_class=1.2 / one.classes).is_uneven
    assert gold["lexicon"].classes == [sorted(set(labels)).index(label) for label in labels]


def test_generated_answers_have_the_loss_of_the_first_reference(inter):
    model, tokenizer, data = inter
    examples = {"report": data.test["report"][:3]}
    scores, _, gold = score(model, tokenizer, examples, format="letters", batch_size=2)
    with torch.no_grad():
        for item, nats, count in zip(examples["report"], gold["report"].nats, gold["report"].label_tokens, strict=True):
            text = torch.tensor([tokenizer(item.prompt + item.label)["input_ids"]])
            log_p = model(text).logits[0].log_softmax(-1)[:-1].gather(1, text[0, 1:, None])[-count:]
            assert nats == pytest.approx(-log_p.sum().item(), rel=1e-4)
            assert count == text.shape[1] - len(tokenizer(item.prompt)["input_ids"])
    assert "guess" not in scores["report"] and scores["report"]["label_tokens"] == sum(gold["report"].label_tokens)


def made_up(count):
    """Return questions with choices of one to four words."""
    rng = random.Random(0)
    words = [*procedural.NAMES, *procedural.OBJECTS, *procedural.PLACES, *procedural.NOUNS, "a", "is"]
    return [
        (
            f"which is {' '.join(rng.choices(words, k=4))} ? Answer:",
            [" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(4)],
            rng.randrange(4),
        )
        for _ in range(count)
    ]


def test_cloze_accuracy_is_that_of_a_task_as_lm_eval_writes_it(base_folder):
    """The same items as a task in the style of lm-eval's arc_easy, scored by HFLM."""
    model, tokenizer = load(prepare(str(base_folder)), torch.device("cpu"))
    items = made_up(100)
    examples = [Example("lexicon", text, tuple(f" {c}" for c in choices), answer) for text, choices, answer in items]
    scores, outcomes, _ = score(model, tokenizer, {"lexicon": examples}, format="cloze", batch_size=32)
    rows = [{"query": text, "choices": choices, "gold": answer} for text, choices, answer in items]
    task = {
        "task": "as_lm_eval",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}],
    }
    with quiet_lm_eval(), torch.no_grad():
        theirs = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=32),
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=1,
        )
    samples = sorted(theirs["samples"]["as_lm_eval"], key=lambda sample: sample["doc_id"])
    assert outcomes["lexicon"] == [sample["acc_norm"] for sample in samples]
    assert scores["lexicon"]["value"] == theirs["results"]["as_lm_eval"]["acc_norm,none"]
    assert scores["lexicon"]["version"] == 3


@pytest.mark.parametrize("choices", [("red", "blue green"), (" red", "blue"), (" é", " blue green")])
def test_only_a_blank_that_all_choices_have_is_left_out(choices):
    config = choice_config("lexicon", [Example("lexicon", "which ?", choices, 0)], "acc_norm")
    (row,) = config["custom_dataset"]()["test"]
    assert [config["target_delimiter"] + choice for choice in row["choices"]] == list(choices)
    assert (config["target_delimiter"] == " ") == all(choice[0] == " " for choice in choices)


@pytest.mark.parametrize("stop, text, answer", [
    (("\n",), "\nThe Eagle is cheap.\nQuestion: more", "\nThe Eagle is cheap."),
    (("\n",), " \n\n The Eagle\n\nmore", " \n\n The Eagle"),
    (("\n",), "The Eagle", "The Eagle"),
    (("\n",), "\n\n", "\n\n"),
    (("\n\n",), "\n\na\nb\n\nc", "\n\na\nb"),
    (("\nQuestion:", "\nPassage:"), "\nQuestion: more", ""),
    (("\ndef", "\n#"), "\n\ndef other():", "\n"),
    (("\ndef", "\n#"), "\n    return 1\n# more", "\n    return 1"),
    (("\n", "\nQuestion:"), "\nQuestion: a", ""),
])  # fmt: skip
def test_line_breaks_before_an_answer_do_not_end_it(stop, text, answer):
    assert lm_eval_model._until(stop, text) == answer


def test_generation_goes_on_until_an_answer_has_begun(base_folder):
    model, tokenizer = load(prepare(str(base_folder)), torch.device("cpu"))
    with quiet_lm_eval():
        language_model = lm_eval_model.LabelPositionLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    language_model.tok_decode = lambda tokens, **_: "".join(tokens)
    stopped = language_model._has_any(("\n",))
    assert [stopped(list(text)) for text in ("\n", "\n\n a", "\n a\n")] == [False, False, True]


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


def counts(error, name):
    """Return the numbers of answers on the lines of progress, and the total."""
    lines = [re.fullmatch(rf"{name}: answer (\d+)/(\d+), [\d,.]+ answers/s, [\d:]+ left", line) for line in error]
    assert lines and all(lines)
    (total,) = {int(line[2]) for line in lines}
    return [int(line[1]) for line in lines], total


def test_progress_counts_every_choice(base_folder, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.0)
    model, tokenizer = load(prepare(str(base_folder)), torch.device("cpu"))
    examples = {n: e[:5] for n, e in build(MIXTURES["procedural"], SOURCE, format="cloze", seed=0).test.items()}
    score(model, tokenizer, examples, format="cloze", batch_size=8, progress_of="run-a")
    done, total = counts(capsys.readouterr().err.splitlines(), "run-a")
    assert total == sum(len(e.choices) for items in examples.values() for e in items)
    assert len(done) > 3 and done == sorted(done) and done[-1] == total


@pytest.mark.parametrize("split", ["validation", "test"])
def test_progress_counts_every_text(split, inter, monkeypatch, capsys):
    """Of texts, those of the validation set are compared by likelihood, and those of a test set are generated."""
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.0)
    model, tokenizer, data = inter
    examples = {name: items[:6] for name, items in getattr(data, split).items()}
    score(model, tokenizer, examples, format="letters", batch_size=5, generation_batch_size=5, progress_of="run-a")
    done, total = counts(capsys.readouterr().err.splitlines(), "run-a")
    assert done == sorted(done) and done[-1] == total >= sum(map(len, examples.values()))


@pytest.fixture
def inter(base_folder):
    model, tokenizer = load(prepare(str(base_folder)), torch.device("cpu"))
    return model, tokenizer, build(MIXTURES["procedural-inter"], SOURCE, format="letters", seed=0)


def test_generated_answers_are_those_of_transformers(inter):
    model, tokenizer, data = inter
    tests = {"counting": data.test["counting"]}
    scores, outcomes, _ = score(model, tokenizer, tests, format="letters", batch_size=5, generation_batch_size=5)
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
    scores, outcomes, gold = score(model, tokenizer, examples, format="letters", batch_size=5)
    for domain, items in examples.items():
        for example, outcome, nats in zip(items, outcomes[domain], gold[domain].nats, strict=True):
            prompt, text = (tokenizer(t)["input_ids"] for t in (example.prompt, example.prompt + example.label))
            log_p = model(torch.tensor([text])).logits[0].log_softmax(-1)
            values = [log_p[i - 1, text[i]].item() for i in range(len(prompt), len(text))]
            assert outcome == pytest.approx(math.exp(sum(values) / len(values)), rel=1e-4)
            assert nats == pytest.approx(-sum(values), rel=1e-4)
        assert scores[domain]["value"] == pytest.approx(sum(outcomes[domain]) / len(items))
        assert scores[domain]["metric"] == "likelihood"


def test_rouge_l_lies_between_right_and_wrong(inter, monkeypatch):
    model, tokenizer, data = inter
    example = data.test["report"][0]
    answers = iter([example.references[0], "in the"])
    monkeypatch.setattr(
        lm_eval_model.LabelPositionLM, "generate_until", lambda self, requests: [next(answers) for _ in requests]
    )
    scores, outcomes, _ = score(model, tokenizer, {"report": [example] * 2}, format="letters", batch_size=5)
    # Eight words, without the stop seven, of which the answer has two: P = 1 and R = 2/7.
    assert outcomes["report"] == [1, pytest.approx(2 * (2 / 7) / (1 + 2 / 7))]
    assert scores["report"]["value"] == pytest.approx(sum(outcomes["report"]) / 2)
