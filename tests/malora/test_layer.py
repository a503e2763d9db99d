"""The adapted layer: shapes of inputs, offloaded factors, and merging into frozen weights of every kind."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn

from malora import METHODS
from malora.fused.availability import interprets_triton
from tests.malora.test_methods import ours, randomise

SIZES = {"r": 4, "target_modules": ["0"], "task_type": None}


def small(method: str, linear: nn.Module | None = None, **options) -> nn.Module:
    """Adapt one linear layer with 16 inputs and 8 outputs, and change all its factors."""
    d = {"d": 8} if METHODS[method]().d else {}
    torch.manual_seed(0)
    model = nn.Sequential(linear or nn.Linear(16, 8))
    return randomise(get_peft_model(model, METHODS[method](**SIZES | d | options))).eval()


@pytest.mark.parametrize("method", ours)
@pytest.mark.parametrize("backend", ["dense", "dispatch", "sorted", "reference", "fused"])
def test_the_output_of_a_token_does_not_depend_on_the_shape_of_the_batch(method, backend):
    model = small(method, backend=backend)
    x = torch.randn(2, 3, 16)
    y = model(x)
    torch.testing.assert_close(model(x[1, 2]), y[1, 2])
    torch.testing.assert_close(model(x[1]), y[1])
    torch.testing.assert_close(model(x[:, None]), y[:, None])
    assert model(x[:0]).shape == (0, 3, 8)


@pytest.mark.parametrize("method", ours)
@pytest.mark.parametrize("backend", ["auto", "fused"])
def test_factors_that_accelerate_offloads_are_loaded_for_the_pass(method, backend):
    model = small(method, backend=backend)
    x = torch.randn(3, 16)
    y = model(x)
    cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(model(x), y)
    assert all(parameter.is_meta for parameter in model.parameters())  # offloaded again
    with model.disable_adapter():
        assert not torch.equal(model(x), y)


@pytest.mark.parametrize("method", ["asylora", "malora"])
def test_an_adapter_of_an_offloaded_base_starts_without_effect_and_trains(method):
    base = nn.Sequential(nn.Linear(16, 8))
    x = torch.randn(3, 16)
    y = base(x)
    cpu_offload(base, execution_device=torch.device("cpu"))
    model = get_peft_model(base, METHODS[method](**SIZES | ({"d": 8} if method == "malora" else {})))
    torch.testing.assert_close(model(x), y)
    model(x).pow(2).sum().backward()
    assert model.base_model.model[0].malora_B["default"].grad.abs().sum() > 0


def test_disabling_a_merged_and_offloaded_adapter_gives_the_base():
    model = small("asylora")
    x = torch.randn(3, 16)
    y, base = model(x), model.base_model.model[0].base_layer(x)
    cpu_offload(model, execution_device=torch.device("cpu"))
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base)
    torch.testing.assert_close(model(x), y)


def test_an_adapter_that_is_added_in_evaluation_mode_has_no_dropout():
    model = small("molora", lora_dropout=0.5)
    model.add_adapter("second", METHODS["molora"](**SIZES | {"lora_dropout": 0.5}))
    model.set_adapter("second")
    randomise(model)
    x = torch.randn(3, 16)
    assert torch.equal(model(x), model(x))


def test_an_offloaded_adapter_is_merged():
    model = small("asylora")
    x = torch.randn(3, 16)
    y = model(x)
    cpu_offload(model, execution_device=torch.device("cpu"))
    model.merge_adapter()
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), y)


class Int8Linear(nn.Linear):
    """A linear layer whose weight is stored as whole numbers, as quantized ones are."""

    def __init__(self, linear: nn.Linear, *, packed: bool = False) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.bias = linear.bias
        self.scale = linear.weight.detach().abs().max() / 127
        weight = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight.reshape(-1, 1) if packed else weight, requires_grad=False)

    def forward(self, x):
        weight = self.weight.reshape(self.out_features, self.in_features).to(x.dtype) * self.scale
        return nn.functional.linear(x, weight, self.bias)


class Int8Backend(QuantizationBackend):
    """Change the weight of an Int8Linear as PEFT's backends change those of bitsandbytes."""

    supports_merge = True
    backend_name = "int8"

    def get_base_weight(self, base_layer):
        return base_layer.weight.float() * base_layer.scale

    def set_base_weight(self, peft_layer, weight_data):
        base = peft_layer.get_base_layer()
        base.scale = weight_data.abs().max() / 127
        base.weight.data = (weight_data / base.scale).round().to(torch.int8)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_weight_that_cannot_be_dequantized_refuses_a_merge_and_stays(packed, safe_merge):
    """Two layers: the plain one must not be merged before the other refuses."""
    torch.manual_seed(0)
    plain, quantized = nn.Linear(16, 16), Int8Linear(nn.Linear(16, 8), packed=packed)
    model = get_peft_model(
        nn.Sequential(plain, quantized), METHODS["asylora"](**SIZES | {"target_modules": ["0", "1"]})
    )
    randomise(model).eval()
    x = torch.randn(3, 16)
    y = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match=r"cannot merge into 1: its weight, Parameter torch.int8 .* in a Int8Linear"
        ):
            merge(safe_merge=safe_merge)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_quantized_weight_that_peft_can_change_is_merged(safe_merge):
    model = small("asylora", Int8Linear(nn.Linear(16, 8)))
    layer = model.base_model.model[0]
    layer.quantization_backend = Int8Backend()
    x = torch.randn(3, 16)
    y = model(x)
    with model.disable_adapter():
        assert (model(x) - y).abs().max() > 0.5
    model.merge_adapter(safe_merge=safe_merge)
    assert layer.base_layer.weight.dtype == torch.int8
    torch.testing.assert_close(model(x), y, rtol=0, atol=0.15)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), y, rtol=0, atol=0.15)
    torch.testing.assert_close(model.merge_and_unload(safe_merge=safe_merge)(x), y, rtol=0, atol=0.15)


class OddTensor(torch.Tensor):
    """A weight of a class of its own, as torchao's are, in a plain `nn.Linear`."""


def test_a_weight_of_another_class_is_not_fused():
    linear = nn.Linear(16, 8)
    expected = small("malora", linear, backend="fused")
    x = torch.randn(5, 16)
    y = expected(x)
    assert expected.base_model.model[0].adapter_for_fused_path() == ("default" if interprets_triton() else None)
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(OddTensor), requires_grad=False)
    assert type(linear.weight) is OddTensor
    assert expected.base_model.model[0].adapter_for_fused_path() is None
    torch.testing.assert_close(expected(x).as_subclass(torch.Tensor), y)


@pytest.mark.parametrize("backend", ["dense", "fused"])
def test_weights_of_torchao_are_computed_with_and_not_merged_unless_it_is_known_how(backend):
    quantization = pytest.importorskip("torchao.quantization")
    base = nn.Sequential(nn.Linear(64, 64))
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    x = torch.randn(3, 64)
    y = base(x)
    model = get_peft_model(base, METHODS["asylora"](**SIZES | {"backend": backend})).eval()
    torch.testing.assert_close(model(x), y)
    with pytest.raises(ValueError, match="cannot be dequantized and quantized again"):
        model.merge_adapter()


def test_weights_of_torchao_are_merged_if_the_model_says_how_they_were_quantized():
    quantization = pytest.importorskip("torchao.quantization")
    base = nn.Sequential(nn.Linear(64, 64))
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    config = SimpleNamespace(get_apply_tensor_subclass=quantization.Int8WeightOnlyConfig)
    base.hf_quantizer = SimpleNamespace(quantization_config=config)  # where transformers keeps it
    model = randomise(get_peft_model(base, METHODS["asylora"](**SIZES | {"lora_alpha": 8}))).eval()
    x = torch.randn(3, 64)
    y = model(x)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), y, rtol=0, atol=0.1)
    assert model.get_layer_status()[0].quantization_backend == "torchao"
    model.unmerge_adapter()
    torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=0, atol=0.1)


def bitsandbytes_model(bits: int) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = nn.Linear(64, 64, bias=False)
    if bits == 8:
        quantized = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        quantized.load_state_dict(linear.state_dict())
    else:
        quantized = bnb.nn.Linear4bit(64, 64, bias=False)
        quantized.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False)
    model = nn.Sequential(quantized.to("cuda" if torch.cuda.is_available() else "cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)  # PEFT's LoRA asks for it
    return model


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_bitsandbytes_are_merged_as_by_pefts_lora(bits, safe_merge):
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["0"], "lora_dropout": 0.0, "task_type": None}
    ours = randomise(get_peft_model(bitsandbytes_model(bits), METHODS["asylora"](**options))).eval()
    theirs = get_peft_model(bitsandbytes_model(bits), LoraConfig(**options)).eval()
    factors, lora = ours.base_model.model[0].factors("default"), theirs.base_model.model[0]
    lora.lora_A["default"].weight.data = factors.A.data[0].clone()
    lora.lora_B["default"].weight.data = factors.B.data[0].T.clone()
    # With a gradient for x. After a pass without one, bitsandbytes packs 4-bit weights on some CPUs, and LoRA's merge
    # is garbage.
    x = torch.randn(3, 64, device=factors.A.device, requires_grad=True)
    y = ours(x)
    torch.testing.assert_close(y, theirs(x))
    for model in (ours, theirs):
        model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(ours(x), theirs(x))
    for model in (ours, theirs):
        model.unmerge_adapter()
    torch.testing.assert_close(ours(x), theirs(x))
    merged = [model.merge_and_unload(safe_merge=safe_merge)(x) for model in (ours, theirs)]
    torch.testing.assert_close(*merged)


def test_weights_that_bitsandbytes_packed_for_this_cpu_are_not_merged():
    model = randomise(get_peft_model(bitsandbytes_model(4), METHODS["asylora"](**SIZES))).eval()
    x = torch.randn(3, 64, device=next(model.parameters()).device)
    y = model(x)
    if not getattr(model.base_model.model[0].base_layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes packs weights on CPUs with AVX512-BF16 only")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="bitsandbytes packed it in an inference pass on this CPU"):
            merge()
    assert torch.equal(model(x), y)
