"""Parameters counted from sizes are those that a model has."""

import pytest
from peft import get_peft_model
from torch import nn

import malora
from malora.analysis.parameters import count_trainable

SIZES = (200, 96), (96, 160)


@pytest.mark.parametrize("method", malora.METHODS)
@pytest.mark.parametrize("router", [True, False])
def test_a_count_from_sizes_is_that_of_the_model(method, router):
    config = malora.METHODS[method](target_modules=["0", "1"], task_type=None)
    model = get_peft_model(nn.Sequential(*(nn.Linear(n, m, bias=False) for n, m in SIZES)), config)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    expected = sum(count for name, count in trained.items() if router or "router" not in name)
    assert sum(count_trainable(config, *sizes, router=router) for sizes in SIZES) == expected
