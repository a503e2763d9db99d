"""Modes of checkpointing: the same losses and gradients, from less memory."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import malora
from malora.backbone import recompute
from malora.backbone.host_copies import HostMemory
from malora.backbone.lean_mode import LeanMode
from malora.fused import augmented_weights, bases, packed_weights
from tests.malora.backbone.checkpointed import (
    DEVICE,
    MODES,
    adapted,
    assert_equal,
    counted,
    gradients,
    loss_of,
    norms_and_swiglu_that_announce,
    set_mode,
    step,
)


@pytest.fixture(autouse=True)
def offload_all_sizes(monkeypatch):
    monkeypatch.setattr(recompute, "MIN_OFFLOADED_BYTES", 1)


@pytest.fixture
def ids(ids):
    return ids[:, :4].to(DEVICE)


@pytest.mark.parametrize("method", ["malora", "lora"])
def test_losses_and_gradients_are_the_same(method, ids):
    """Dropout masks too, and the routers' balance loss."""
    model = adapted(method)
    norms_and_swiglu_that_announce(model)
    expected = step(model, ids)
    for mode in MODES:
        malora.set_checkpointing(model, mode)
        malora.set_checkpointing(model, mode)  # again changes nothing
        assert malora.checkpointing_mode(model) == mode
        assert_equal(step(model, ids), expected)
    malora.set_checkpointing(model, "none")
    assert malora.checkpointing_mode(model) == "none"
    assert not any(module._forward_pre_hooks for module in model.get_base_model().model.modules())
    assert_equal(step(model, ids), expected)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_two_passes_are_the_same(mode, ids):
    """Two micro-batches before their backward passes, the later one first, and one of them twice."""

    def run(model):
        torch.manual_seed(3)
        losses = [loss_of(model, ids), loss_of(model, ids.flip(0))]
        losses[1].backward()
        losses[0].backward(retain_graph=True)
        losses[0].backward()
        return gradients(model)

    model = adapted()
    expected = run(model)
    set_mode(model, mode)
    assert_equal(run(model), expected)


@pytest.mark.parametrize("method", ["malora", "asylora"])
def test_the_fused_path_computes_the_same_and_repeats_no_more_than_needed(method, ids, monkeypatch):
    monkeypatch.setattr(augmented_weights, "MIN_ELEMENTS", 1)
    monkeypatch.setattr(augmented_weights, "is_profitable", lambda layers: True)
    model = adapted(method, backend="fused")
    # x would be saved next to h
    malora.optimize_backbone(model, rotary=False, activation=False, norm=False, loss=False)
    outputs = norms_and_swiglu_that_announce(model)
    expected = step(model, ids)
    calls = []
    for owner, name in ((packed_weights.PackedBuffer, "fill"), (bases.AugmentedBase, "outputs")):
        monkeypatch.setattr(owner, name, counted(calls, name, getattr(owner, name)))

    malora.set_checkpointing(model, "offload")
    assert_equal(step(model, ids), expected)
    assert calls.count("fill") == 1  # for the whole model
    # Two groups in each of two layers; when a layer is recomputed, the last one's output is not needed.
    assert calls.count("outputs") == 4 + 2

    malora.set_checkpointing(model, "lean")
    outputs.clear()
    torch.manual_seed(3)
    loss = loss_of(model, ids)
    gc.collect()  # Triton's interpreter keeps the last tensor in a cycle
    assert [memory.expired() for memory in outputs[:-1]] == [True] * 6  # the last norm is the head's
    loss.backward()
    assert_equal({"loss": loss.detach()} | gradients(model), expected)


def test_an_output_that_somebody_else_reads_is_computed_again(ids):
    """As in distillation: the last projection's output is an input of another loss."""

    def run(model):
        features = []
        handle = (
            model.get_base_model()
            .model.layers[1]
            .mlp.register_forward_hook(lambda module, args, y: features.append(y.pow(2).mean()))
        )
        torch.manual_seed(3)
        (loss_of(model, ids) + features[0]).backward()
        handle.remove()
        return gradients(model)

    model = adapted(backend="fused", target_modules=["down_proj"], lora_dropout=0.0)
    expected = run(model)
    malora.set_checkpointing(model, "full")
    assert_equal(run(model), expected)


def test_a_weight_cache_serves_both_runs_and_must_not_change_between_them(ids, monkeypatch):
    model = adapted(backend="fused", target_modules=["down_proj"], lora_dropout=0.0)
    expected = step(model, ids)
    malora.set_checkpointing(model, "full")
    cache = malora.WeightCache(model)
    calls = []
    buffer = packed_weights.PackedBuffer
    monkeypatch.setattr(buffer, "fill", counted(calls, "fill", buffer.fill))
    cache.refresh()
    with cache:
        assert_equal(step(model, ids), expected)
        assert calls == ["fill"]
        loss = loss_of(model, ids)
        cache.refresh()
        with pytest.raises(RuntimeError, match="packed weights of a checkpointed layer changed"):
            loss.backward()


def test_less_is_kept(ids):
    model = adapted(lora_dropout=0.0)
    norms_and_swiglu_that_announce(model)
    base = model.get_base_model().model

    def kept_outputs():
        """Return the modules whose output is there at the end of the forward pass."""
        made = {}

        def remember(name, module, args, y):
            y = y[0] if isinstance(y, tuple) else y
            made[name] = StorageWeakRef(y.untyped_storage())

        handles = [
            module.register_forward_hook(partial(remember, name))
            for name, module in base.named_modules()
            # The attention of a GPU keeps a copy of v. Hooks on a frozen layer would keep it from the fused path.
            if name.startswith(("embed", "layers.0", "layers.1"))
            and not any(word in name for word in ("malora", "v_proj", "base_layer"))
        ]
        loss = loss_of(model, ids)
        for handle in handles:
            handle.remove()
        kept = {name for name, memory in made.items() if not memory.expired()}
        loss.backward()
        return kept

    names = {"input_layernorm", "mlp.gate_proj", "mlp.up_proj"}
    of_layers = [{f"layers.{place}"} | {f"layers.{place}.{name}" for name in names} for place in range(2)]
    assert kept_outputs() == of_layers[0] | of_layers[1]
    malora.set_checkpointing(model, "full")
    assert kept_outputs() == {"embed_tokens", "layers.0", "layers.1"}  # inputs of the layers and of the head
    malora.set_checkpointing(model, "offload")
    assert kept_outputs() == {"layers.0", "layers.1"}  # that of the last layer is needed at once
    malora.set_checkpointing(model, "lean", offload_fraction=0)
    norms = {f"layers.{place}.input_layernorm" for place in range(2)}
    assert kept_outputs() == (of_layers[0] | of_layers[1] | {"embed_tokens"}) - norms
    malora.set_checkpointing(model, "lean", offload_fraction=0.5)
    assert kept_outputs() == of_layers[1] - norms | {"layers.0"}  # the first norm of the other layer starts from it
    malora.set_checkpointing(model, "none")
    assert kept_outputs() == of_layers[0] | of_layers[1]


@pytest.mark.parametrize("mode", ["offload", "lean"])
def test_host_memory_is_reused_and_freed(mode, ids, monkeypatch):
    model = adapted(target_modules=["q_proj"])
    set_mode(model, mode)
    step(model, ids)
    taken = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: taken.append(k) or empty(*a, **k))
    step(model, ids)
    assert not any("pin_memory" in options for options in taken)
    memory = host_memory(model)
    buffers = [weakref.ref(buffer) for free in memory._free.values() for buffer in free]
    malora.set_checkpointing(model, "none")
    assert buffers and not any(buffer() is not None for buffer in buffers)


def host_memory(model):
    lean = LeanMode.of(model.get_base_model())
    if lean is not None:
        return lean.memory
    return model.get_base_model().model.layers[0]._gradient_checkpointing_func.offload.memory


@pytest.mark.parametrize("mode", MODES)
def test_a_copied_model_runs_by_itself(mode, ids):
    model = adapted(target_modules=["q_proj"])
    expected = step(model, ids)
    malora.set_checkpointing(model, mode)
    step(model, ids)
    copied = copy.deepcopy(model)
    assert malora.checkpointing_mode(copied) == mode
    assert_equal(step(copied, ids), expected)
    if mode != "full":
        assert host_memory(copied) is not host_memory(model)
    malora.set_checkpointing(copied, "none")
    assert malora.checkpointing_mode(model) == mode
    assert_equal(step(copied, ids), expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_pass_without_gradients_or_with_an_error_leaves_nothing_behind(mode, ids):
    model = adapted(target_modules=["q_proj"])
    expected = step(model, ids)
    malora.set_checkpointing(model, mode)
    with torch.no_grad():
        loss_of(model, ids)

    break_off(model, ids, RuntimeError)
    assert recompute.current_saving() is None
    assert_equal(step(model, ids), expected)


def break_off(model, ids, error):
    def fail(*_):
        raise error

    handle = model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(error):
        loss_of(model, ids)
    handle.remove()


def test_an_interrupted_lean_pass_frees_its_memory_in_the_next(ids):
    """No hook of a module runs after a KeyboardInterrupt."""
    model = adapted("lora")
    norms_and_swiglu_that_announce(model)
    expected = step(model, ids)
    set_mode(model, "lean")
    break_off(model, ids, KeyboardInterrupt)
    interrupted = recompute.current_saving()
    assert interrupted._notes and interrupted._copies
    assert_equal(step(model, ids), expected)
    assert not interrupted._notes and not interrupted._copies
    malora.set_checkpointing(model, "none")
    assert recompute.current_saving() is None


@pytest.mark.parametrize("mode", MODES)
def test_a_change_in_place_is_an_error(mode, ids):
    """As without checkpointing."""
    model = adapted(target_modules=["down_proj"], lora_dropout=0.0)
    norms_and_swiglu_that_announce(model)
    set_mode(model, mode, offload_fraction=0)
    inputs = []
    model.get_base_model().model.layers[1].register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    loss = loss_of(model, ids)
    with torch.no_grad():
        inputs[0].add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_state_that_changes_between_the_runs_is_an_error(ids):
    model = adapted(target_modules=["down_proj"])
    malora.set_checkpointing(model, "full")
    loss = loss_of(model, ids)
    model.get_base_model().model.layers[1].mlp.act_fn = torch.nn.Identity()
    with pytest.raises(RuntimeError, match=r"saved \d+ tensors in its forward pass and only \d+"):
        loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_a_model_is_freed_with_its_last_reference(mode, ids):
    model = adapted(target_modules=["q_proj"])
    malora.set_checkpointing(model, mode)
    loss = loss_of(model, ids)
    weight = weakref.ref(model.get_base_model().lm_head.weight)
    del model, loss
    gc.collect()
    assert weight() is None


def test_plain_checkpointing_of_transformers_is_replaced(ids):
    model = adapted(target_modules=["q_proj"])
    base = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    malora.set_checkpointing(model, "none")
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    malora.set_checkpointing(base, "full")  # the base model itself
    assert malora.checkpointing_mode(model) == "full"
    base.gradient_checkpointing_disable()
    assert malora.checkpointing_mode(model) == "none"


@pytest.mark.parametrize("arguments, problem", [
    (("half",), "unknown mode 'half'"),
    (("full", 0.5), "for mode 'lean' only"),
    (("lean", 1.5), "from 0 to 1"),
])  # fmt: skip
def test_wrong_options_are_errors(arguments, problem, llama):
    mode, *fraction = arguments
    with pytest.raises(ValueError, match=problem):
        malora.set_checkpointing(llama, mode, offload_fraction=fraction[0] if fraction else None)
    assert malora.checkpointing_mode(llama) == "none"


def test_a_model_without_layers_to_checkpoint_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Sequential has no layers that can be checkpointed"):
        malora.set_checkpointing(model, "full")
    malora.set_checkpointing(model, "none")


def test_autocast_is_the_same_in_the_second_run(ids):
    model = adapted(target_modules=["q_proj", "down_proj"]).float()

    def run():
        torch.manual_seed(3)
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss = loss_of(model, ids)
        loss.backward()
        return gradients(model)

    expected = run()
    for mode in MODES:
        malora.set_checkpointing(model, mode)
        assert_equal(run(), expected)


def test_a_capture_is_told_of_dropout_that_it_cannot_repeat():
    def has_other_dropout(model):
        malora.set_checkpointing(model, "full")
        layer = model.get_base_model().model.layers[0]
        return layer._gradient_checkpointing_func.has_other_dropout()

    assert has_other_dropout(adapted("lora"))
    assert not has_other_dropout(adapted("lora", lora_dropout=0.0))
    assert has_other_dropout(adapted(backend="dense"))
    model = adapted(backend="fused")
    assert not has_other_dropout(model)
    model.get_base_model().model.layers[0].self_attn.attention_dropout = 0.1
    assert has_other_dropout(model)
    assert not has_other_dropout(model.eval())


def test_a_graph_shares_no_buffer_with_work_that_is_not_captured():
    memory, cpu = HostMemory(), torch.device("cpu")
    warmed_up = memory.take(1000, cpu, in_graph=False)
    memory.give_back(warmed_up, cpu, in_graph=False)
    captured = memory.take(1020, cpu, in_graph=True)
    assert captured is warmed_up and captured.numel() == 1024
    memory.give_back(captured, cpu, in_graph=True)
    assert memory.take(1000, cpu, in_graph=False) is not captured
    assert memory.take(1000, cpu, in_graph=True) is captured
