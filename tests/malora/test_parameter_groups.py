"""Learning rates of routers and up projections."""

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

import malora
from tests.conftest import make_model


def adapted(method="malora", **options):
    return get_peft_model(make_model(), malora.METHODS[method](**options))


def names_of(model, groups):
    by_id = {id(p): name.removesuffix(".weight") for name, p in model.named_parameters()}
    return {group["name"]: {by_id[id(p)].split(".")[-2] for p in group["params"]} for group in groups}


def rates(groups):
    return {group["name"]: group["lr"] for group in groups}


def test_routers_and_up_projections_have_rates_of_their_own():
    model = adapted()
    groups = malora.parameter_groups(model, 1e-3, router_lr=1e-2, lora_plus_ratio=16)
    assert rates(groups) == pytest.approx({"adapter": 1e-3, "up_projection": 1.6e-2, "router": 1e-2})
    assert names_of(model, groups) == {
        "adapter": {"malora_P", "malora_S"}, "up_projection": {"malora_B"}, "router": {"malora_router"}
    }  # fmt: skip
    assert set(rates(malora.parameter_groups(model, 1e-3)).values()) == {1e-3}


@pytest.mark.parametrize("method", malora.METHODS)
def test_every_trainable_parameter_is_in_one_group(method):
    model = adapted(method)
    found = [id(p) for group in malora.parameter_groups(model, 1e-3) for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_both_up_factors_of_a_subspace_are_up_projections():
    model = adapted("malora-decomposed-b")
    groups = malora.parameter_groups(model, 1e-3, lora_plus_ratio=4)
    assert names_of(model, groups)["up_projection"] == {"malora_Q", "malora_S_B"}


def test_lora_of_peft_and_other_trained_modules():
    model = adapted("lora", modules_to_save=["lm_head"])
    groups = malora.parameter_groups(model, 1e-3, lora_plus_ratio=16)
    assert rates(groups) == pytest.approx({"adapter": 1e-3, "up_projection": 1.6e-2})
    assert names_of(model, groups) == {"adapter": {"lora_A", "modules_to_save"}, "up_projection": {"lora_B"}}
    assert sum(len(group["params"]) for group in groups) == 2 * 12 + 1


def test_what_has_no_effect_is_an_error():
    with pytest.raises(ValueError, match=r"router_lr=0.1 has no effect"):
        malora.parameter_groups(adapted("asylora"), 1e-3, router_lr=0.1)
    with pytest.raises(ValueError, match=r"router_lr=0.1 has no effect"):
        malora.parameter_groups(adapted("malora", freeze=["router"]), 1e-3, router_lr=0.1)
    with pytest.raises(ValueError, match="lora_plus_ratio=2 has no effect"):
        malora.parameter_groups(make_model(), 1e-3, lora_plus_ratio=2)
    with pytest.raises(ValueError, match="lr=0 must be positive"):
        malora.parameter_groups(adapted(), 0)


@pytest.mark.parametrize("how", ["optimizers", "optimizer_cls_and_kwargs"])
def test_trainer_takes_them(how, tmp_path):
    model = adapted()
    groups = malora.parameter_groups(model, 1e-3, router_lr=1e-2)
    made = (
        {"optimizers": (torch.optim.AdamW(groups), None)}
        if how == "optimizers"
        else {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups, "weight_decay": 0.0})}
    )
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no", lr_scheduler_type="constant",
        disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in torch.arange(1, 17).view(2, 8)]
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = Trainer(model, arguments, train_dataset=data, **made)
    trainer.train()
    assert rates(trainer.optimizer.param_groups) == {"adapter": 1e-3, "up_projection": 1e-3, "router": 1e-2}
    moved = {
        name: (p - before[name]).abs().max().item() for name, p in trainer.model.named_parameters() if name in before
    }
    # The first step of Adam moves each parameter by its learning rate.
    assert max(step for name, step in moved.items() if "router" in name) == pytest.approx(1e-2, rel=0.05)
    assert max(step for name, step in moved.items() if "malora_B" in name) == pytest.approx(1e-3, rel=0.05)
