"""A captured step does what a plain loop does, and notices when it cannot."""

import logging

import pytest
import torch
from peft import get_peft_model
from torch import nn

import malora
from malora.backbone.model_state import why_not_captured
from malora.fused.availability import interprets_triton
from tests.conftest import make_model
from tests.malora.backbone.fake_graphs import graphs  # noqa: F401  # a fixture

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
on_cpu = pytest.mark.skipif(ON_GPU, reason="on a GPU the graphs are real")
needs_interpreter = pytest.mark.skipif(not interprets_triton(), reason="a GPU's Triton does not run on a CPU")


def adapted(method="malora", dropout=0.0, **options):
    """Return a model in training whose up projections are not zero."""
    torch.manual_seed(0)
    model = get_peft_model(make_model(), malora.METHODS[method](lora_dropout=dropout, **options)).to(DEVICE).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "malora_B" in name or "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return model


def batch(length=6, seed=0):
    ids = torch.randint(1, 61, (2, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def steps_of(lengths=((6, 6), (9, 6), (6, 9), (9,), (6, 6, 6))):
    """Return the micro-batches of several optimizer steps, of two shapes."""
    return [[batch(n, 10 * i + j) for j, n in enumerate(step)] for i, step in enumerate(lengths)]


def train(model, run_step, steps=None):
    """Return losses, gradients of the last step, and weights."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for micro_batches in steps or steps_of():
        optimizer.zero_grad()
        losses += [loss.item() for loss in run_step(micro_batches)]
        optimizer.step()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return losses, {n: p.grad.clone() for n, p in named.items()}, {n: p.detach().clone() for n, p in named.items()}


def plain(model, scale=1.0):
    def run_step(micro_batches):
        for micro_batch in micro_batches:
            moved = {name: tensor.to(DEVICE) for name, tensor in micro_batch.items()}
            loss = model(**moved).loss
            (loss * scale).backward()
            yield loss

    return run_step


def assert_same(got, expected):
    torch.testing.assert_close(torch.tensor(got[0]), torch.tensor(expected[0]), rtol=1e-4, atol=1e-5)
    for which in (1, 2):
        for name, value in expected[which].items():
            torch.testing.assert_close(got[which][name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", ["lora", "malora"])
def test_a_step_trains_as_a_plain_loop(method):
    """On a GPU the later micro-batches are replays, of two graphs in turn."""
    model = adapted(method)
    step = malora.capture_step(model)
    assert_same(train(model, lambda batches: step(batches, scale=0.5)), train(m := adapted(method), plain(m, 0.5)))
    assert step.replayed is ON_GPU and (step.reason is None) is ON_GPU


@on_cpu
@pytest.mark.parametrize("backend", ["dense", pytest.param("fused", marks=needs_interpreter)])
def test_replays_train_as_a_plain_loop(backend, graphs):  # noqa: F811
    few, steps = {}, steps_of()
    if backend == "fused":  # the interpreter is slow
        few, steps = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]}, steps_of([(3, 3)] * 3)
    model, other = (adapted(backend=backend, **few) for _ in range(2))
    step = malora.capture_step(model)
    assert_same(train(model, lambda batches: step(batches, scale=0.5), steps), train(other, plain(other, 0.5), steps))
    assert step.replayed and graphs.captures == (1 if few else 2) and bool(step._weights) is (backend == "fused")


@on_cpu
def test_micro_batches_of_a_users_own_loop_are_added(graphs):  # noqa: F811
    model = adapted()
    step = malora.capture_step(model)

    def run_step(micro_batches):
        return [step.backward(micro_batch, scale=torch.tensor(0.5)) for micro_batch in micro_batches]

    assert_same(train(model, run_step), train(other := adapted(), plain(other, 0.5)))
    assert step.replayed and graphs.captures == step.captures == 2


def warm(step, *, length=6, passes=3):
    for _ in range(passes):
        step.backward(batch(length))
    return step


@on_cpu
def test_gradients_that_are_there_are_added_to(graphs):  # noqa: F811
    model = adapted()
    step = warm(malora.capture_step(model))
    model.zero_grad()
    step.backward(batch())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)  # the user's own tensor
    step.backward(batch())
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient + 1)


@on_cpu
def test_parameters_without_gradient_have_none(graphs):  # noqa: F811
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 1), nn.Linear(2, 1)

    model = Half()
    step = malora.capture_step(model, lambda model, x: model.used(x).sum())
    for _ in range(4):
        step.backward(torch.ones(3, 2))
    assert step.replayed and model.used.weight.grad.eq(12).all() and model.unused.weight.grad is None


@on_cpu
def test_shapes_beyond_the_limit_run_as_usual(graphs, caplog):  # noqa: F811
    step = warm(malora.capture_step(adapted(), max_graphs=1))
    with caplog.at_level(logging.WARNING, "malora"):
        warm(step, length=7, passes=4)
    assert not step.replayed and graphs.captures == 1
    assert [record.message.partition(" ")[0] for record in caplog.records] == ["1"]  # said once
    assert warm(step, passes=1).replayed


@on_cpu
def test_other_constants_need_another_graph(graphs):  # noqa: F811
    step = malora.capture_step(adapted(), lambda model, batch: batch["power"] * model(batch["input_ids"]).logits.mean())
    for power, captures in ((1, 1), (2, 2)):
        for _ in range(3):
            step.backward(batch() | {"power": power})
        assert step.replayed and graphs.captures == captures
    with pytest.raises(TypeError, match="hashable"):
        step.backward(batch() | {"power": {1, 2}})


def change_adapter(model):
    model.add_adapter("other", malora.METHODS["malora"](lora_dropout=0.0))
    model.set_adapter("other")


CHANGES = {
    "adapter": change_adapter,
    "frozen": lambda model: next(p for p in model.parameters() if p.requires_grad).requires_grad_(False),
    "mode": lambda model: model.eval(),
    "moved": lambda model: setattr(p := next(model.parameters()), "data", p.data.clone()),
    "module": lambda model: model.get_base_model().set_output_embeddings(nn.Linear(64, 61, bias=False).to(DEVICE)),
}


@pytest.mark.parametrize("change", [*CHANGES])
def test_a_changed_model_is_captured_anew(change, request):
    if not ON_GPU:
        request.getfixturevalue("graphs")
    model = adapted()
    step = warm(malora.capture_step(model))
    assert step.replayed
    CHANGES[change](model)
    step.backward(batch())
    assert not step.replayed
    assert warm(step).replayed
    model.zero_grad()
    step.backward(batch())
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    next(plain(model)([batch()])), [*plain(model)([batch()])]
    expected = {name: p.grad / 2 for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@on_cpu
def test_a_model_on_a_cpu_says_why_it_is_not_captured(caplog):
    step = malora.capture_step(adapted())
    with caplog.at_level(logging.INFO, "malora"):
        step([batch()]), step([batch()])
    (record,) = caplog.records  # said once
    assert "CUDA graphs need a GPU" in record.message and step.reason in record.message


@pytest.mark.parametrize("outputs, message", [(None, "NoneType"), ({"los": 1}, "dict")])
def test_a_loss_function_without_loss_is_an_error(outputs, message):
    step = malora.capture_step(adapted(), lambda model, batch: outputs)
    with pytest.raises(TypeError, match=message):
        step([batch()])


def test_a_batch_without_labels_is_an_error():
    with pytest.raises(ValueError, match=r"Add labels"):
        malora.capture_step(adapted()).backward({"input_ids": batch()["input_ids"]})
    with pytest.raises(ValueError, match="empty"):
        malora.capture_step(adapted())([])


def test_outputs_keep_their_form():
    def losses(model, batch):
        outputs = model(**batch)
        return {"loss": outputs.loss, "parts": (outputs.loss * 2, outputs.aux_loss)}

    step = malora.capture_step(adapted(), losses)
    for _ in range(4):  # on a GPU the last is a replay
        outputs = step.backward(batch())
    assert outputs["parts"][0] == 2 * outputs["loss"] and not outputs["loss"].requires_grad


def test_the_routing_of_a_replay_is_the_models_last(request):
    if not ON_GPU:
        request.getfixturevalue("graphs")
    model = adapted()
    step = warm(warm(malora.capture_step(model)), length=9)
    assert step.replayed
    masks = [{"attention_mask": torch.ones(2, n, dtype=torch.long)} for n in (6, 9)]
    for mask in masks:
        mask["attention_mask"][:, -1] = 0
    for n, mask in zip((6, 9), masks, strict=True):
        for _ in range(3):
            step.backward(batch(n) | mask)
    for n, mask in zip((6, 9), masks, strict=True):
        step.backward(batch(n, seed=5) | mask)
        assert step.replayed
        got = malora.router_stats(model)
        with torch.no_grad():
            model(**{name: tensor.to(DEVICE) for name, tensor in (batch(n, seed=5) | mask).items()})
        expected = malora.router_stats(model)
        assert got.keys() == expected.keys()
        for name, stats in expected.items():
            assert got[name].entropy == pytest.approx(stats.entropy, rel=1e-4)


def test_gradients_are_averaged_over_processes(monkeypatch):
    """The other process has gradients of 1 everywhere."""
    reduced = []

    def all_reduce(flat):
        reduced.append(flat.dtype)
        flat += 1

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = adapted()
    first = next(p for p in model.parameters() if p.requires_grad)
    first.data = first.data.bfloat16()
    for number, p in enumerate(model.parameters()):
        if p.requires_grad and (number % 3 or p.dtype == torch.bfloat16):
            p.grad = torch.randn_like(p)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    malora.capture_step(model).average_gradients()
    assert set(reduced) == {torch.float32, torch.bfloat16} and len(reduced) == 2
    for name, p in model.named_parameters():
        if name in before:
            torch.testing.assert_close(p.grad, (before[name] + 1) / 2)
        else:
            assert p.grad is None


class TestReasons:
    """Why models are not captured, told without a GPU."""

    @pytest.fixture(autouse=True)
    def as_on_a_gpu(self, monkeypatch):
        monkeypatch.setattr("malora.backbone.model_state._why_no_pass", lambda model: None)

    def test_hooks_on_gradients(self):
        model = adapted()
        assert why_not_captured(model) is None
        next(p for p in model.parameters() if p.requires_grad).register_hook(lambda gradient: gradient * 2)
        assert "hook" in why_not_captured(model)

    def test_checkpointing_that_keeps_the_random_state(self):
        model = adapted()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert "random number" in why_not_captured(model)
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        assert why_not_captured(model) is None

    @pytest.mark.parametrize("mode", ["full", "offload", "lean"])
    def test_our_checkpointing_does_not(self, mode):
        model = adapted(backend="fused", dropout=0.1)
        malora.set_checkpointing(model, mode)
        assert why_not_captured(model) is None


@on_cpu
@pytest.mark.parametrize("captured_before", [False, True])
def test_a_failed_capture_leaves_a_step_that_runs_as_usual(captured_before, graphs, monkeypatch, caplog):  # noqa: F811
    def fail(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")

    model, other = adapted(), adapted()
    step = malora.capture_step(model)
    if captured_before:
        warm(step)
    monkeypatch.setattr("malora.backbone.captured_pass.capture", fail)
    steps = steps_of([(9, 6), (9, 9), (6, 9)])
    assert_same(train(model, step, steps), train(other, plain(other), steps))
    (record,) = caplog.records  # said once
    assert "not permitted" in record.message and (step.reason is None) is captured_before
    assert warm(step, passes=1).replayed is captured_before


@needs_gpu
@pytest.mark.parametrize("method", ["lora", "malora"])
def test_every_replay_draws_new_dropout(method):
    step = warm(malora.capture_step(adapted(method, dropout=0.5)))
    losses = [step.backward(batch()).item() for _ in range(5)]
    assert step.replayed and len(set(losses)) == 5


@needs_gpu
def test_replays_under_autocast_train_as_a_plain_loop():
    def cast(run_step):
        def run(micro_batches):
            with torch.autocast("cuda", torch.bfloat16):
                return list(run_step(micro_batches))

        return run

    model, other = adapted(), adapted()
    step = malora.capture_step(model)
    got, expected = train(model, cast(step)), train(other, cast(plain(other)))
    assert step.replayed
    torch.testing.assert_close(torch.tensor(got[0]), torch.tensor(expected[0]), rtol=2e-2, atol=2e-2)


@needs_gpu
def test_checkpointed_passes_are_captured_without_the_random_state():
    model, other = adapted(), adapted()
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    step = malora.capture_step(model)
    assert_same(train(model, step), train(other, plain(other)))
    assert step.replayed


@needs_gpu
def test_a_pass_that_cannot_be_captured_runs_as_usual(caplog):
    def waits(model, batch):
        loss = model(**batch).loss
        return loss if loss.item() > 0 else -loss

    model, other = adapted(dropout=0.1), adapted()
    step = malora.capture_step(model, waits)
    warm(step, passes=4)
    assert not step.replayed and sum("could not be captured" in record.message for record in caplog.records) == 1
    torch.cuda.empty_cache()
    assert "could not be captured" in step.reason
    model.eval(), other.eval()
    assert_same(train(model, step), train(other, plain(other)))
    assert len({step.backward(batch()).item() for _ in range(2)}) == 1
    model.train()
    assert len({step.backward(batch()).item() for _ in range(3)}) == 3  # random numbers can still be drawn


@needs_gpu
def test_reset_frees_the_memory_of_the_graphs():
    def with_64_mib(model, batch):
        return model(**batch).loss + 0 * torch.ones(1 << 24, device=DEVICE).sum()

    step = warm(malora.capture_step(adapted(), with_64_mib))
    before = torch.cuda.memory_reserved()
    step.reset()
    assert step.replayed and torch.cuda.memory_reserved() <= before - (1 << 26)
    assert warm(step).replayed
