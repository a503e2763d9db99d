"""Trainers with captured steps train as without."""

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

import malora
from tests.conftest import make_model
from tests.malora.backbone.fake_graphs import graphs  # noqa: F401  # a fixture

ON_GPU = torch.cuda.is_available()
WEIGHT = 0.5


class CapturedTrainer(malora.CaptureMixin, Trainer):
    pass


def adapted():
    torch.manual_seed(0)
    config = malora.METHODS["malora"](lora_dropout=0.0, router_aux_loss_coef=WEIGHT)
    model = get_peft_model(make_model(), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "malora_B" in name or "malora_router" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return model


def rows(lengths=(7, 7, 7, 7, 9, 7, 7, 7, 7, 7)):
    """Rows of two lengths. Without padding each is a micro-batch of its own."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 61, (n,), generator=draw).tolist() for n in lengths]
    return [{"input_ids": row, "labels": row} for row in ids]


OPTIONS = {
    "max_steps": 4, "logging_steps": 1, "report_to": [], "use_cpu": not ON_GPU, "save_strategy": "no",
    "disable_tqdm": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 0.1,
    "per_device_eval_batch_size": 1, "bf16": False, "optim": "sgd",  # AdamW makes rounding errors large
}  # fmt: skip


def trained(kind, tmp_path, **options):
    """Return the logged losses, the trained weights and the trainer."""
    model = adapted()
    arguments = TrainingArguments(str(tmp_path), **OPTIONS | options)
    data = [{name: torch.tensor(row) for name, row in one.items()} for one in rows()]
    callbacks = [malora.RouterCallback()]
    trainer = kind(model, arguments, train_dataset=data, eval_dataset=data[:2], callbacks=callbacks)
    return outcome(trainer, model)


def outcome(trainer, model):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}, trainer


def assert_same(got, expected):
    assert len(got[0]) == 4 and got[0] == pytest.approx(expected[0], rel=1e-4)
    for name, value in expected[1].items():
        torch.testing.assert_close(got[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_a_trainer_trains_the_same(tmp_path):
    """On a GPU by replays in all but the first steps."""
    got, expected = trained(CapturedTrainer, tmp_path), trained(Trainer, tmp_path)
    assert_same(got, expected)
    for name in ("aux_loss", "router_entropy"):  # of passes in which no hook runs, too
        assert logged(got[2], name) == pytest.approx(logged(expected[2], name), rel=1e-4)


@pytest.mark.skipif(ON_GPU, reason="on a GPU the graphs are real")
def test_a_trainer_with_replays_trains_the_same(tmp_path, graphs):  # noqa: F811
    got = trained(CapturedTrainer, tmp_path, eval_strategy="steps", eval_steps=2)
    expected = trained(Trainer, tmp_path)
    assert_same(got, expected)
    assert graphs.captures == 1  # evaluation is no reason to capture anew
    entropy, of_plain = (logged(one[2], "router_entropy") for one in (got, expected))
    assert entropy == pytest.approx(of_plain, rel=1e-4)


def sft(kind, tmp_path, **options):
    trl = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets")
    from tests.malora.test_trl import tokenizer

    model = adapted()
    options |= {"gradient_checkpointing": False, "pad_to_multiple_of": 16}
    arguments = trl.SFTConfig(output_dir=str(tmp_path), max_length=32, **OPTIONS | options)
    bases = (malora.CaptureMixin, trl.SFTTrainer) if kind == "captured" else (trl.SFTTrainer,)
    trainer = type("SFT", bases, {})(
        model, arguments, train_dataset=datasets.Dataset.from_list(rows()), processing_class=tokenizer()
    )
    return outcome(trainer, model)


@pytest.mark.parametrize("options", [{}, {"router_aux_loss_coef": 0.1}])
def test_trl_trains_the_same(options, tmp_path, request):
    """Also by the loss that replaces TRL's in captured passes."""
    if not ON_GPU:
        request.getfixturevalue("graphs")
    got, expected = sft("captured", tmp_path, **options), sft("plain", tmp_path, **options)
    assert_same(got, expected)
    assert logged(expected[2], "entropy") and not logged(got[2], "entropy")


def test_other_losses_of_trl_are_not_captured(tmp_path, request):
    if not ON_GPU:
        request.getfixturevalue("graphs")
    got, expected = (sft(kind, tmp_path, loss_type="dft") for kind in ("captured", "plain"))
    assert_same(got, expected)
    assert len(logged(got[2], "entropy")) == 4
