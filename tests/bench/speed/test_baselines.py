"""The expert loop: it agrees with the reference, forward and every gradient.

It is registered only on demand.
"""

import pytest
import torch

from bench.speed.baselines import registered_baselines
from malora import BACKENDS, METHODS, MaloraConfig
from tests.malora.backends.test_backends import assert_agrees, layer, methods, run


@pytest.fixture(autouse=True)
def baselines():
    with registered_baselines():
        yield


@pytest.mark.parametrize("method", methods)
def test_agrees_with_the_reference(method):
    assert_agrees(layer(METHODS[method](lora_dropout=0.3)), "loop", torch.randn(3, 11, 72, dtype=torch.float64))


def test_an_expert_without_tokens_gets_a_zero_gradient():
    made = layer(METHODS["molora"]())
    with torch.no_grad():
        made.malora_router["default"][:, 0] = torch.arange(8.0) - 100 * (torch.arange(8) == 3)
        made.malora_router["default"][3, 1:] = 0
    gradients = run(made, "loop", torch.randn(2, 6, 72, dtype=torch.float64).abs() + 1)
    assert (gradients["malora_B.default"][3] == 0).all() and torch.isfinite(gradients["x"]).all()


def test_the_loop_is_registered_only_inside_the_block():
    assert MaloraConfig(backend="loop", d=4).backend == "loop"
    before = dict(BACKENDS)
    with pytest.raises(RuntimeError), registered_baselines():
        raise RuntimeError
    assert set(before) - set(BACKENDS) == {"loop"}
    BACKENDS.update(before)
