"""The router, its balance loss and its statistics, against small cases worked out by hand."""

import math

import pytest
import torch
from peft import get_peft_model

import malora
from malora.routing import route
from tests.conftest import make_model


def adapted(ids, method="malora", **options):
    torch.manual_seed(0)
    model = get_peft_model(make_model(), malora.METHODS[method](**options))
    model(ids, attention_mask=options.get("mask"))
    return model


def test_gates_are_the_top_probabilities_not_renormalised():
    x, weight = torch.eye(3), torch.tensor([[2.0, 0, 0], [1.0, 0, 0], [0.0, 0, 0], [-1.0, 0, 0]])
    routing = route(x, weight, top_k=2)
    e = [math.exp(v) for v in (2, 1, 0, -1)]
    expected = torch.tensor([e[0] / sum(e), e[1] / sum(e), 0, 0])
    torch.testing.assert_close(routing.gate[0], expected)
    assert (routing.chosen.sum(-1) == 2).all()  # ties, too, are served by exactly k


def test_one_expert_of_many_still_learns_from_the_task(ids):
    """With k = 1 a renormalised gate would be constant and its router would get no gradient from the task."""
    model = adapted(ids, "molora", top_k=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "malora_B" in name:
                p.normal_()
    model(ids).logits.pow(2).mean().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "malora_router" in n)


def set_routers(model, weight):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "malora_router" in name:
                p.copy_(weight(p))


def test_an_even_router_has_balance_loss_one_and_a_collapsed_one_n_over_k(ids):
    model = adapted(ids, "molora")
    set_routers(model, torch.zeros_like)
    model(ids)
    assert malora.balance_loss(model).item() == pytest.approx(1.0)
    stats = next(iter(malora.router_stats(model).values()))
    assert stats.entropy == pytest.approx(math.log(8)) and stats.gate_sum == pytest.approx(2 / 8)

    # Two experts take everything: f = (1/2, 1/2, 0, …), p = (1/2, 1/2, 0, …), 8 · (1/4 + 1/4) = 4.
    layer = next(m for m in model.modules() if isinstance(m, malora.MaloraLayer))
    with torch.no_grad():
        layer.malora_router["default"].zero_()
    x = torch.ones(1, 5, layer.in_features)
    with torch.no_grad():
        layer.malora_router["default"][:2] = 1.0
    for other in model.base_model.malora_layers:
        other.routings.clear()
    model.base_model.routing_log.listening = True
    layer(x)
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
    model(padded)  # and one given later
    assert malora.balance_loss(model) != alone
    torch.testing.assert_close(malora.balance_loss(model, mask), alone, rtol=1e-5, atol=1e-6)


def test_statistics_name_every_routed_module(ids):
    stats = malora.router_stats(adapted(ids))
    assert len(stats) == 2 * 6 and "model.layers.1.mlp.up_proj" in stats
    for found in stats.values():
        assert sum(found.share) == pytest.approx(1) and sum(found.probability) == pytest.approx(1)


def test_what_cannot_be_balanced_says_so(ids):
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


def test_a_checkpointed_backward_pass_is_not_listened_to(ids):
    """Otherwise the log would keep the recomputed activations of every layer alive."""
    model = adapted(ids).train()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    loss = model(ids, use_cache=False).logits.mean() + malora.balance_loss(model)
    kept = [id(layer.routings["default"].probability) for layer in model.base_model.malora_layers]
    loss.backward()
    after = [id(layer.routings["default"].probability) for layer in model.base_model.malora_layers]
    assert after == kept


def test_a_used_model_can_be_copied(ids):
    import copy

    model = adapted(ids).train()
    model(ids)
    again = copy.deepcopy(model)
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
