"""The loss without logits of an optimized model, which needs no kernel."""

import pytest
import torch
from peft import get_peft_model

import malora
from tests.malora.backbone.architectures import make
from tests.malora.backbone.test_optimize import DEVICE, IDS, LABELS, adapted, check_equal, loss_and_gradients


def optimize(model):
    report = malora.optimize_backbone(model, rotary=False, activation=False, norm=False)
    assert report["loss"] == "1 module"


@pytest.mark.parametrize(
    "inputs",
    [
        {"num_items_in_batch": torch.tensor(7)},
        {"num_items_in_batch": 7},
        {"shift_labels": IDS.flip(0)},
        {"labels": LABELS.where(LABELS >= 0, -5), "ignore_index": -5},
        {"inputs_embeds": torch.ones(2, 6, 32, device=DEVICE), "input_ids": None},
    ],
    ids=lambda inputs: "-".join(inputs),
)
def test_arguments_of_the_models_loss(inputs):
    """The balance loss of the routers is added to it as to any other."""
    model = adapted()
    expected = loss_and_gradients(model, **inputs)
    optimize(model)
    outputs = model(**{"input_ids": IDS, "labels": LABELS, **inputs})
    assert outputs.logits is None and outputs.aux_loss > 0
    check_equal(loss_and_gradients(model, **inputs), expected)


def test_a_batch_without_labels_has_no_loss_as_before():
    model = adapted()
    optimize(model)
    assert model(input_ids=IDS, labels=torch.full_like(IDS, -100)).loss.isnan()


def test_tuples_are_returned_if_asked_for():
    model = adapted()
    optimize(model)
    loss = model(input_ids=IDS, labels=LABELS).loss
    torch.testing.assert_close(model(input_ids=IDS, labels=LABELS, return_dict=False)[0], loss)


def test_evaluation_and_passes_without_labels_have_logits():
    model = adapted()
    optimize(model)
    assert model(input_ids=IDS).logits.shape == (2, 6, 61)
    assert model.eval()(input_ids=IDS, labels=LABELS).logits.shape == (2, 6, 61)


def _train(model):
    model.get_base_model().lm_head.weight.requires_grad_()


def _listen(model):
    model.get_base_model().lm_head.register_forward_hook(lambda *_: None)


def _replace_loss(model):
    model.get_base_model().loss_function = lambda logits, labels, **_: logits.square().mean()


@pytest.mark.parametrize("change", [_train, _listen, _replace_loss])
def test_a_head_that_needs_its_logits_keeps_the_models_loss(change):
    model = adapted()
    optimize(model)
    change(model)
    assert model(input_ids=IDS, labels=LABELS).logits is not None
    got = loss_and_gradients(model)
    malora.restore_backbone(model)
    check_equal(got, loss_and_gradients(model))


def test_a_loss_that_the_model_replaced_before_is_left_alone():
    model = adapted()
    _replace_loss(model)
    assert malora.optimize_backbone(model, norm=False)["loss"].startswith("none")


def test_a_head_with_an_adapter_keeps_the_models_loss():
    base = make("Llama").to(DEVICE)
    optimize(base)  # before the adapter is there
    model = get_peft_model(base, malora.METHODS["malora"](target_modules=["lm_head", "q_proj"])).train()
    assert model(input_ids=IDS, labels=LABELS).logits is not None
