"""The loop against plain computations of the same, and what happens when a run is cut off or goes wrong."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

import bench.runs.pool
import bench.runs.run
import malora
from bench.experiments.methods import BASE
from bench.records import store
from bench.runs.pool import run_all
from bench.runs.run import run
from bench.runs.setting import make_run_config
from bench.train.batching import Encoded, collate
from bench.train.loop import keep_input_dtype
from bench.train.step import EagerStep, GraphedStep
from malora.backbone.liger import LigerKernels
from tests.bench.conftest import make_setting
from tests.conftest import SHAPES, make_model


@pytest.fixture(autouse=True)
def a_precision_of_its_own():
    """A process's accelerators share the first one's, which is bfloat16 of a run on a GPU."""
    yield
    AcceleratorState._reset_state()


ENCODED = [Encoded([7, 3, 9, 11, 2, 5], 2), Encoded([4, 8, 1], 1), Encoded([6, 6, 2, 3], 1)]


def step(shape="llama", max_tokens=10_000, method="malora", fixed_shapes=False, balance=0.0, row=512, encoded=ENCODED):
    torch.manual_seed(0)
    targets = malora.TARGET_MODULES[shape]
    model = get_peft_model(make_model(shape), malora.METHODS[method](lora_dropout=0.0, target_modules=targets)).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "malora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(1), std=0.1)
    accelerator = Accelerator()
    parts = collate(encoded, 0, row=row, max_tokens=max_tokens, fixed_shapes=fixed_shapes)
    losses = EagerStep(model, model, accelerator, balance_factor=balance)(parts)
    return model, losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_head_on_label_positions_only_gives_the_whole_heads_loss(shape):
    model, (loss, _), gradients = step(shape)
    model.zero_grad()
    labels = torch.tensor(
        [[-100, -100, -100, -100, 2, 5], [-100, -100, 1, -100, -100, -100], [-100] * 3 + [3, -100, -100]]
    )
    ids = torch.tensor([[7, 3, 9, 11, 2, 5], [4, 8, 1, 0, 0, 0], [6, 6, 2, 3, 0, 0]])
    logits = model(input_ids=ids).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    expected.backward()
    for name, p in model.named_parameters():
        if p.requires_grad and "router" not in name:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_a_batch_in_parts_is_the_same_batch():
    _, whole, gradients = step(max_tokens=10_000)
    _, parts, added = step(row=6, max_tokens=6)  # a row a part
    torch.testing.assert_close(whole[0], parts[0], rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(added[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("encoded", [ENCODED, [Encoded([7, 3, 9, 11, 2, 5], 2)] * 5])
def test_padding_of_labels_and_rows_changes_nothing(encoded):
    """Of five rows a sixth is made, of padding alone."""
    _, plain, gradients = step(balance=0.1, row=6, encoded=encoded)
    _, padded, of_padded = step(balance=0.1, row=6, encoded=encoded, fixed_shapes=True)
    torch.testing.assert_close(torch.stack(padded), torch.stack(plain), rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(of_padded[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("method", ["lora", "malora"])
def test_a_killed_run_ends_bitwise_where_the_unbroken_one_does(method, base_folder, tmp_path, monkeypatch):
    """Killed at step 8, after the checkpoint at step 5; dropout is on, so the generator's state is tested too."""

    def adapter(folder):
        setting = make_setting(base_folder, tmp_path / folder, save=tmp_path / folder / "adapter")
        result = run(make_run_config(setting, method, seed=0, learning_rate=1e-2), setting)
        assert result.status == "ok", result.error
        return (tmp_path / folder / "adapter" / "adapter_model.safetensors").read_bytes(), result

    unbroken, expected = adapter("unbroken")
    with monkeypatch.context() as patched:
        calls = iter(range(100))

        def dying(self, parts, original=EagerStep.__call__):
            if next(calls) == 8:
                raise KilledError
            return original(self, parts)

        patched.setattr(EagerStep, "__call__", dying)
        with pytest.raises(KilledError):
            adapter("killed")
    assert list((tmp_path / "killed" / "checkpoints").glob("*.pt")) and not (tmp_path / "killed" / "runs").exists()
    resumed, result = adapter("killed")
    assert resumed == unbroken
    assert result.train.curve == expected.train.curve and result.items == expected.items
    assert not list((tmp_path / "killed" / "checkpoints").glob("*.pt"))


def test_a_run_that_is_recorded_is_not_run_again(setting, monkeypatch):
    config = make_run_config(setting, "lora", seed=0)
    first = run(config, setting)
    monkeypatch.setattr(bench.runs.run, "train", lambda *a, **k: pytest.fail("trained again"))
    assert run(config, setting).items == first.items


def test_a_loss_that_is_not_finite_is_recorded_as_diverged(setting, monkeypatch):
    calls = iter(range(100))

    def exploding(self, parts, original=EagerStep.__call__):
        loss, balance = original(self, parts)
        return (loss * float("nan") if next(calls) >= 12 else loss), balance

    monkeypatch.setattr(EagerStep, "__call__", exploding)
    result = run(make_run_config(setting, "malora", seed=0), setting)
    assert result.status == "diverged" and "step 15" in result.error  # the 13th is read at the checkpoint
    written = json.loads(result.path.read_text())
    assert written["train"]["steps"] == 15 and written["train"]["curve"][-1]["loss"] is None and written["test"] is None
    assert written["train"]["curve"][0]["loss"] > 0


def test_a_run_that_breaks_is_recorded_as_failed_and_made_again(setting, monkeypatch):
    config = make_run_config(setting, "lora", seed=0)
    with monkeypatch.context() as patched:
        patched.setattr(bench.runs.run, "score", lambda *a, **k: 1 / 0)
        broken = run(config, setting)
    assert broken.status == "failed" and "ZeroDivisionError" in broken.error
    assert store.read_all(setting.results) == []
    assert run(config, setting).status == "ok"


def test_out_of_memory_is_recorded_as_such(setting, monkeypatch):
    def greedy(*args, **kwargs):
        raise torch.OutOfMemoryError("60 GiB wanted")

    monkeypatch.setattr(bench.runs.run, "train", greedy)
    assert run(make_run_config(setting, "lora", seed=0), setting).status == "oom"


def test_what_finds_no_memory_beside_other_runs_is_made_again_alone(setting, monkeypatch):
    beside, trained = [], bench.runs.run.train

    def crowded(*args, **kwargs):
        if len(beside) < 2:
            beside.append(args)
            raise torch.OutOfMemoryError("60 GiB wanted")
        return trained(*args, **kwargs)

    # Threads, because a patch does not reach other processes.
    monkeypatch.setattr(bench.runs.pool, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(bench.runs.run, "train", crowded)
    runs = [(make_run_config(setting, method, seed=0), setting) for method in ("lora", "asylora", "malora")]
    made = list(run_all(runs, jobs=2))
    assert [(one.config.method, one.status) for one in made] == [("malora", "ok"), ("lora", "ok"), ("asylora", "ok")]
    assert [one.provenance.concurrent_runs for one in made] == [2, 1, 1]


@pytest.mark.parametrize("method", ["lora", "malora"])
def test_training_lowers_the_loss_and_says_what_it_did(method, setting):
    result = run(make_run_config(setting, method, seed=0, learning_rate=1e-2), setting)
    curve = [point.loss for point in result.train.curve]
    assert curve[-1] < curve[0] - 0.1
    given = result.data.train.values()
    assert result.train.steps == -(-sum(task.examples for task in given) // 8)
    assert result.train.tokens == sum(task.tokens for task in given)
    passes = {"forward_backward"} if torch.cuda.is_available() else {"forward", "backward"}  # there they are one graph
    assert set(result.train.seconds) == {"data", *passes, "optimizer", "evaluation"}
    assert all(seconds > 0 for seconds in result.train.seconds.values())
    assert result.parameters.trainable > 0 and result.parameters.adapter_bytes == 4 * result.parameters.trainable


def test_the_base_is_scored_and_not_trained(setting):
    result = run(make_run_config(setting, BASE, 0), setting)
    assert result.train is None and result.validation is None and set(result.test) == set(result.items)


def test_a_limit_on_steps_ends_a_run(base_folder, tmp_path):
    setting = make_setting(base_folder, tmp_path, max_steps=3, max_items=4)
    result = run(make_run_config(setting, "lora", seed=0), setting)
    assert result.train.steps == 3 and {len(v) for v in result.items.values()} == {4} and not result.complete


def test_seeds_change_the_run_and_the_same_seed_repeats_it(base_folder, tmp_path):
    def curve(folder, seed):
        setting = make_setting(base_folder, tmp_path / folder, max_steps=10, max_items=2)
        return run(make_run_config(setting, "malora", seed), setting).train.curve

    assert curve("a", 0) == curve("b", 0) != curve("c", 1)


@pytest.mark.parametrize("method, active", [("lora", True), ("dora", False), ("malora", False)])
def test_lora_reads_inputs_as_they_come_and_computes_the_same(method, active, ids):
    """Under bfloat16 autocast, to the bit; it is entered as if for a GPU."""

    def computed(device: str):
        model = get_peft_model(make_model().bfloat16(), malora.METHODS[method](lora_dropout=0.0)).train()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(generator=torch.Generator().manual_seed(0))
        with keep_input_dtype(model, torch.device(device)), torch.autocast("cpu", torch.bfloat16):
            layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
            reads = [layer.cast_input_dtype_enabled for layer in layers]
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return reads, [loss, *(p.grad for p in model.parameters() if p.requires_grad)]

    (_, expected), (reads, got) = computed("cpu"), computed("cuda")
    assert all(enabled is not active for enabled in reads)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["lora", "malora"])
def test_a_captured_step_is_the_plain_step(method):
    """Batches of two shapes, so that a replay follows another shape's, one in parts, and one of longer labels."""

    def trained(captured: bool):
        torch.manual_seed(0)
        model = get_peft_model(make_model(), malora.METHODS[method](lora_dropout=0.0)).cuda().train()
        kernels = LigerKernels(model.get_base_model()) if captured else None
        step = EagerStep(model, model, Accelerator(), balance_factor=0.01, kernels=kernels)
        if captured:
            step = GraphedStep(step)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for width, max_tokens, label in ((5, 10_000, 1), (20, 10_000, 1), (5, 10_000, 1), (20, 32, 1), (20, 32, 7)):
            generator = torch.Generator().manual_seed(width)
            batch = [Encoded(torch.randint(1, 60, (width,), generator=generator).tolist(), label) for _ in range(4)]
            parts = [
                part.to(torch.device("cuda"))
                for part in collate(batch, 0, row=32, max_tokens=max_tokens, fixed_shapes=True)
            ]
            losses.append(torch.stack(step(parts)).tolist())
            optimizer.step()
            optimizer.zero_grad()
        return losses, {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}

    (plain, expected), (replayed, got) = trained(False), trained(True)
    assert torch.tensor(replayed).allclose(torch.tensor(plain), rtol=1e-4, atol=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["lora", "malora"])
def test_every_replay_draws_dropout_anew(method):
    torch.manual_seed(0)
    model = get_peft_model(make_model(), malora.METHODS[method](lora_dropout=0.5)).cuda().train()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.3)
    step = GraphedStep(EagerStep(model, model, Accelerator(), balance_factor=0.0, kernels=None))
    batch = [Encoded(list(range(1, 9)), 1)] * 4
    parts = [part.to(torch.device("cuda")) for part in collate(batch, 0, fixed_shapes=True)]
    losses = [torch.stack(step(parts))[0].item() for _ in range(5)]
    assert len(set(losses)) == 5
