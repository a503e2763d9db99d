"""A deleted model frees everything: modules, weights and all copies of weights."""

import gc
import weakref

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from transformers import LlamaConfig, LlamaForCausalLM

import malora
from malora import BACKENDS, METHODS, MaloraConfig
from malora.fused import augmented_weights

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
MiB = 2**20
OUR_METHODS = [name for name in METHODS if isinstance(METHODS[name](), MaloraConfig)]
OUR_BACKENDS = [name for name in BACKENDS if name != "auto"]  # that is one of the others
# Without a GPU kernels are interpreted, which is slow. So not every method has every backend and every use: what keeps
# tensors alive depends on the kind of method. All methods train with the fused backend, which keeps most.
METHODS_USED = OUR_METHODS if ON_GPU else ["asylora", "molora", "malora"]
BACKENDS_USED = OUR_BACKENDS if ON_GPU else ["dense", "fused", "fp8"]
TRAINED = [
    (method, backend)
    for method in OUR_METHODS
    for backend in OUR_BACKENDS
    if method in METHODS_USED or backend == "fused"
]
IDS_SHAPE = (2, 8) if ON_GPU else (2, 3)  # the interpreter's time grows with the number of tokens
# On a GPU large enough that a leaked layer is more than the 1 MiB of noise that is allowed.
SHAPE = (
    {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 8}
    if ON_GPU
    else {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
)


@pytest.fixture(scope="module", autouse=True)
def short_collections():
    """Exempt what earlier tests imported and kept from the collections here, which otherwise take 0.3 s each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def without_size_limit(monkeypatch):
    monkeypatch.setattr(augmented_weights, "MIN_ELEMENTS", 1)


def train(model, ids):
    weights = malora.WeightCache(model)
    for _ in range(2):
        weights.refresh()
        with weights, torch.autocast(DEVICE, torch.bfloat16, enabled=ON_GPU):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()


def evaluate(model, ids):
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=ON_GPU):
        model.eval()(input_ids=ids, use_cache=False)


def break_off(model, ids):
    """Raise in the middle of a forward pass.

    A layer then waits for the other layers of its group.
    """

    def raises(*_):
        raise RuntimeError("broken off")

    handle = model.base_model.malora_layers[1].register_forward_pre_hook(raises)
    with pytest.raises(RuntimeError, match="broken off"):
        model(input_ids=ids, use_cache=False)
    handle.remove()


def checkpoint_without_backward(model, ids, **how):
    """Run with gradient checkpointing, whose hooks in the autograd graph refer to the model's layers."""
    model.get_base_model().gradient_checkpointing_enable(how or None)
    model.enable_input_require_grads()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=ON_GPU):
        return model(input_ids=ids, labels=ids, use_cache=False)


def checkpoint_reentrant(model, ids):
    checkpoint_without_backward(model, ids, use_reentrant=True)


def checkpoint_rows(model, ids):
    """Run with gradient checkpointing, and an adapter per row of the batch."""
    model.get_base_model().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=ON_GPU):
        model(input_ids=ids, labels=ids, use_cache=False, adapter_names=["__base__", "default"])


def checkpoint_and_keep_the_loss(model, ids):
    loss = checkpoint_without_backward(model, ids).loss
    if malora.has_router(model):
        loss = loss + malora.balance_loss(model)
    del loss


def inject(model, ids):
    """Run a base model that has adapters but no tuner around it."""
    base = model.unload()
    method = METHODS["molora" if malora.has_router(model) else "asylora"]
    inject_adapter_in_model(method(target_modules=["q_proj"]), base)
    base.train().gradient_checkpointing_enable()
    base.enable_input_require_grads()
    base(input_ids=ids, use_cache=False)


def capture(model, ids):
    from malora.backbone import cuda_graphs

    weights = malora.WeightCache(model)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    cuda_graphs.warm_up(step)
    refresh = cuda_graphs.capture_refresh(weights)
    with weights:
        graph = cuda_graphs.capture(step, passes=0)
    refresh()
    graph.replay()


def references(method, backend, use):
    """Build a model, use it, and return weak references.

    The references are to the model, its layers and their weights.
    """
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=64)).to(DEVICE, torch.bfloat16 if ON_GPU else None)
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]  # a group of three, and one of one
    model = get_peft_model(base, METHODS[method](backend=backend, target_modules=targets)).train()
    malora.optimize_backbone(model)
    use(model, torch.randint(64, IDS_SHAPE, device=DEVICE))
    layers = model.base_model.malora_layers
    return [weakref.ref(one) for one in (model, base, *layers, *(layer.base_layer.weight for layer in layers))]


def allocated_bytes():
    """Return the allocated bytes of the GPU.

    The workspaces that cuBLAS keeps for each stream do not count.
    """
    gc.collect()
    if not ON_GPU:
        return 0
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def assert_nothing_is_left(method, backend, use):
    before = allocated_bytes()
    found = references(method, backend, use)
    after = allocated_bytes()
    assert [reference for reference in found if reference() is not None] == []
    assert after - before < MiB


@pytest.mark.parametrize("method, backend", TRAINED)
def test_after_training(method, backend):
    assert_nothing_is_left(method, backend, train)


@pytest.mark.parametrize("use", [evaluate, break_off], ids=["evaluation", "an exception"])
@pytest.mark.parametrize("backend", BACKENDS_USED)
@pytest.mark.parametrize("method", METHODS_USED)
def test_after(use, method, backend):
    assert_nothing_is_left(method, backend, use)


@pytest.mark.parametrize(
    "use", [checkpoint_without_backward, checkpoint_reentrant, checkpoint_and_keep_the_loss, inject]
)
@pytest.mark.parametrize("backend", BACKENDS_USED)
@pytest.mark.parametrize("method", METHODS_USED)
def test_after_a_forward_pass_without_backward(use, method, backend):
    assert_nothing_is_left(method, backend, use)


def test_after_a_pass_with_rows_of_their_own():
    assert_nothing_is_left("malora", "dense", checkpoint_rows)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("backend", [name for name in BACKENDS_USED if BACKENDS[name].graph_safe])
@pytest.mark.parametrize("method", METHODS_USED)
def test_after_capture(method, backend):
    assert_nothing_is_left(method, backend, capture)
