"""Encoders, encoder-decoders and heads, and what users of PEFT do with an adapted model besides training it."""

import copy
import io
import pickle

import pytest
import torch
from peft import AutoPeftModelForSeq2SeqLM, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from malora import METHODS, balance_loss

SIZES = {
    "malora": {"r": 4, "d": 6, "num_experts": 4},
    "molora": {"r": 4, "num_experts": 4},
    "asylora": {"r": 4},
}
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
T5_SHAPE = {"d_model": 16, "d_ff": 32, "d_kv": 4, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
HEADS = {
    "reward": (LlamaForSequenceClassification, "SEQ_CLS", {"labels": torch.tensor([0.5, -1.0])}),
    "tokens": (LlamaForTokenClassification, "TOKEN_CLS", {"labels": torch.ones(2, 9, dtype=torch.int64)}),
    "spans": (
        LlamaForQuestionAnswering,
        "QUESTION_ANS",
        {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([2, 4])},
    ),
}


def make_base(model_class):
    torch.manual_seed(0)
    if model_class is T5ForConditionalGeneration:
        return model_class(T5Config(**T5_SHAPE, vocab_size=61)).eval()
    if model_class is BertForSequenceClassification:
        return model_class(BertConfig(**SHAPE)).eval()
    labels = 1 if model_class is LlamaForSequenceClassification else 2
    return model_class(LlamaConfig(**SHAPE, num_key_value_heads=2, num_labels=labels, pad_token_id=0)).eval()


def adapted(base, method, **options):
    """Return the model with an adapter that has an effect."""
    model = get_peft_model(base, METHODS[method](**SIZES[method], **{"lora_dropout": 0, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "malora_B" in name:
                parameter.normal_()
    return model


@pytest.mark.parametrize("method", SIZES)
@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_trained_with_the_experts_and_saved_with_them(head, method, ids, tmp_path):
    model_class, task_type, labels = HEADS[head]
    model = adapted(make_base(model_class), method, task_type=task_type)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in name for name in trained)
    assert not any("original_module" in name or "base_layer" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=ids, **labels).loss.backward()
    optimizer.step()
    parameters = dict(model.named_parameters())
    assert all(not torch.equal(parameters[name], before) for name, before in trained.items() if "modules_to" in name)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_base(model_class), tmp_path)
    assert torch.equal(again(input_ids=ids)[0], model(input_ids=ids)[0])


@pytest.mark.parametrize("method", SIZES)
def test_an_encoder_has_experts_on_its_default_targets(method, ids):
    base = make_base(BertForSequenceClassification)
    plain = base(input_ids=ids).logits
    model = adapted(base, method, task_type="SEQ_CLS")
    assert not torch.allclose(model(input_ids=ids).logits, plain)
    model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    # The experts of all layers and the classifier learn; an up projection of random B passes gradients to all factors.
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, plain)


@pytest.mark.parametrize("method", SIZES)
def test_an_encoder_decoder_trains_generates_and_opens_by_its_auto_class(method, ids, tmp_path):
    base = make_base(T5ForConditionalGeneration)
    base.save_pretrained(tmp_path / "base")
    base = T5ForConditionalGeneration.from_pretrained(tmp_path / "base")  # so that the adapter knows its base
    options = {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "k", "v", "wi", "wo"]}
    model = adapted(base, method, **options).eval()
    loss = model(input_ids=ids, labels=ids[:, :5].contiguous()).loss  # fewer tokens in the decoder
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(again.generate(input_ids=ids, max_new_tokens=4, do_sample=False), tokens)


@pytest.mark.parametrize("method", SIZES)
def test_the_reference_pass_of_dpo_is_the_base_and_costs_the_policy_no_gradient(method, llama, ids):
    plain = llama(input_ids=ids).logits
    model = adapted(llama, method)
    model(input_ids=ids).logits.pow(2).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    policy = model(input_ids=ids).logits
    with torch.no_grad(), model.disable_adapter():
        reference = model(input_ids=ids).logits
    assert torch.equal(reference, plain)
    assert not torch.allclose(policy, reference)
    policy.pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in gradients)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(_saved(model), weights_only=False),
}


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_after_a_training_step_computes_the_same_and_shares_nothing(duplicate, llama, ids):
    model = adapted(llama, "malora").train()
    (model(input_ids=ids, labels=ids).loss + balance_loss(model)).backward()
    again = duplicate(model)
    before = model(input_ids=ids).logits
    assert torch.equal(again(input_ids=ids).logits, before)
    assert balance_loss(again).requires_grad
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            if "malora_" in name:
                parameter.add_(1)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not torch.allclose(again(input_ids=ids).logits, before)


def test_a_module_of_the_base_that_is_named_like_our_tensors_is_frozen_and_not_saved():
    class Imposter(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin0 = nn.Linear(5, 5)
            self.malora_head = nn.Linear(5, 5)

        def forward(self, x):
            return self.malora_head(self.lin0(x))

    model = get_peft_model(Imposter(), METHODS["molora"](r=2, target_modules=["lin0"], task_type=None))
    assert not model.base_model.model.malora_head.weight.requires_grad
    saved = get_peft_model_state_dict(model)
    assert saved and not any("malora_head" in name for name in saved)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_that_is_loaded_to_train_further_keeps_frozen_factors_frozen(low_cpu_mem_usage, llama, tmp_path):
    base = copy.deepcopy(llama)
    adapted(llama, "asylora", modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    for is_trainable in (False, True):
        model = PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path, is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage
        )
        trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
        assert trained == ({"malora_B", "default"} if is_trainable else set())  # lm_head.modules_to_save.default.weight
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    model.set_requires_grad("second", False)
    model.set_requires_grad("second", True)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"malora_B", "second"}
