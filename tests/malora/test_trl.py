"""TRL computes losses of its own, from `outputs.aux_loss` or without it."""

import pytest
import torch
from peft import get_peft_model

import malora
from tests.conftest import make_model
from tests.malora.test_auxiliary_loss import even_routers

trl = pytest.importorskip("trl", reason="needs trl")
datasets = pytest.importorskip("datasets")

WEIGHT = 0.5


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(61)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1", unk_token="0")


def options(tmp_path, accumulation):
    return {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 8 // accumulation, "use_cpu": True,
        "gradient_accumulation_steps": accumulation, "max_steps": 1, "logging_steps": 1, "report_to": [],
        "learning_rate": 0.0, "save_strategy": "no", "disable_tqdm": True, "bf16": False, "max_length": 32,
    }  # fmt: skip


def adapted(weight, method="malora"):
    torch.manual_seed(0)
    config = malora.METHODS[method](
        lora_dropout=0.0, **({} if method == "asylora" else {"router_aux_loss_coef": weight})
    )
    return even_routers(get_peft_model(make_model(), config))


def logged(trainer):
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


def sft(model, tmp_path, accumulation=1, **more):
    rows = [{"input_ids": list(range(2, 2 + 4 + i)), "labels": list(range(2, 2 + 4 + i))} for i in range(8)]
    arguments = trl.SFTConfig(**options(tmp_path, accumulation) | more)
    return trl.SFTTrainer(
        model, arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer()
    )


def dpo(model, tmp_path, accumulation=1, **more):
    rows = [{"prompt": "3 4 5", "chosen": f" 6 {7 + i}", "rejected": f" 8 {20 + i} 9"} for i in range(8)]
    arguments = trl.DPOConfig(**options(tmp_path, accumulation) | more)
    return trl.DPOTrainer(
        model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer()
    )


@pytest.mark.parametrize("make", [sft, dpo])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_balance_loss_has_its_weight(make, accumulation, tmp_path):
    """The routers are even, so the balance loss is 1 and the loss grows by its weight."""
    entry = logged(make(adapted(WEIGHT), tmp_path, accumulation))
    without = logged(make(adapted(0), tmp_path, accumulation))
    assert entry["loss"] - without["loss"] == pytest.approx(WEIGHT, abs=1e-4)
    assert entry["aux_loss"] == pytest.approx(1, abs=1e-5) and "aux_loss" not in without


@pytest.mark.parametrize("make", [sft, dpo])
def test_the_routers_are_trained(make, tmp_path):
    model = adapted(WEIGHT)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "malora_router" in name:
                p.normal_(generator=torch.Generator().manual_seed(0))
    before = {name: p.clone() for name, p in model.named_parameters() if "malora_router" in name}
    trainer = make(model, tmp_path, learning_rate=1e-3)
    trainer.train()
    moved = [not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before]
    assert len(moved) == 12 and all(moved)


@pytest.mark.parametrize("make", [sft, dpo])
def test_trl_can_choose_another_weight_or_none(make, tmp_path):
    entries = [logged(make(adapted(WEIGHT), tmp_path, 2, router_aux_loss_coef=weight)) for weight in (0.0, 0.25)]
    assert entries[1]["loss"] - entries[0]["loss"] == pytest.approx(0.25, abs=1e-4)


@pytest.mark.parametrize("make", [sft, dpo])
def test_a_method_without_router_has_none(make, tmp_path):
    assert "aux_loss" not in logged(make(adapted(0, "asylora"), tmp_path))


def test_labels_in_an_evaluation(tmp_path):
    model = adapted(WEIGHT)
    trainer = sft(model, tmp_path)
    trainer.eval_dataset = trainer.train_dataset
    assert trainer.evaluate()["eval_loss"] > 0
