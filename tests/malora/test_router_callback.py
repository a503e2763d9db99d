"""Values of the routers in the logs of transformers.Trainer."""

import math

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import malora
from tests.conftest import make_model
from tests.malora.test_auxiliary_loss import even_routers


class Recorder(TrainerCallback):
    """Stands for a tracker, which Trainer calls before the callbacks of the user."""

    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append(dict(logs))


def trainer_of(model, tmp_path, callbacks, kind=Trainer, **options):
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, logging_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=2, **options,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in torch.arange(1, 57).view(8, 7)]
    return kind(model, arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks)


def adapted(method="malora", **options):
    torch.manual_seed(0)
    return get_peft_model(make_model(), malora.METHODS[method](**options))


def test_training_entries_have_the_values(tmp_path):
    trainer = trainer_of(even_routers(adapted()), tmp_path, [malora.RouterCallback()], learning_rate=0.0)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert entry["aux_loss"] == pytest.approx(1, abs=1e-5)
        assert entry["router_entropy"] == pytest.approx(math.log(8), abs=1e-5)
        # Equal probabilities: the first two experts get all tokens.
        assert entry["router_largest_share"] == pytest.approx(0.5)
        assert entry["router_unused_experts"] == 12 * 6
    assert not any("router_entropy" in entry for entry in trainer.state.log_history if "loss" not in entry)
    assert not trainer.model._forward_hooks


def test_the_values_are_those_of_the_statistics(tmp_path):
    model = adapted().train()
    callback = malora.RouterCallback()
    arguments = TrainingArguments(str(tmp_path), report_to=[])
    callback.on_train_begin(arguments, None, None, model=model)
    ids = torch.arange(1, 19).view(2, 9)
    losses = []
    for batch in (ids, ids.flip(1)):
        losses.append(model(batch, labels=batch).aux_loss.item())
    stats = list(malora.router_stats(model).values())
    with torch.no_grad():
        model(ids, labels=ids)  # a reference pass, as of DPO, does not count
    assert torch.stack(callback._values["aux_loss"]).tolist() == pytest.approx(losses)
    assert callback._values["router_entropy"][1].item() == pytest.approx(sum(s.entropy for s in stats) / 12)
    assert callback._values["router_largest_share"][1].item() == pytest.approx(sum(max(s.share) for s in stats) / 12)
    assert callback._values["router_unused_experts"][1].item() == sum(len(s.unused) for s in stats)


def test_trackers_get_them_if_the_callback_comes_first(tmp_path):
    tracker = Recorder()
    trainer = trainer_of(adapted(), tmp_path, [tracker])
    malora.RouterCallback().add_to(trainer)
    trainer.train()
    assert [("router_entropy" in entry) for entry in tracker.entries if "loss" in entry] == [True, True]


def test_evaluation_and_other_passes_without_gradients_do_not_count(tmp_path):
    class TwoPasses(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **more):
            loss, outputs = super().compute_loss(model, inputs, True, **more)
            with torch.no_grad(), model.disable_adapter():
                model(**inputs)
            return (loss, outputs) if return_outputs else loss

    logged = []
    for kind in (Trainer, TwoPasses):
        trainer = trainer_of(
            adapted(lora_dropout=0.0), tmp_path, [malora.RouterCallback()], kind, eval_strategy="steps", eval_steps=1
        )
        trainer.train()
        logged.append([(e["aux_loss"], e["router_entropy"]) for e in trainer.state.log_history if "loss" in e])
    assert logged[0] == logged[1] and len(logged[0]) == 2


def test_without_a_balance_loss_the_statistics_are_logged(tmp_path):
    trainer = trainer_of(adapted(router_aux_loss_coef=0), tmp_path, [malora.RouterCallback()])
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert "router_entropy" in entry and "aux_loss" not in entry


def test_a_model_without_router_is_an_error(tmp_path):
    trainer = trainer_of(adapted("asylora"), tmp_path, [malora.RouterCallback()])
    with pytest.raises(ValueError, match="no active adapter of the model has a router"):
        trainer.train()
