"""The balance loss in a model's outputs: its weight is the same in every loop, and it is reported."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import malora
from malora import auxiliary_loss
from malora.config import MaloraConfig
from tests.conftest import make_model

WEIGHT = 0.5


def adapted(method="malora", weight=WEIGHT, **options):
    torch.manual_seed(0)
    config = malora.METHODS[method](lora_dropout=0.0, router_aux_loss_coef=weight, **options)
    return randomize(get_peft_model(make_model(), config).train())


def randomize(model):
    """Give the factors values, so that all of them have gradients."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "malora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def even_routers(model):
    """Make all experts equally probable, so that the balance loss of every batch is 1."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "malora_router" in name:
                p.zero_()
    return model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model, expected):
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_methods_with_a_router_have_the_papers_weight():
    for name in malora.METHODS:
        config = malora.METHODS[name]()
        if isinstance(config, MaloraConfig):
            assert config.router_aux_loss_coef == (0.01 if config.has_router else 0.0), name
    assert MaloraConfig(down="A_t").router_aux_loss_coef == 0  # as configs that were saved without it
    assert malora.METHODS["molora"](num_experts=1, top_k=1).router_aux_loss_coef == 0


def test_a_weight_without_effect_is_an_error():
    with pytest.raises(ValueError, match="no effect with one expert"):
        malora.METHODS["asylora"](router_aux_loss_coef=0.01)
    with pytest.raises(ValueError, match="no effect with one expert"):
        malora.METHODS["molora"](num_experts=1, top_k=1, router_aux_loss_coef=0.01)
    for value in (-0.1, "much", None):
        with pytest.raises(ValueError, match="must be a number, at least 0"):
            malora.METHODS["molora"](router_aux_loss_coef=value)


def test_the_loss_has_the_balance_loss_in_it(ids):
    plain = adapted(weight=0)
    loss = plain(ids, labels=ids).loss
    balance = malora.balance_loss(plain)
    (loss + WEIGHT * balance).backward()
    model = adapted()
    outputs = model(ids, labels=ids)
    torch.testing.assert_close(outputs.aux_loss, balance)
    torch.testing.assert_close(outputs.loss, loss + WEIGHT * balance)
    outputs.loss.backward()
    assert_same_gradients(model, gradients(plain))


def test_padding_does_not_count(ids):
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    model = adapted()
    found = model(ids, attention_mask=mask, labels=ids).aux_loss
    torch.testing.assert_close(found, malora.balance_loss(model, mask))
    assert found != malora.balance_loss(model, torch.ones_like(mask))


def test_outputs_keep_their_class_and_order(ids):
    model, plain = adapted(), make_model()(ids, labels=ids)
    outputs = model(ids, labels=ids)
    assert isinstance(outputs, type(plain))
    assert list(outputs) == [*plain, "aux_loss"] and outputs[1] is outputs.logits
    leaves, structure = tree_flatten(outputs)  # as DistributedDataParallel and torch.compile do
    assert tree_unflatten(leaves, structure).aux_loss is outputs.aux_loss
    model.eval()
    with torch.no_grad():
        outputs = model(ids, labels=ids)
    for again in (copy.deepcopy(outputs), pickle.loads(pickle.dumps(outputs))):
        assert type(again) is type(outputs) and again.aux_loss == outputs.aux_loss


def test_a_tuple_has_the_loss_in_it(ids):
    model = adapted()
    expected = model(ids, labels=ids)
    found = model(ids, labels=ids, return_dict=False)
    torch.testing.assert_close(found[0], expected.loss)
    assert found[1].shape == expected.logits.shape
    assert model(ids, return_dict=False)[0].shape == expected.logits.shape


def test_without_labels_it_is_reported(ids):
    model = adapted()
    outputs = model(ids)
    assert outputs.loss is None
    torch.testing.assert_close(outputs.aux_loss, malora.balance_loss(model))
    outputs.aux_loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "malora_router" in name)


def test_evaluation_has_it_as_training_has(ids):
    """The mixtures of experts of transformers add it in evaluation, too."""
    model = adapted()
    expected = model(ids, labels=ids)
    model.eval()
    with torch.no_grad():
        outputs = model(ids, labels=ids)
        torch.testing.assert_close(outputs.loss, expected.loss)
        torch.testing.assert_close(outputs.aux_loss, expected.aux_loss)
        assert "aux_loss" not in model(ids)
        torch.testing.assert_close(model(ids, output_router_logits=True).aux_loss, expected.aux_loss)


def test_a_call_can_switch_it_off(ids):
    model, plain = adapted(), adapted(weight=0)
    outputs = model(ids, labels=ids, output_router_logits=False)
    assert "aux_loss" not in outputs
    torch.testing.assert_close(outputs.loss, plain(ids, labels=ids).loss)
    assert "aux_loss" not in plain(ids, labels=ids)


def test_it_is_zero_if_it_is_asked_for_and_nothing_is_routed(ids):
    """TRL asks for it if the model has a router, also while another adapter is active."""
    model = adapted()
    model.add_adapter("second", malora.METHODS["asylora"](lora_dropout=0.0))
    model.set_adapter("second")
    outputs = model(ids, labels=ids, output_router_logits=True)
    assert outputs.aux_loss == 0
    torch.testing.assert_close(outputs.loss, model(ids, labels=ids).loss)


def test_generation_does_not_compute_it(ids, monkeypatch):
    model = adapted()
    monkeypatch.setattr(auxiliary_loss, "balance_loss_by_adapter", None)
    model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_disabled_adapters_have_none(ids):
    model = adapted()
    expected = make_model()(ids, labels=ids).loss
    with model.disable_adapter():
        outputs = model(ids, labels=ids)
    assert "aux_loss" not in outputs
    torch.testing.assert_close(outputs.loss, expected)
    assert model(ids, labels=ids).aux_loss > 0


def test_active_adapters_add_up_with_their_own_weights(ids):
    model = adapted()
    model.add_adapter("second", malora.METHODS["molora"](lora_dropout=0.0, router_aux_loss_coef=0.25))
    model.add_adapter("third", malora.METHODS["molora"](lora_dropout=0.0, router_aux_loss_coef=0.0))
    model.base_model.set_adapter(["default", "second", "third"])
    outputs = model(ids, labels=ids)
    balance = auxiliary_loss.balance_loss_by_adapter(model.base_model.malora_layers, ["default", "second", "none"])
    assert list(balance) == ["default", "second"]
    torch.testing.assert_close(outputs.aux_loss, balance["default"] + balance["second"])
    off = model(ids, labels=ids, output_router_logits=False).loss
    torch.testing.assert_close(outputs.loss, off + WEIGHT * balance["default"] + 0.25 * balance["second"])


def test_every_wrapper_has_it(ids):
    expected = adapted()(ids, labels=ids)
    torch.manual_seed(0)
    config = malora.METHODS["malora"](lora_dropout=0.0, router_aux_loss_coef=WEIGHT)
    injected = randomize(inject_adapter_in_model(config, make_model()).train())
    for model in (adapted(task_type=None), injected, adapted().base_model, adapted().get_base_model()):
        outputs = model(input_ids=ids, labels=ids)
        torch.testing.assert_close(outputs.loss, expected.loss)
        torch.testing.assert_close(outputs.aux_loss, expected.aux_loss)


def test_a_saved_adapter_keeps_its_weight(ids, tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_model(), tmp_path)
    model.eval()
    torch.testing.assert_close(again(ids, labels=ids).loss, model(ids, labels=ids).loss)
    again.train()(ids, labels=ids)  # nothing is trained, and a loss without gradient is no error


@pytest.mark.parametrize("how", [{"use_reentrant": False}, {"use_reentrant": True}], ids=["new", "reentrant"])
@pytest.mark.parametrize("backend", ["dense", "fused"])
def test_gradient_checkpointing_changes_no_gradient(ids, how, backend):
    # Two checkpointed layers with a group of two each: kernels are interpreted, so fewer experts and layers are faster.
    options = {"backend": backend, "num_experts": 4, "target_modules": ["q_proj", "v_proj"]}
    model = adapted(**options)
    for batch in (ids, ids.flip(0)):
        model(batch, labels=batch).loss.backward()
    expected = gradients(model)
    model = adapted(**options)
    model.get_base_model().gradient_checkpointing_enable(how)
    model.enable_input_require_grads()
    first = model(ids, labels=ids, use_cache=False).loss  # two passes, then two backward passes
    second = model(ids.flip(0), labels=ids.flip(0), use_cache=False).loss
    first.backward()
    second.backward()
    assert_same_gradients(model, expected)


def test_two_passes_in_one_loss_with_reentrant_checkpointing(ids):
    model = adapted()
    (model(ids, labels=ids).loss + model(ids.flip(1), labels=ids).loss).backward()
    expected = gradients(model)
    model = adapted()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    (model(ids, labels=ids, use_cache=False).loss + model(ids.flip(1), labels=ids, use_cache=False).loss).backward()
    assert_same_gradients(model, expected)
    model.zero_grad()
    model(ids, use_cache=False).logits.sum().backward()  # a loss without it
    plain = adapted(weight=0)
    plain(ids).logits.sum().backward()
    assert_same_gradients(model, gradients(plain))


def train(model, tmp_path, accumulation, labels, **arguments):
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
        max_steps=1, logging_steps=1, report_to=[], use_cpu=True, learning_rate=0.0, save_strategy="no",
        disable_tqdm=True, **arguments,
    )  # fmt: skip
    data = [
        {"input_ids": row, "labels": label} for row, label in zip(torch.arange(1, 57).view(8, 7), labels, strict=True)
    ]
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_accumulation_does_not_change_its_weight(tmp_path, accumulation):
    """The balance loss is 1 in each pass here, so the loss grows by its weight."""
    labels = torch.arange(1, 57).view(8, 7)
    for row in range(8):
        labels[row, : row % 6] = -100  # unequal numbers of labels
    with_balance, without = (
        train(even_routers(adapted(weight=weight)), tmp_path, accumulation, labels) for weight in (WEIGHT, 0)
    )
    assert with_balance - without == pytest.approx(WEIGHT, abs=1e-4)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_accumulation_of_a_classifier_does_not_change_its_weight(tmp_path, accumulation):
    losses = []
    for weight in (WEIGHT, 0):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=61,
            pad_token_id=0,
        )
        method = malora.METHODS["molora"](task_type="SEQ_CLS", router_aux_loss_coef=weight, lora_dropout=0.0)
        model = even_routers(get_peft_model(LlamaForSequenceClassification(config), method))
        losses.append(train(model, tmp_path, accumulation, torch.tensor([0, 1] * 4)))
    assert losses[0] - losses[1] == pytest.approx(WEIGHT, abs=1e-4)


def test_shifted_labels_count_as_the_model_counts_them(ids):
    model = even_routers(adapted())
    labels = torch.full_like(ids, -100)
    labels[0, :3] = 5
    options = {"num_items_in_batch": torch.tensor(10), "labels": labels}
    off = model(ids, output_router_logits=False, **options).loss
    torch.testing.assert_close(model(ids, **options).loss - off, torch.tensor(WEIGHT * 2 / 10))
    torch.testing.assert_close(
        model(ids, shift_labels=labels, **options).loss
        - model(ids, output_router_logits=False, shift_labels=labels, **options).loss,
        torch.tensor(WEIGHT * 3 / 10),
    )


def test_a_base_model_with_experts_of_its_own(ids):
    torch.manual_seed(0)
    base = MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=61, num_local_experts=4, router_aux_loss_coef=0.1,
        )
    )  # fmt: skip
    options = {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
    model = get_peft_model(base, malora.METHODS["molora"](router_aux_loss_coef=WEIGHT, **options)).eval()
    off = base.config.output_router_logits
    outputs = model(ids, labels=ids, output_router_logits=True)
    ours = malora.balance_loss(model)
    with model.disable_adapter():  # the factors B are zero, so the base model computes the same
        own = model(ids, labels=ids, output_router_logits=True)
    torch.testing.assert_close(outputs.aux_loss, own.aux_loss + ours)
    torch.testing.assert_close(outputs.loss, own.loss + WEIGHT * ours)
    assert base.config.router_aux_loss_coef == 0.1 and base.config.output_router_logits == off


def test_an_encoder_and_a_decoder_have_a_mask_each():
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2, vocab_size=61, decoder_start_token_id=0)
    )
    method = malora.METHODS["molora"](
        task_type="SEQ_2_SEQ_LM", target_modules=["q", "k", "v"], lora_dropout=0.0, router_aux_loss_coef=WEIGHT
    )
    model = get_peft_model(base, method).eval()
    source, target = torch.arange(1, 11).view(2, 5), torch.arange(1, 7).view(2, 3)
    expected = model(input_ids=source, labels=target)
    mask = torch.tensor([[1] * 5 + [0] * 2] * 2)
    padded = torch.cat([source, torch.zeros(2, 2, dtype=torch.long)], 1)
    found = model(input_ids=padded, attention_mask=mask, labels=target)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    torch.testing.assert_close(found.loss, expected.loss)


def test_the_config_of_the_base_model_tells_of_it():
    """TRL reads the fields that the mixtures of experts of transformers have."""
    model = adapted()
    assert model.config.router_aux_loss_coef == WEIGHT and model.config.output_router_logits is False
    base = model.unload()
    assert not hasattr(base.config, "router_aux_loss_coef") and not hasattr(base.config, "output_router_logits")
    assert not hasattr(adapted("malora", weight=0).config, "router_aux_loss_coef")
