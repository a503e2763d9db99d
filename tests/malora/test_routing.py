"""The router, and the log that keeps its decisions."""

import copy
import math

import pytest
import torch
from peft import get_peft_model

import malora
from malora.routing import RoutingLog, route, top_k_indices, top_k_mask
from tests.conftest import make_model


def adapted(method="malora", **options):
    torch.manual_seed(0)
    return get_peft_model(make_model(), malora.METHODS[method](**options))


def test_gates_are_the_top_probabilities_not_renormalised():
    x, weight = torch.eye(3), torch.tensor([[2.0, 0, 0], [1.0, 0, 0], [0.0, 0, 0], [-1.0, 0, 0]])
    routing = route(x, weight, top_k=2)
    e = [math.exp(v) for v in (2, 1, 0, -1)]
    expected = torch.tensor([e[0] / sum(e), e[1] / sum(e), 0, 0])
    torch.testing.assert_close(routing.gate[0], expected)
    assert (routing.chosen.sum(-1) == 2).all()  # exactly k experts, also for equal probabilities


def test_the_softmax_is_in_float32_or_wider():
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert route(x.to(dtype), weight.to(dtype), top_k=1).probability.dtype == expected


def test_of_equal_probabilities_the_first_are_taken():
    probability = torch.tensor([[0.2, 0.3, 0.2, 0.3]])
    assert torch.cat(top_k_indices(probability, 3), -1).tolist() == [[1, 3, 0]]
    assert top_k_mask(probability, 3).tolist() == [[1, 1, 0, 1]]


def test_with_one_expert_per_token_the_router_still_learns_from_the_task(ids):
    """Check that the router has a gradient with one expert per token.

    With k = 1 a renormalised gate would be constant, and the task would give the router no gradient.
    """
    model = adapted("molora", top_k=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "malora_B" in name:
                p.normal_()
    model(ids).logits.pow(2).mean().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "malora_router" in n)


def test_the_log_records_inside_the_block_only():
    log, mask = RoutingLog(), torch.ones(2, 3)
    with pytest.raises(RuntimeError), log.record(mask):
        assert log.recording and log.attention_mask is mask
        raise RuntimeError
    assert not log.recording and log.attention_mask is mask


def test_the_recomputation_of_checkpointing_is_not_recorded(ids):
    """Otherwise the log would keep the recomputed activations of every layer alive."""
    model = adapted().train()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    loss = model(ids, use_cache=False).logits.mean() + malora.balance_loss(model)
    recorded = [id(layer.routings["default"].probability) for layer in model.base_model.malora_layers]
    loss.backward()
    after = [id(layer.routings["default"].probability) for layer in model.base_model.malora_layers]
    assert after == recorded


def test_a_used_model_can_be_copied(ids):
    model = adapted().train()
    model(ids)
    again = copy.deepcopy(model)
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
