"""`optimize_backbone` on models of many architectures, through Triton's interpreter or on a GPU."""

import copy
import io
import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

import malora
from tests.malora.backbone.architectures import ARCHITECTURES, make

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IDS = torch.randint(3, 61, (2, 6), generator=torch.Generator().manual_seed(1)).to(DEVICE)
LABELS = torch.where(torch.arange(6, device=DEVICE) < 3, -100, IDS)
GUIDE = Path(__file__).parents[3] / "docs/guides/optimize-the-backbone.md"
COLUMNS = ("rotary", "activation", "norm", "residual", "loss")
NODES = {  # of autograd's graph, by part
    "rotary": "_RotaryBackward",
    "activation": "_GluBackward",
    "norm": "_RmsNormBackward",
    "residual": "_AddRmsNormBackward",
    "loss": "_LinearCrossEntropyBackward",
}


def adapted(name="Llama", **options):
    model = get_peft_model(
        make(name), malora.METHODS["molora"](**{"lora_dropout": 0.0, "num_experts": 2, "r": 4, **options})
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.enable_input_require_grads()  # so that the first norm is in autograd's graph too
    return model.to(DEVICE).train()


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    loss = model(**{"input_ids": IDS, "labels": LABELS, **inputs}).loss
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def check_equal(got, expected, **tolerance):
    torch.testing.assert_close(got[0], expected[0], **tolerance)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def nodes(loss):
    """Return the names in autograd's graph, one for each node."""
    found, waiting = {}, [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = node.name().replace("_Packed", "_")
            waiting += [following for following, _ in node.next_functions]
    return [*found.values()]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_gradients_and_generation_stay_and_the_guide_says_what_changes(name):
    model = adapted(name)
    generated = model.eval().generate(input_ids=IDS, max_new_tokens=2, do_sample=False)
    expected = loss_and_gradients(model.train())
    printed = str(model)

    report = malora.optimize_backbone(model)
    optimized = loss_and_gradients(model)
    check_equal(optimized, expected)
    assert model.eval().generate(input_ids=IDS, max_new_tokens=2, do_sample=False).equal(generated)
    assert malora.optimize_backbone(model) == report  # again changes nothing

    malora.restore_backbone(model)
    restored = loss_and_gradients(model.train())
    assert restored[0].equal(expected[0]) and str(model) == printed

    row = re.search(rf"^\| {name} \|(.*)\|$", GUIDE.read_text(), re.MULTILINE)
    assert row is not None, f"the guide's table has no row {name}"
    cells = dict(zip(COLUMNS, [cell.strip() for cell in row[1].split("|")], strict=True))
    assert cells == {part: "no" if report[part].startswith("none") else "yes" for part in COLUMNS}
    # A part that is reported also runs.
    used = nodes(optimized[0])
    for part, node in NODES.items():
        assert (node in used) == (cells[part] == "yes"), part


@pytest.mark.parametrize(
    "use_reentrant, options", [(None, {"lora_dropout": 0.3, "backend": "fused"}), (False, {}), (True, {})]
)
def test_gradient_checkpointing_and_the_fused_backend(use_reentrant, options):
    """A norm after a sum is computed with the sum, but for the sum of a checkpointed layer's end."""

    def run(optimizes):
        model = adapted(**options)
        if use_reentrant is not None:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        if optimizes:
            malora.optimize_backbone(model)
        return loss_and_gradients(model)

    expected, got = run(False), run(True)
    check_equal(got, expected)
    if use_reentrant is not True:  # such a checkpoint is one node
        names = nodes(got[0])
        joined = 4 if use_reentrant is None else 2
        assert names.count("_AddRmsNormBackward") == joined and names.count("_RmsNormBackward") == 5 - joined


def test_results_in_16_bits_are_as_close_to_float32_as_before():
    with torch.no_grad():
        exact = make("Llama").to(DEVICE)(IDS).logits
        model = make("Llama").to(DEVICE).bfloat16().requires_grad_(False)
        plain = model(IDS).logits.float()
        malora.optimize_backbone(model)
        got = model(IDS).logits.float()
    # Triton's interpreter rounds to bfloat16 by cutting bits off.
    assert (got - exact).norm() < 3 * (plain - exact).norm()


def test_a_hook_that_changes_a_result_and_hooks_of_norms_count():
    def run(optimizes):
        model = make("Llama").to(DEVICE).requires_grad_(False)
        if optimizes:
            malora.optimize_backbone(model)
        model.model.layers[0].register_forward_hook(lambda *call: call[-1].add_(0.1))
        model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(lambda _, x: (x[0] * 2,))
        model.model.norm.register_forward_hook(lambda *call: call[-1] * 2)
        return model(IDS).logits

    torch.testing.assert_close(run(True), run(False))


def test_a_norm_that_is_trained_keeps_its_gradient():
    def gradients(optimizes):
        model = make("Llama").to(DEVICE)
        if optimizes:
            malora.optimize_backbone(model)
        model(IDS).logits.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if "norm" in name}

    expected, got = gradients(False), gradients(True)
    assert len(expected) == 5
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=name)


def test_an_interrupted_pass_leaves_nothing_that_a_later_one_uses():
    model = make("Llama").to(DEVICE).requires_grad_(False)
    malora.optimize_backbone(model)
    expected = model(IDS.flip(1)).logits

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(IDS)
    assert model.model.layers[1].input_layernorm.malora_settings.precomputed is not None
    handle.remove()
    assert copy.deepcopy(model).model.layers[1].input_layernorm.malora_settings.precomputed is None
    assert model(IDS.flip(1)).logits.equal(expected)


def test_copies_and_pickles_are_optimized_and_saving_is_as_before(tmp_path):
    model = make("Llama").to(DEVICE).requires_grad_(False)
    keys = [*model.state_dict()]
    malora.optimize_backbone(model)
    expected = model(IDS).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert "OptimizedLlamaDecoderLayer" in str(copied) and [*copied.state_dict()] == keys
        layers = copied.model.layers
        assert layers[0].malora_settings.next_norm is layers[1].input_layernorm
        assert copied(IDS).logits.equal(expected)
        malora.restore_backbone(copied)
        assert "Optimized" not in str(copied) and "OptimizedLlamaDecoderLayer" in str(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).to(DEVICE)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    torch.testing.assert_close(loaded(IDS).logits, expected)


def test_other_models_and_recorded_outputs_stay():
    model, other = (make("Llama").to(DEVICE).requires_grad_(False) for _ in range(2))
    malora.optimize_backbone(model)
    assert "Optimized" not in str(other) and isinstance(model.model.layers[0], type(other.model.layers[0]))
    for got, wanted in zip(*(m(IDS, output_hidden_states=True).hidden_states for m in (model, other)), strict=True):
        torch.testing.assert_close(got, wanted)
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, other(IDS).logits)


def test_torch_compile_traces_the_whole_model():
    model = make("Llama").to(DEVICE).requires_grad_(False)
    expected = model(IDS, use_cache=False).logits
    malora.optimize_backbone(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected)


def test_modules_are_recognized_under_autocast_and_another_default_device():
    expected = malora.optimize_backbone(make("Llama"))
    model = make("Llama")
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
        assert malora.optimize_backbone(model) == expected


def test_parts_can_be_left_out():
    model = make("Llama").to(DEVICE)
    report = malora.optimize_backbone(model, rotary=False, norm=False, loss=False, padding=False)
    assert report.pop("activation") == "2 modules" and set(report.values()) == {"none: not asked for"}
    assert sum("Optimized" in type(module).__name__ for module in model.modules()) == 2


def test_modules_that_compute_something_else_stay():
    class ScaledMLP(type(make("Llama").model.layers[0].mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    model = make("Llama")
    mlp, norm = model.model.layers[0].mlp, model.model.norm
    mlp.__class__ = ScaledMLP
    norm.forward = nn.Identity()
    malora.optimize_backbone(model)
    assert type(mlp) is ScaledMLP and "Optimized" not in type(norm).__name__
    assert "Optimized" in type(model.model.layers[1].mlp).__name__


def test_dropout_of_sublayers_counts_if_it_is_turned_on_later():
    model = make("Phi-3").to(DEVICE).requires_grad_(False).train()
    malora.optimize_backbone(model)
    assert model(IDS).logits.equal(model(IDS).logits)
    for layer in model.model.layers:
        layer.resid_mlp_dropout.p = 0.5
    assert not model(IDS).logits.equal(model(IDS).logits)


def test_without_triton_the_loss_alone_changes(monkeypatch):
    monkeypatch.setattr("malora.backbone.optimize.has_triton", lambda: False)
    report = malora.optimize_backbone(model := make("Llama"))
    assert report["loss"] == "1 module" and report["norm"] == "none: Triton is not installed"
    assert "Optimized" not in str(model)
