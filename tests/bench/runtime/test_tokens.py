"""Token ids of training and scoring, for tokenizers with special tokens at either end."""

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers.processors import TemplateProcessing

from bench.errors import UserError
from bench.evaluate.lm_eval_model import LabelPositionLM
from bench.evaluate.lm_eval_tasks import quiet_lm_eval
from bench.evaluate.score import score
from bench.models import tiny
from bench.models.base import load, prepare
from bench.runtime.tokens import encode_texts
from bench.train.batching import encode
from tasks import MIXTURES, Example, WrittenExample, build
from tests.bench.conftest import SOURCE

CHOICE = Example("lexicon", "Question: which is second ?\nA. red\nB. blue\nAnswer:", (" A", " B"), 1)
WRITTEN = WrittenExample("report", "Question: name ann , object key\nAnswer:", (" ann has the key .",), 0, ("x",))
SPACE = Example("lexicon", "Question: which is second ?\nAnswer: ", ("A", "B"), 1)
BOS, EOS = 1, 2
TEMPLATES = {
    "none": None,
    "BOS": "<unk> $A",
    "EOS": "$A <eos>",
    "both": "<unk> $A <eos>",
    "two": "<unk> <unk> $A <eos>",
}


def tokenizer_with(template):
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = "<unk>"
    if template:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=template, special_tokens=[("<unk>", BOS), ("<eos>", EOS)]
        )
    return tokenizer


def wrap(base_folder, tokenizer, **options):
    model, _ = load(prepare(str(base_folder)), torch.device("cpu"))
    with quiet_lm_eval():
        return LabelPositionLM(pretrained=model, tokenizer=tokenizer, batch_size=2, **options)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("example", [CHOICE, WRITTEN, SPACE], ids=["choice", "written", "space"])
def test_training_and_scoring_see_the_same_ids(template, example, base_folder, monkeypatch):
    plain, tokenizer = tiny.tokenizer(), tokenizer_with(template)
    front = [BOS] * (template or "").count("<unk>")
    prompt, label = plain(example.prompt)["input_ids"], plain(example.label)["input_ids"]
    (code,) = encode(tokenizer, [example], max_length=256)
    trained_label = label + [EOS] * isinstance(example, WrittenExample)
    assert code.ids == front + prompt + trained_label and code.label_length == len(trained_label)

    language_model = wrap(base_folder, tokenizer)
    asked = []
    monkeypatch.setattr(language_model, "_loglikelihood_tokens", lambda requests: asked.extend(requests))
    language_model.loglikelihood([Instance("loglikelihood", {}, (example.prompt, example.label), 0)])
    assert asked[0][1:] == (front + prompt, label)
    assert language_model.count_label_tokens(example.prompt, example.label) == len(label)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_generation_continues_the_prompt_that_was_trained_on(template, base_folder, monkeypatch):
    tokenizer = tokenizer_with(template)
    language_model = wrap(base_folder, tokenizer)
    prompts = []
    monkeypatch.setattr(
        "bench.evaluate.lm_eval_model.generate", lambda model, ids, **_: prompts.extend(ids) or [[] for _ in ids]
    )
    options = {"until": ["\n"], "max_gen_toks": 4}
    language_model.generate_until([Instance("generate_until", {}, (WRITTEN.prompt, options), 0)])
    (code,) = encode(tokenizer, [WRITTEN], max_length=256)
    assert prompts == [code.ids[: -code.label_length]]


def test_a_tokenizer_that_appends_a_token_changes_no_score(base_folder):
    model, tokenizer = load(prepare(str(base_folder)), torch.device("cpu"))
    examples = build(MIXTURES["procedural"], SOURCE, format="letters", seed=0).test
    expected = score(model, tokenizer, examples, format="letters", batch_size=5)
    assert score(model, tokenizer_with("$A <eos>"), examples, format="letters", batch_size=5) == expected


def test_special_tokens_that_a_text_begins_with_are_not_doubled():
    tokenizer = tokenizer_with("<unk> $A <eos>")
    assert encode_texts(tokenizer, ["<unk> red", "red", ""]) == [
        [BOS, *tiny.tokenizer()("red")["input_ids"]], [BOS, *tiny.tokenizer()("red")["input_ids"]], [BOS]
    ]  # fmt: skip
    assert encode_texts(tokenizer, []) == []


def test_a_written_answer_needs_a_token_to_end_it():
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    assert encode(tokenizer, [CHOICE], max_length=256)
    with pytest.raises(UserError, match="no end-of-text token"):
        encode(tokenizer, [CHOICE, WRITTEN], max_length=256)
