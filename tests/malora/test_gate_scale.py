"""Matched scale: gates of other sums give updates of equal size at the start."""

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model

import malora
from bench.train.gate_scale import match_first_batch
from malora import METHODS
from malora.adapter_stack import stack_adapters
from malora.gate_scale import set_mean_gate_sum
from tests.conftest import make_model
from tests.malora.test_adapter_stack import NAMES, gradients_of, run, trained, with_adapters

MATCHED = {"match_scale": True}
ROUTERS = {
    "top-2": MATCHED,
    "frozen": MATCHED | {"freeze": ["router"]},
    "renormalised": {"renormalize": True},
    "dense": {"top_k": 8},
    "uniform": {"gating": "uniform", "top_k": 8},
}


def adapted(method="molora", **options):
    torch.manual_seed(0)
    return get_peft_model(make_model(), METHODS[method](**options))


@pytest.mark.parametrize("method", ["molora", "malora"])
def test_all_routers_start_with_one_mean_update(method, ids):
    """The mean of scaling · Σ g over the tokens of the first batch, of all layers, is lora_alpha / r = 2."""
    means = {}
    for name, options in ROUTERS.items():
        model = adapted(method, **options)
        config = model.peft_config["default"]
        if config.match_scale:
            assert 0.25 < malora.match_gate_scale(model, [{"input_ids": ids}]) < 0.6
        model(ids)
        sums = [s.gate_sum for s in malora.router_stats(model).values()] if config.has_router else [8.0]
        layers = {layer.settings["default"].scaling for layer in model.base_model.malora_layers}
        assert layers == {config.scaling}
        means[name] = config.scaling * sum(sums) / len(sums)
    assert means == pytest.approx(dict.fromkeys(ROUTERS, 2.0), rel=1e-5)


def test_padding_and_the_division_into_passes_do_not_count(ids):
    model, alone = adapted(**MATCHED), adapted(**MATCHED)
    modes = [module.training for module in model.modules()]
    short = ids[:, :3]
    expected = malora.match_gate_scale(alone, [{"input_ids": ids}, {"input_ids": short}])
    padded = torch.nn.functional.pad(short, (0, ids.shape[1] - 3))
    mask = torch.ones(2, *ids.shape)
    mask[1, :, 3:] = 0
    together = {"input_ids": torch.cat([ids, padded]), "attention_mask": mask.flatten(0, 1)}
    assert malora.match_gate_scale(model, [together]) == pytest.approx(expected, rel=1e-5)
    assert [module.training for module in model.modules()] == modes


def test_a_frozen_router_gets_no_gradient_and_a_trained_one_does(ids):
    for name, options in ROUTERS.items():
        model = adapted(init_weights=False, **options).train()
        if model.peft_config["default"].match_scale:
            malora.match_gate_scale(model, [{"input_ids": ids}])
        model(ids).logits.square().mean().backward()
        routers = {n: p.grad for n, p in model.named_parameters() if "malora_router" in n}
        assert bool(routers) == (name != "uniform")
        assert all((grad is None) == (name == "frozen") for grad in routers.values())
        assert all(grad is None or grad.abs().sum() > 0 for grad in routers.values())


def test_training_without_the_first_batch_is_an_error(ids):
    model = adapted(**MATCHED).train()
    with pytest.raises(ValueError, match=r"not known yet. Call malora.match_gate_scale"):
        model(ids)
    model.eval()(ids)


@pytest.mark.parametrize("options", [{"match_scale": True}, {"renormalize": True}, {"gating": "uniform", "top_k": 8}])
def test_gates_are_saved_and_loaded(options, ids, tmp_path):
    model = adapted(init_weights=False, **options, rank_pattern={"q_proj": 4}).eval()
    if options == MATCHED:
        malora.match_gate_scale(model, [{"input_ids": ids}])
        plain = adapted(init_weights=False, rank_pattern={"q_proj": 4}).eval()
        assert not torch.allclose(plain(ids).logits, model(ids).logits)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_model(), tmp_path)
    assert again.peft_config["default"].mean_gate_sum == model.peft_config["default"].mean_gate_sum
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_uniform_gates_merge_into_the_base(ids):
    model = adapted("malora", gating="uniform", top_k=8, init_weights=False).double().eval()
    expected = model(ids).logits
    assert not torch.allclose(expected, make_model().double()(ids).logits)
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected)


@pytest.mark.parametrize("backend", ["dense", "fused"])
def test_adapters_of_one_stack_have_scales_of_their_own(backend):
    rows, means = {"a": 2, "b": 2, "c": 2}, {"a": 0.25, "b": 0.5, "c": 0.4}
    model = with_adapters({name: METHODS["malora"](lora_dropout=0, backend=backend, **MATCHED) for name in NAMES})
    for name, mean in means.items():
        set_mean_gate_sum(model, mean, adapter=name)
    ids = torch.randint(0, 61, (6, 5), generator=torch.Generator().manual_seed(0)).to(next(model.parameters()).device)
    expected = run(model, rows, NAMES, ids)
    sum(expected.values()).backward()
    wanted = {name: {n: p.grad.clone() for n, p in trained(model, name).items()} for name in NAMES}
    (stack,) = stack_adapters(model, NAMES)
    got = run(model, rows, NAMES, ids)
    torch.testing.assert_close(got, expected)
    sum(got.values()).backward()
    for name in NAMES:
        for (layer, kind), gradient in gradients_of(stack, name).items():
            (theirs,) = (g for n, g in wanted[name].items() if f".{layer}.malora_{kind}.{name}" in n)
            torch.testing.assert_close(gradient, theirs, msg=f"{name} {layer} {kind}")
    with pytest.raises(ValueError, match="'a' is in a stack"):
        malora.match_gate_scale(model, [{"input_ids": ids}], adapter="a")


def test_a_run_matches_alone_what_it_matches_with_others():
    """Each run has the mean of its own first batch, which has as many examples as the batch size says."""
    rows = [torch.randint(0, 61, (length,)).tolist() for length in (5, 9, 3, 7)]
    encoded = [SimpleNamespace(ids=row) for row in rows]
    config = SimpleNamespace(batch_size=2, epochs=1, seed=0)
    alone = adapted(**MATCHED)
    mean = match_first_batch(alone, "default", encoded, config, 0)
    joint = get_peft_model(make_model(), METHODS["molora"](**MATCHED), adapter_name="a")
    joint.add_adapter("default", METHODS["molora"](**MATCHED))
    with torch.no_grad():
        for mine, theirs in zip(joint.base_model.malora_layers, alone.base_model.malora_layers, strict=True):
            mine.router("default").copy_(theirs.router("default"))
    joint.base_model.set_adapter(["a", "default"])
    assert match_first_batch(joint, "default", encoded, config, 0, is_joint=True) == pytest.approx(mean, rel=1e-5)
    assert joint.peft_config["a"].mean_gate_sum is None
    assert match_first_batch(adapted(), "default", encoded, config, 0) is None


def test_what_cannot_be_matched_is_an_error(ids):
    with pytest.raises(ValueError, match="make its config with match_scale=True"):
        malora.match_gate_scale(adapted(), [{"input_ids": ids}])
    with pytest.raises(ValueError, match="there is no adapter 'other'"):
        malora.match_gate_scale(adapted(**MATCHED), [{"input_ids": ids}], adapter="other")
    with pytest.raises(ValueError, match="give the first batch"):
        malora.match_gate_scale(adapted(**MATCHED), [])
