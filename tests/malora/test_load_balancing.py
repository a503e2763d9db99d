"""The balance loss and the router statistics.

They are compared with small cases worked out by hand.
"""

import math

import pytest
import torch
from peft import get_peft_model

import malora
from tests.conftest import make_model


def adapted(ids, method="malora", **options):
    torch.manual_seed(0)
    model = get_peft_model(make_model(), malora.METHODS[method](**options))
    model(ids)
    return model


def set_routers(model, weight):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "malora_router" in name:
                p.copy_(weight(p))


def test_an_even_router_has_balance_loss_one(ids):
    model = adapted(ids, "molora")
    set_routers(model, torch.zeros_like)
    model(ids)
    assert malora.balance_loss(model).item() == pytest.approx(1.0)
    stats = next(iter(malora.router_stats(model).values()))
    assert stats.entropy == pytest.approx(math.log(8)) and stats.gate_sum == pytest.approx(2 / 8)


def test_a_collapsed_router_has_balance_loss_n_over_k(ids):
    """Check the balance loss of a router whose two experts get everything.

    f = (1/2, 1/2, 0, …), p = (1/2, 1/2, 0, …), 8 · (1/4 + 1/4) = 4.
    """
    model = adapted(ids, "molora")
    layer = next(m for m in model.modules() if isinstance(m, malora.MaloraLayer))
    with torch.no_grad():
        layer.malora_router["default"].zero_()
        layer.malora_router["default"][:2] = 1.0
    with model.base_model.routing_log.record(None):
        layer(torch.ones(1, 5, layer.in_features))
    assert malora.balance_loss(model.eval()).item() == pytest.approx(4.0, rel=1e-3)
    assert malora.router_stats(model)[layer.name].unused == [2, 3, 4, 5, 6, 7]


def test_the_balance_loss_evens_out_a_router(ids):
    model = adapted(ids, "molora").train()
    set_routers(model, lambda p: torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    routers = [p for n, p in model.named_parameters() if "malora_router" in n]
    optimizer = torch.optim.Adam(routers, lr=0.05)
    losses = []
    for _ in range(15):
        model(ids)
        loss = malora.balance_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_padding_does_not_count(ids):
    model = adapted(ids).eval()
    model(ids)
    alone, stats = malora.balance_loss(model), malora.router_stats(model)
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=ids.dtype)], 1)
    mask = torch.ones_like(padded)
    mask[:, ids.shape[1] :] = 0
    model(padded, attention_mask=mask)  # the mask of the forward pass
    torch.testing.assert_close(malora.balance_loss(model), alone, rtol=1e-5, atol=1e-6)
    for name, found in malora.router_stats(model).items():
        assert found.share == pytest.approx(stats[name].share, abs=1e-5)
    model(padded)  # a mask given later
    assert malora.balance_loss(model) != alone
    torch.testing.assert_close(malora.balance_loss(model, mask), alone, rtol=1e-5, atol=1e-6)


def test_processes_get_summands_of_the_loss_of_all_tokens(ids):
    """Two unequal parts of a batch stand for two processes, and padding for a process without tokens."""
    ids = torch.cat([ids, ids.flip(1)])
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    model = adapted(ids, "molora", lora_dropout=0.0).train()
    set_routers(model, lambda p: torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    routers = [p for n, p in model.named_parameters() if "malora_router" in n]

    def loss_of(part, all_reduce=None):
        model(ids[part])
        loss = malora.balance_loss(model, mask[part], all_reduce=all_reduce)
        stats = malora.router_stats(model, mask[part], all_reduce=all_reduce)
        return loss.detach(), torch.autograd.grad(loss, routers), stats

    def in_two(parts):
        """Record what each part would send, and then replay the sums in the same order."""
        sent = [[], []]
        for part, tensors in zip(parts, sent, strict=True):
            loss_of(part, lambda tensor, tensors=tensors: tensors.append(tensor) or tensor)
        replies = [iter([sum(pair) for pair in zip(*sent, strict=True)]) for _ in parts]
        return [loss_of(part, lambda _, left=left: next(left)) for part, left in zip(parts, replies, strict=True)]

    expected, gradients, expected_stats = loss_of(slice(None))
    (loss, first, stats), (more, second, more_stats) = in_two([slice(0, 1), slice(1, None)])
    torch.testing.assert_close(loss + more, expected)
    for got, other, gradient in zip(first, second, gradients, strict=True):
        torch.testing.assert_close(got + other, gradient, rtol=1e-4, atol=1e-7)
    for module, wanted in expected_stats.items():
        for got in (stats[module], more_stats[module]):
            assert got.entropy == pytest.approx(wanted.entropy) and got.share == pytest.approx(wanted.share)
            assert got.gate_sum == pytest.approx(wanted.gate_sum)

    mask[0] = 0
    expected, _, _ = loss_of(slice(None))
    (nothing, zeros, _), (everything, _, _) = in_two([slice(0, 1), slice(1, None)])
    assert nothing == 0 and not any(gradient.any() for gradient in zeros)
    torch.testing.assert_close(everything, expected)


def test_a_mask_that_does_not_fit_the_tokens_is_an_error(ids):
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 5\), but the tokens routed are \(2, 9\)"):
        malora.balance_loss(adapted(ids), torch.ones(2, 5))


def test_statistics_name_every_routed_module(ids):
    stats = malora.router_stats(adapted(ids))
    assert len(stats) == 2 * 6 and "model.layers.1.mlp.up_proj" in stats
    for found in stats.values():
        assert sum(found.share) == pytest.approx(1) and sum(found.probability) == pytest.approx(1)


def test_a_model_without_routing_is_an_error(ids):
    with pytest.raises(ValueError, match="no adapter with more than one expert"):
        malora.balance_loss(adapted(ids, "asylora"))
    model = get_peft_model(make_model(), malora.METHODS["malora"]())
    with pytest.raises(ValueError, match="run a forward pass first"):
        malora.balance_loss(model)
    model.train()
    with torch.no_grad():
        model(ids)
    with pytest.raises(ValueError, match="carries no gradient"):
        malora.balance_loss(model)


def test_the_balance_loss_does_not_depend_on_the_shape_of_the_batch():
    torch.manual_seed(0)
    config = malora.METHODS["malora"](r=4, d=8, target_modules=["0"], task_type=None)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 8)), config)
    x = torch.randn(2, 3, 16)
    losses = []
    for shape in ((2, 3, 16), (6, 16), (1, 2, 3, 16)):
        model(x.view(shape))
        losses.append(malora.balance_loss(model))
    torch.testing.assert_close(losses[1:], losses[:1] * 2)
    model(x[0, 0])  # a single token
    assert malora.balance_loss(model) > 0 and len(malora.router_stats(model)) == 1


def test_layers_whose_input_is_one_vector():
    """Such a layer routes one token, without batch or sequence."""
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    config = malora.METHODS["molora"](task_type=None, target_modules=["0"], lora_dropout=0.0)
    model = get_peft_model(model, config).train()
    x = torch.ones(16)
    model(x)
    alone = malora.balance_loss(model)
    alone.backward()
    model(x.expand(1, 1, 16))
    torch.testing.assert_close(malora.balance_loss(model), alone)
    model(x)
    with pytest.raises(ValueError, match="attention_mask is"):
        malora.balance_loss(model, torch.ones(1, 1))


def test_padding_does_not_count_where_a_model_flattens_batch_and_sequence():
    """OPT's feed-forward layers see [B·S, n]."""
    torch.manual_seed(0)
    config = malora.METHODS["molora"](task_type=None, target_modules=["0"], lora_dropout=0.0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), config)
    x, mask = torch.randn(2, 3, 16), torch.tensor([[1, 1, 0], [1, 0, 0]])
    model(x)
    expected = malora.balance_loss(model, mask)
    assert not torch.isclose(expected, malora.balance_loss(model))
    model(x.flatten(0, 1))
    torch.testing.assert_close(malora.balance_loss(model, mask), expected)
    with pytest.raises(ValueError, match="attention_mask is"):
        malora.balance_loss(model, mask[:1])
