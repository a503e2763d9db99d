"""Checkpointing on a GPU: peak memory and captured steps."""

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import malora
from malora.backbone import cuda_graphs
from tests.malora.backbone.checkpointed import (
    MODES,
    ON_GPU,
    gradients,
    loss_of,
    norms_and_swiglu_that_announce,
    set_mode,
)

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


def model_on_gpu(**options):
    """Return a model in bfloat16 whose activations take more memory than its weights."""
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 8}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=512)).to("cuda", torch.bfloat16)
    options = {"backend": "fused", "target_modules": malora.TARGET_MODULES["llama"], "init_weights": False} | options
    model = get_peft_model(base, malora.METHODS["malora"](**options)).train()
    norms_and_swiglu_that_announce(model)
    return model


def autocast_loss(model, ids):
    with torch.autocast("cuda", torch.bfloat16):
        return loss_of(model, ids)


def test_the_peak_is_lower_on_a_gpu():
    model = model_on_gpu(lora_dropout=0.1)
    ids = torch.randint(512, (4, 1024), device="cuda")
    peak_bytes, found = {}, {}
    for mode in ("none", *MODES, "none"):
        set_mode(model, mode, offload_fraction=0.25)
        for _ in range(2):  # the second one finds all buffers
            torch.manual_seed(3)
            torch.cuda.reset_peak_memory_stats()
            autocast_loss(model, ids).backward()
            found[mode] = gradients(model)
        peak_bytes[mode] = torch.cuda.max_memory_allocated()
    assert max(peak_bytes[mode] for mode in MODES) < peak_bytes["none"]
    set_mode(model, "lean", offload_fraction=0.0)
    torch.cuda.reset_peak_memory_stats()
    autocast_loss(model, ids).backward()
    assert peak_bytes["lean"] < torch.cuda.max_memory_allocated() < peak_bytes["none"]
    for mode in MODES:
        for name, expected in found["none"].items():
            close = {"rtol": 1e-2, "atol": 1e-2 * float(expected.abs().max())}  # sums in another order
            torch.testing.assert_close(found[mode][name], expected, **close, msg=f"{mode} {name}")


@pytest.mark.parametrize("mode", MODES)
def test_a_captured_step_computes_the_same(mode):
    """The other mode is captured too: cuBLAS may choose other kernels there, and bfloat16 logits then tie otherwise."""
    model = model_on_gpu(lora_dropout=0.0)
    batches = [torch.randint(512, (4, 1024), device="cuda") for _ in range(3)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    static = batches[0].clone()

    def replayed():
        captured = []
        graph = cuda_graphs.capture(
            lambda: captured.append(torch.autograd.grad(autocast_loss(model, static), parameters))
        )
        for ids in batches:
            static.copy_(ids)
            graph.replay()
            yield [gradient.clone() for gradient in captured[-1]]

    expected = list(replayed())
    set_mode(model, mode, offload_fraction=0.5)
    for found, wanted in zip(replayed(), expected, strict=True):
        for got, want in zip(found, wanted, strict=True):
            assert (got - want).norm() <= 0.02 * want.norm()  # found: up to 0.012, in all modes


@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_captured(mode):
    """Through the public functions, as users call them."""
    model, plain = model_on_gpu(lora_dropout=0.0), model_on_gpu(lora_dropout=0.0)
    malora.set_checkpointing(model, mode)
    step = malora.capture_step(model)
    for ids in torch.randint(512, (4, 4, 1024), device="cuda"):
        with torch.autocast("cuda", torch.bfloat16):
            step([{"input_ids": ids, "labels": ids}])
        autocast_loss(plain, ids).backward()
    assert step.reason is None and step.captures == 1 and step.replayed
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        assert got.grad is None or (got.grad - want.grad).norm() <= 0.02 * want.grad.norm()


@pytest.mark.parametrize("mode", MODES)
def test_dropout_can_be_captured(mode):
    """The masks of both runs come from one seed on the device, which differs from replay to replay."""
    model = model_on_gpu(lora_dropout=0.5)
    set_mode(model, mode)
    ids, captured = torch.randint(512, (1, 256), device="cuda"), []
    parameters = [p for p in model.parameters() if p.requires_grad]
    graph = cuda_graphs.capture(lambda: captured.append(torch.autograd.grad(autocast_loss(model, ids), parameters)))
    replayed = []
    for _ in range(2):
        graph.replay()
        replayed.append([gradient.clone() for gradient in captured[-1]])
    assert all(gradient.isfinite().all() for gradient in replayed[1])
    assert not all(a.equal(b) for a, b in zip(*replayed, strict=True))
