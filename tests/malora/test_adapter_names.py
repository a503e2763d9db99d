"""Rows of a batch with adapters of their own (`adapter_names`): each equals its adapter run alone on these rows."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

import malora
from malora import METHODS
from tests.conftest import make_model
from tests.malora.backbone.fake_graphs import graphs  # noqa: F401  # a fixture
from tests.malora.test_methods import randomise

# Adapters of different methods, ranks and targets.
ADAPTERS = {
    "first": METHODS["malora"](lora_dropout=0),
    "second": METHODS["molora"](r=4, lora_alpha=8, lora_dropout=0, target_modules=["q_proj", "down_proj"]),
    "third": METHODS["asylora"](r=6, lora_alpha=12, lora_dropout=0),
}
GROUPED = ["first", "first", "__base__", "second", "third"]
MIXED = ["second", "first", "__base__", "third", "first"]


def with_adapters(model, configs=ADAPTERS, dtype=torch.float64):
    (name, config), *others = configs.items()
    adapted = get_peft_model(model, config, adapter_name=name)
    for name, config in others:
        adapted.add_adapter(name, config)
    return randomise(adapted.to(dtype)).eval()


@pytest.fixture
def model():
    return with_adapters(make_model())


@pytest.fixture
def batch():
    ids = torch.randint(0, 61, (5, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = mask[4, 4:] = mask[1, 3:] = 0
    return ids, mask


def rows_of(name, names):
    return [row for row, other in enumerate(names) if other == name]


def run_alone(model, name, run):
    if name == "__base__":
        with model.disable_adapter():
            return run()
    model.set_adapter(name)
    return run()


@pytest.mark.parametrize("names", [GROUPED, MIXED, ["first"] * 5, ["__base__"] * 5])
def test_each_row_has_the_output_of_its_adapter(model, batch, names):
    ids, mask = batch
    mixed = model(ids, attention_mask=mask, adapter_names=names).logits
    for name in set(names):
        rows = rows_of(name, names)
        alone = run_alone(model, name, lambda rows=rows: model(ids[rows], attention_mask=mask[rows]).logits)
        torch.testing.assert_close(mixed[rows], alone)


@pytest.mark.parametrize("names", [GROUPED, MIXED])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "checkpointed"])
def test_gradients_are_those_of_each_adapter_on_its_rows(model, batch, names, checkpointing):
    ids, mask = batch
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    model.base_model.set_adapter(list(ADAPTERS))
    model.train()

    def loss_of(logits, name, rows):
        loss = (logits * mask[rows, :, None]).pow(2).mean() + logits.sum() / 100
        has_router = ADAPTERS[name].has_router
        return loss + malora.balance_loss(model, adapter=name) if has_router else loss

    mixed = model(ids, attention_mask=mask, adapter_names=names, use_cache=False).logits
    sum(loss_of(mixed[rows], name, rows) for name in ADAPTERS if (rows := rows_of(name, names))).backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    for name in ADAPTERS:
        rows = rows_of(name, names)
        model.set_adapter(name)
        loss_of(model(ids[rows], attention_mask=mask[rows], use_cache=False).logits, name, rows).backward()
    alone = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == alone.keys() and len(found) > 60
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, alone[key], msg=lambda text, key=key: f"{key}: {text}")


def test_a_checkpointed_pass_keeps_its_rows_when_another_pass_follows(model, batch):
    ids, _ = batch
    model.base_model.set_adapter(list(ADAPTERS))
    model.enable_input_require_grads()
    model.train()

    def gradients():
        first = model(ids, adapter_names=MIXED, use_cache=False).logits
        second = model(ids, adapter_names=MIXED[::-1], use_cache=False).logits
        third = model(ids, use_cache=False).logits
        (first.pow(2).mean() + 2 * second.pow(2).mean() + 3 * third.pow(2).mean()).backward()
        found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for key, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[key])
    layers = [module for module in model.modules() if hasattr(module, "_gradient_checkpointing_func")]
    assert all("adapter_names" not in repr(layer._gradient_checkpointing_func) for layer in layers)  # put back


@pytest.mark.parametrize("names", [GROUPED, MIXED])
def test_balance_loss_and_statistics_count_an_adapters_own_rows(model, batch, names):
    ids, mask = batch
    other_mask = mask.flip(0)
    loss = model(ids, attention_mask=mask, labels=ids, adapter_names=names, output_router_logits=True)
    found = {name: malora.balance_loss(model, adapter=name) for name in ("first", "second")}
    by_mask = {name: malora.balance_loss(model, other_mask, adapter=name) for name in found}
    stats = malora.router_stats(model, adapter="first")
    assert len(stats) == 12 and len(malora.router_stats(model, adapter="second")) == 4
    with pytest.raises(ValueError, match=r"several adapters routed tokens in .*name one of them as adapter="):
        malora.router_stats(model)
    for name in found:
        rows = rows_of(name, names)
        model.set_adapter(name)
        model(ids[rows], attention_mask=mask[rows])
        torch.testing.assert_close(found[name], malora.balance_loss(model))
        torch.testing.assert_close(by_mask[name], malora.balance_loss(model, other_mask[rows]))
        if name == "first":
            assert malora.router_stats(model)[next(iter(stats))].share == pytest.approx(
                next(iter(stats.values())).share
            )
    torch.testing.assert_close(loss.aux_loss, sum(found.values()).to(loss.aux_loss.dtype))


def test_each_adapter_has_its_own_dropout(batch):
    ids, _ = batch
    configs = {"dry": METHODS["molora"](r=4, lora_dropout=0), "wet": METHODS["molora"](r=4, lora_dropout=0.5)}
    model = with_adapters(make_model(), configs)
    names = ["dry", "wet", "dry", "wet", "dry"]
    expected = model(ids, adapter_names=names).logits
    found = model.train()(ids, adapter_names=names).logits
    torch.testing.assert_close(found[::2], expected[::2])
    assert (found[1::2] - expected[1::2]).abs().amax((1, 2)).min() > 1e-3


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate_gives_each_row_its_adapter(model, batch, options):
    ids, _ = batch
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    count = options.get("num_return_sequences", 1)
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if "malora_" in name):
            parameter.mul_(2)  # so that adapters generate different texts
    mixed = model.generate(input_ids=ids, adapter_names=MIXED, **options)
    texts = set()
    for name in set(MIXED):
        rows = rows_of(name, MIXED)
        alone = run_alone(model, name, lambda rows=rows: model.generate(input_ids=ids[rows], **options))
        assert torch.equal(mixed.unflatten(0, (5, count))[rows].flatten(0, 1), alone)
        texts.add(tuple(run_alone(model, name, lambda: model.generate(input_ids=ids[:1], **options))[0].tolist()))
    assert len(texts) == 4  # otherwise this test would show nothing


def test_generate_with_beams_repeats_names_in_the_decoder_only():
    torch.manual_seed(0)
    config = T5Config(vocab_size=31, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    options = {"lora_dropout": 0, "r": 4, "d": 8, "task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v", "wo"]}
    configs = {"first": METHODS["malora"](**options), "second": METHODS["malora"](**options)}
    model = with_adapters(T5ForConditionalGeneration(config), configs)
    ids, names = torch.randint(1, 31, (4, 6)), ["first", "__base__", "second", "first"]
    options = {"max_new_tokens": 4, "num_beams": 3, "eos_token_id": None, "pad_token_id": 0}
    mixed = model.generate(input_ids=ids, adapter_names=names, **options)
    for name in set(names):
        rows = rows_of(name, names)
        alone = run_alone(model, name, lambda rows=rows: model.generate(input_ids=ids[rows], **options))
        assert torch.equal(mixed[rows], alone)


def test_models_that_flatten_batch_and_sequence():
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=31, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2,
                       word_embed_proj_dim=16, max_position_embeddings=32)  # fmt: skip
    options = {"r": 4, "lora_dropout": 0, "target_modules": ["fc1", "q_proj"]}
    model = with_adapters(
        OPTForCausalLM(config), {"first": METHODS["molora"](**options), "second": METHODS["molora"](**options)}
    )
    ids, names = torch.randint(1, 31, (4, 6)), ["first", "second", "__base__", "first"]
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    mixed = model(ids, attention_mask=mask, adapter_names=names).logits
    balance = malora.balance_loss(model, adapter="first")
    for name in set(names):
        rows = rows_of(name, names)
        alone = run_alone(model, name, lambda rows=rows: model(ids[rows], attention_mask=mask[rows]).logits)
        torch.testing.assert_close(mixed[rows], alone)
        if name == "first":
            torch.testing.assert_close(balance, malora.balance_loss(model))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_modules_to_save_are_those_of_each_rows_adapter(batch, checkpointing):
    ids, _ = batch
    options = {"r": 4, "lora_dropout": 0, "target_modules": ["q_proj"], "modules_to_save": ["o_proj", "lm_head"]}
    model = with_adapters(make_model(), {"first": METHODS["molora"](**options), "second": METHODS["molora"](**options)})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.second" in name:
                parameter.mul_(1.5)
    names = ["second", "first", "__base__", "first", "second"]
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    mixed = model(ids, adapter_names=names, use_cache=False).logits
    mixed.pow(2).mean().backward()  # runs the layers again if they are checkpointed
    saved = [p for n, p in model.named_parameters() if "o_proj.modules_to_save.first" in n]
    assert saved and all(p.grad is not None for p in saved)
    for name in set(names):
        rows = rows_of(name, names)
        alone = run_alone(model, name, lambda rows=rows: model(ids[rows], use_cache=False).logits)
        torch.testing.assert_close(mixed[rows], alone)


def test_a_module_to_save_that_peft_cannot_mix_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(self.inner(x))

    options = {"num_experts": 1, "top_k": 1, "down": "A_t", "target_modules": ["inner"], "modules_to_save": ["norm"]}
    model = get_peft_model(Net(), malora.MaloraConfig(**options))
    with pytest.raises(TypeError, match="Mixed batching is only supported for"):
        model(torch.ones(2, 4), adapter_names=["default", "__base__"])


def test_errors(model, batch):
    ids, _ = batch
    with pytest.raises(ValueError, match=r"Length of `adapter_names` should be .* got 3 and 5 respectively"):
        model(ids, adapter_names=["first"] * 3)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): fourth. Choose from first, second, third"):
        model(ids, adapter_names=["fourth"] * 5)
    with pytest.raises(TypeError, match="expected a list of str"):
        model(ids, adapter_names="first")
    with pytest.raises(ValueError, match="alora_offsets= is not supported by malora"):
        model(ids, alora_offsets=[1, 1])
    model.set_adapter("third")
    before = model(ids).logits
    assert torch.equal(model(ids, adapter_names=None).logits, before)  # after errors, too
    model.merge_adapter(["third"])
    with pytest.raises(ValueError, match="there are merged adapters, please call `unmerge_adapter` first"):
        model(ids, adapter_names=["third"] * 5)
    with model.disable_adapter():  # precedes the names
        disabled = model(ids, adapter_names=["first"] * 5).logits
        torch.testing.assert_close(disabled, model(ids).logits)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the graphs are real")
def test_a_replay_restores_the_rows_of_its_pass(model, graphs):  # noqa: F811
    """Router statistics of an adapter after a replay use the mask of its own rows."""
    model.base_model.set_adapter(list(ADAPTERS))
    model.train()
    step = malora.capture_step(model, lambda model, batch: model(**batch, use_cache=False).logits.square().mean())
    generator = torch.Generator().manual_seed(0)

    def micro_batch(names):
        ids = torch.randint(0, 61, (len(names), 7), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril(2), "adapter_names": tuple(names)}

    batches = [micro_batch(names) for names in (GROUPED, MIXED)]
    for batch in batches * 3:
        step([batch])
    assert graphs.captures == 2 and step.replayed
    for batch in batches:
        step([batch])
        replayed = malora.router_stats(model, adapter="first")
        model(**batch, use_cache=False)
        for name, expected in malora.router_stats(model, adapter="first").items():
            assert replayed[name].entropy == pytest.approx(expected.entropy)
