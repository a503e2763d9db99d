"""Adapters on quantized bases: torchao's int8 weights, 8 and 4 bits of bitsandbytes, and GPTQ's 4 bits."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn
from transformers import BitsAndBytesConfig, GPTQConfig, LlamaConfig, LlamaForCausalLM

import malora
from malora import METHODS

SIZES = {
    "malora": {"r": 4, "d": 6, "num_experts": 4},
    "molora": {"r": 4, "num_experts": 4},
    "asylora": {"r": 4},
}
# bitsandbytes packs 4 bits on a CPU in blocks of 64.
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, vocab_size=61)).eval()


def torchao_base(folder):
    quantization = pytest.importorskip("torchao.quantization")
    base = make_base()
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    return base


def bitsandbytes_base(folder, **options):
    pytest.importorskip("bitsandbytes")
    make_base().save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options))


def gptq_base(folder):
    pytest.importorskip("optimum")
    pytest.importorskip("gptqmodel")
    make_base().save_pretrained(folder)
    config = GPTQConfig(
        bits=4, group_size=32, model_seqlen=32, pad_token_id=0, tokenizer="none needed",
        dataset=[{"input_ids": [list(range(3, 35))], "attention_mask": [[1] * 32]}],
        backend="gptq_torch",  # others compile C++ for minutes
    )  # fmt: skip
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config).eval()


@pytest.fixture(autouse=True)
def gptq_compiles_nothing(monkeypatch):
    """Keep gptqmodel from compiling C++ and from torch.compile, which take most of its time here."""
    monkeypatch.setenv("GPTQMODEL_DISABLE_PACK_EXT", "1")
    with torch.compiler.set_stance("force_eager"):
        yield


BASES = {
    "torchao int8": torchao_base,
    "bitsandbytes 8 bit": lambda folder: bitsandbytes_base(folder, load_in_8bit=True),
    "bitsandbytes 4 bit": lambda folder: bitsandbytes_base(folder, load_in_4bit=True),
    "gptq": gptq_base,
}


@pytest.mark.parametrize("method", SIZES)
@pytest.mark.parametrize("base", BASES)
def test_an_adapter_on_a_quantized_base_trains_is_saved_and_switched_off(base, method, ids, tmp_path):
    # On a CPU bitsandbytes computes 4 bits by one of two kernels, depending on whether the input needs gradients.
    tolerance = 0.05 if "4 bit" in base else 0
    model = prepare_model_for_kbit_training(BASES[base](tmp_path / "base"), use_gradient_checkpointing=False)
    plain = model(input_ids=ids).logits
    model = get_peft_model(model, METHODS[method](**SIZES[method], lora_dropout=0))
    torch.testing.assert_close(model(input_ids=ids).logits, plain, atol=tolerance, rtol=0)  # B is zero
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = model(input_ids=ids).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, plain, atol=tolerance, rtol=0)
    model.save_pretrained(tmp_path / "adapter")
    base_model = model.unload()
    torch.testing.assert_close(base_model(input_ids=ids).logits, plain, atol=tolerance, rtol=0)
    # On the same base, since 4 bits of bitsandbytes differ from one load to the next, without an adapter too.
    again = PeftModel.from_pretrained(base_model, tmp_path / "adapter")
    torch.testing.assert_close(again(input_ids=ids).logits, trained, atol=tolerance, rtol=0)


@pytest.mark.parametrize("backend", ["auto", "fused"])
def test_one_expert_on_gptq_computes_as_lora_of_peft(backend, ids, tmp_path):
    base = gptq_base(tmp_path)
    names = ["q_proj", "v_proj", "up_proj", "down_proj"]
    options = {"r": 4, "lora_alpha": 8, "lora_dropout": 0, "target_modules": names}
    ours = get_peft_model(base, METHODS["asylora"](**options, backend=backend, init_weights=False))
    expected = ours(input_ids=ids).logits
    factors = {
        f"{name}.lora_{factor}": parameter.data[0].clone()
        for name, module in ours.named_modules()
        if type(module).__name__ == "MaloraLinear"
        for factor, parameter in (("A", module.malora_A["default"]), ("B", module.malora_B["default"]))
    }
    with pytest.raises(ValueError, match=r"cannot merge into .* in a TorchLinear, cannot be dequantized"):
        ours.merge_and_unload()
    lora = get_peft_model(ours.unload(), LoraConfig(**options))
    for name, factor in factors.items():
        weight = lora.get_submodule(f"{name}.default").weight
        weight.data = factor if weight.shape == factor.shape else factor.T
    torch.testing.assert_close(lora(input_ids=ids).logits, expected)


def dequantized(base):
    """Replace the 4-bit layers of bitsandbytes by plain ones with the same weights."""
    functional = pytest.importorskip("bitsandbytes.functional")
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "Linear4bit":
                weight = functional.dequantize_4bit(child.weight.data, child.weight.quant_state).float()
                plain = nn.Linear(child.in_features, child.out_features, bias=False)
                plain.weight = nn.Parameter(weight, requires_grad=False)
                setattr(module, name, plain)
    return base


def adapted_alike(base, method, **options):
    torch.manual_seed(1)
    options = {"lora_dropout": 0.25, "backend": "fused", "init_weights": False} | SIZES[method] | options
    return get_peft_model(base, METHODS[method](**options)).train()


def loss_and_gradients(model, ids):
    torch.manual_seed(2)  # of dropout
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("method", "checkpointing"), [("malora", "none"), ("asylora", "none"), ("molora", "full")])
def test_4_bits_of_bitsandbytes_are_fused(method, checkpointing, ids, tmp_path, caplog):
    base = bitsandbytes_base(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    plain = adapted_alike(dequantized(copy.deepcopy(base)), method)
    model = adapted_alike(base, method)
    malora.set_checkpointing(model, checkpointing)
    found = model.base_model.model.model.layers[0].self_attn.q_proj.adapter_for_fused_path()
    assert found == "default"
    expected_loss, expected = loss_and_gradients(plain, ids)
    loss, gradients = loss_and_gradients(model, ids)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradients, expected)
    # In training mode: in evaluation bitsandbytes packs its weights anew on some CPUs.
    with torch.no_grad():
        torch.manual_seed(3)
        logits = model(input_ids=ids).logits
        torch.manual_seed(3)
        torch.testing.assert_close(logits, plain(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("own", [torch.float32, torch.float16])  # Triton's interpreter has no bfloat16
def test_4_bits_are_multiplied_in_their_own_16_bits(own, ids, tmp_path):
    """As in bitsandbytes, which takes the dtype of the input if that of the layer has 32 bits."""
    base = bitsandbytes_base(tmp_path, load_in_4bit=True, bnb_4bit_compute_dtype=own)
    model = adapted_alike(base, "malora", target_modules=["q_proj"], lora_dropout=0.0)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 64)
    y = layer(x)
    assert y.dtype == torch.float32
    assert y.equal(y.half().float()) is (own == torch.float16)
    expected = layer.base_layer(x) + layer.delta("default", x)
    torch.testing.assert_close(y, expected, atol=0.05, rtol=0)


class QuantLinear(nn.Module):
    """A linear layer with the tensors of GPTQ and no `weight`, as several kernels of gptqmodel have it."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 64, 64
        self.register_buffer("qweight", torch.randint(0, 255, (64, 64), dtype=torch.uint8))

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) - 128) / 1000


@pytest.fixture
def quant_linear_base():
    base = make_base()
    for layer in base.model.layers:
        layer.self_attn.q_proj = QuantLinear()
    return base


def test_quantized_modules_of_other_libraries_are_refused_by_name(quant_linear_base):
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj is a QuantLinear; experts go on nn\.Linear"):
        get_peft_model(quant_linear_base, METHODS["malora"](**SIZES["malora"]))


@pytest.mark.parametrize("backend", ["auto", "fused"])
def test_a_quantized_module_needs_no_weight(backend, quant_linear_base, monkeypatch):
    """For a base of gptqmodel this runs in every environment: PEFT knows the stand-in for one."""

    def resolve(module, **options):
        return ForwardOnlyQuantizationBackend("gptq") if isinstance(module, QuantLinear) else None

    monkeypatch.setattr(malora.model, "resolve_quantization_backend", resolve)
    config = METHODS["molora"](**SIZES["molora"], backend=backend, target_modules=["q_proj"], init_weights=False)
    model = get_peft_model(quant_linear_base, config).float().eval()
    layer = model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 64)
    expected = layer.base_layer(x) + layer.delta("default", x)
    torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(layer(x), layer.base_layer(x))
