"""The training step against plain computations of the same losses and gradients."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import get_peft_model

import malora
from bench.train.batching import Encoded, collate
from bench.train.fixed_shapes import FixedShapes
from bench.train.step import TrainStep, has_balance_loss
from tests.bench.base_types import ALL, make_base
from tests.conftest import SHAPES, make_model

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

ENCODED = [Encoded([7, 3, 9, 11, 2, 5], 2), Encoded([4, 8, 1], 1), Encoded([6, 6, 2, 3], 1)]


def run_step(
    shape="llama",
    max_tokens=10_000,
    method="malora",
    fixed_shapes=None,
    balance=0.0,
    row_length=512,
    encoded=ENCODED,
    **options,
):
    """Run one step of a model whose up projections are not zero.

    Returns model, losses and gradients by name.
    """
    torch.manual_seed(0)
    targets = malora.TARGET_MODULES[shape]
    config = malora.METHODS[method](lora_dropout=0.0, target_modules=targets, **options)
    model = get_peft_model(make_model(shape), config).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "malora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(1), std=0.1)
    accelerator = Accelerator()
    micro_batches = collate(encoded, 0, row_length=row_length, max_tokens=max_tokens, fixed_shapes=fixed_shapes)
    losses = TrainStep(model, model, accelerator, balance_factor=balance)(micro_batches)
    return model, losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_at_label_positions_give_the_loss_of_all_logits(shape):
    model, (loss, _), gradients = run_step(shape)
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


@pytest.mark.parametrize("name", [name for name in ALL if "window" in name and "mixtral" not in name])
def test_the_loss_is_that_of_plain_forward_passes_with_sliding_windows(name):
    """With an adapter of this package, whose model gets a dictionary of masks if layers differ."""
    texts = [[7, 3, 9, 11, 2, 5, 8, 8, 31, 7, 12], [4, 8, 1], [6, 6, 2, 3, 40, 17, 22]]
    base = make_base(name)
    targets = malora.TARGET_MODULES.get(ALL[name][0], ["q_proj", "v_proj"])
    model = get_peft_model(base, malora.METHODS["molora"](lora_dropout=0.0, target_modules=targets)).train()
    (batch,) = collate([Encoded(text, 1) for text in texts], 0)
    loss, balance = TrainStep(model, model, Accelerator(), balance_factor=0.01)([batch])
    ends = torch.stack([model(input_ids=torch.tensor([text[:-1]])).logits[0, -1] for text in texts])
    expected = F.cross_entropy(ends, torch.tensor([text[-1] for text in texts]))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-5)
    assert balance.isfinite()


def test_micro_batches_give_the_losses_and_gradients_of_the_batch():
    _, expected, gradients = run_step(max_tokens=10_000)
    _, losses, added = run_step(row_length=6, max_tokens=6)  # one packed sequence per micro-batch
    torch.testing.assert_close(expected[0], losses[0], rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(added[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "encoded, shapes",
    [
        (ENCODED, FixedShapes()),
        ([Encoded([7, 3, 9, 11, 2, 5], 2)] * 5, FixedShapes()),
        (ENCODED, FixedShapes(widths=(8, 24, 64))),
        ([Encoded(code.ids, 1) for code in ENCODED], FixedShapes(widths=(64,), labels=7)),
    ],
)
def test_padded_labels_and_sequences_change_nothing(encoded, shapes):
    """Five packed sequences get a sixth of padding alone, or one sequence has all examples and a fixed length."""
    _, plain, gradients = run_step(balance=0.1, row_length=6, encoded=encoded)
    _, padded, padded_gradients = run_step(balance=0.1, row_length=6, encoded=encoded, fixed_shapes=shapes)
    torch.testing.assert_close(torch.stack(padded), torch.stack(plain), rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(padded_gradients[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["lora", "malora"])
def test_a_captured_step_computes_what_the_eager_step_does(method):
    """Compare on two shapes, two micro-batches, and longer labels.

    There are two shapes, so that one graph is replayed after the other.
    """

    def trained(captured: bool):
        torch.manual_seed(0)
        model = get_peft_model(make_model(), malora.METHODS[method](lora_dropout=0.0)).cuda().train()
        if captured:
            malora.optimize_backbone(model, loss=False)
        step = TrainStep(model, model, Accelerator(), balance_factor=0.01)
        if not captured:
            step.step.max_graphs = 0
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for width, max_tokens, label in ((5, 10_000, 1), (20, 10_000, 1), (5, 10_000, 1), (20, 32, 1), (20, 32, 7)):
            generator = torch.Generator().manual_seed(width)
            batch = [Encoded(torch.randint(1, 60, (width,), generator=generator).tolist(), label) for _ in range(4)]
            micro_batches = collate(batch, 0, row_length=32, max_tokens=max_tokens, fixed_shapes=FixedShapes())
            losses.append(torch.stack(step([one.to(torch.device("cuda")) for one in micro_batches])).tolist())
            optimizer.step()
            optimizer.zero_grad()
        return losses, {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}

    (eager, expected), (replayed, got) = trained(False), trained(True)
    assert torch.tensor(replayed).allclose(torch.tensor(eager), rtol=1e-4, atol=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["lora", "malora"])
def test_every_replay_draws_new_dropout(method):
    torch.manual_seed(0)
    model = get_peft_model(make_model(), malora.METHODS[method](lora_dropout=0.5)).cuda().train()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.3)
    step = TrainStep(model, model, Accelerator(), balance_factor=0.0)
    batch = [Encoded(list(range(1, 9)), 1)] * 4
    micro_batches = [one.to(torch.device("cuda")) for one in collate(batch, 0, fixed_shapes=FixedShapes(labels=4))]
    losses = [torch.stack(step(micro_batches))[0].item() for _ in range(5)]
    assert len(set(losses)) == 5


def test_the_balance_loss_is_added_once():
    """The adapter's own weight, with which the model would add it, has no effect here."""
    for balance in (0.0, 0.1):
        (_, losses, gradients), (_, expected, without) = (
            run_step(balance=balance, router_aux_loss_coef=weight) for weight in (0.5, 0.0)
        )
        assert [loss.item() for loss in losses] == [loss.item() for loss in expected]
        assert all(torch.equal(gradient, without[name]) for name, gradient in gradients.items())


def test_a_frozen_router_has_no_balance_loss():
    """It would change nothing but the tokens that reach the router."""
    for method in ("molora", "molora-renormalized"):
        _, (loss, balance), gradients = run_step(method=method, freeze=["router"], balance=10.0)
        _, (plain, _), expected = run_step(method=method, freeze=["router"], balance=0.0)
        assert balance == 0 and loss == plain and expected.keys() == gradients.keys()
        assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())
        model, (_, balance), _ = run_step(method=method, balance=10.0)
        assert balance > 0.5 and has_balance_loss(model, "default") and not has_balance_loss(model, "other")
