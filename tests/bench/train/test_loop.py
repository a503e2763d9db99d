"""The training loop: passes as CUDA graphs of few shapes, and the input dtype of PEFT's LoRA."""

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

import malora
from bench.runs.run import run
from bench.runs.setting import make_run_config
from bench.train.checkpoint import Checkpoint
from bench.train.fixed_shapes import MAX_WIDTHS
from bench.train.loop import keep_input_dtype
from tests.bench.conftest import make_setting
from tests.conftest import make_model
from tests.malora.backbone.fake_graphs import graphs  # noqa: F401  # a fixture


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for graphs on a CPU")
@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("mixture", ["intra", "inter"])
def test_batches_of_two_examples_take_few_graphs_and_train_the_same(
    mixture, base_folder, tmp_path, monkeypatch, request
):
    """Stand-ins for graphs run on the CPU. With written answers (inter) labels have many lengths."""

    def trained(folder):
        options = {"lora_dropout": 0.0, "backend": "dense"}
        setting = make_setting(base_folder, tmp_path / folder, max_items=2, max_steps=30, method_options=options)
        setting = replace(setting, mixture=mixture, profile=replace(setting.profile, batch_size=2))
        result = run(make_run_config(setting, "malora", seed=0, learning_rate=1e-2), setting)
        assert result.status == "ok", result.error
        return result.train

    plain = trained("plain")
    fakes = request.getfixturevalue("graphs")
    monkeypatch.setattr("bench.train.loop.can_capture", lambda model: True)
    monkeypatch.setattr("malora.optimize_backbone", lambda *arguments, **options: {})  # Triton's interpreter is slow
    monkeypatch.setattr("bench.train.fixed_shapes.PAD_TO_MULTIPLE", 8)  # generated texts are short
    monkeypatch.setattr("bench.train.fixed_shapes.MIN_TOKENS_OF_A_PASS", 8)
    captured = trained("captured")
    assert plain.captures is None and 1 < captured.captures == fakes.captures <= MAX_WIDTHS
    assert captured.steady_step_seconds > 0
    for name in ("loss", "balance_loss"):
        curves = [[getattr(point, name) for point in one.curve] for one in (captured, plain)]
        assert curves[0] == pytest.approx(curves[1], rel=1e-3)


@pytest.mark.parametrize("method, active", [("lora", True), ("dora", False), ("malora", False)])
def test_lora_computes_the_same_without_casting_its_inputs(method, active, ids):
    """Compare bitwise, under bfloat16 autocast.

    `keep_input_dtype` is told that the device is a GPU.
    """

    def computed(device: str):
        model = get_peft_model(make_model().bfloat16(), malora.METHODS[method](lora_dropout=0.0)).train()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(generator=torch.Generator().manual_seed(0))
        with keep_input_dtype(model, torch.device(device)), torch.autocast("cpu", torch.bfloat16):
            layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
            casts = [layer.cast_input_dtype_enabled for layer in layers]
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return casts, [loss, *(p.grad for p in model.parameters() if p.requires_grad)]

    (_, expected), (casts, got) = computed("cpu"), computed("cuda")
    assert all(enabled is not active for enabled in casts)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_slow_run_is_saved_by_time_too_and_learns_the_same(base_folder, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        Checkpoint, "save", lambda self, log, save=Checkpoint.save: (saved.append(log.steps), save(self, log))
    )

    def curve(folder):
        setting = make_setting(base_folder, tmp_path / folder, max_items=2, max_steps=23)
        setting = replace(setting, profile=replace(setting.profile, checkpoint_every=100))
        return run(make_run_config(setting, "malora", seed=0), setting).train.curve

    fast = curve("fast")
    assert saved == [23]
    monkeypatch.setattr("bench.train.loop.SECONDS_PER_CHECKPOINT", 0.0)
    assert curve("slow") == fast and saved == [23, 10, 20, 23]
