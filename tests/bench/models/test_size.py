"""The lower bound of an adapter's size."""

import pytest
from peft import get_peft_model

import malora
from bench.models.size import count_at_least
from tests.conftest import make_model


@pytest.mark.parametrize("method", malora.METHODS)
def test_no_adapter_has_fewer_trained_values_than_the_bound(method):
    """A bound above the true number would refuse adapters that fit; one far below would refuse none."""
    model, config = make_model(), malora.make_config(method, target_modules=["q_proj", "up_proj"])
    bound = count_at_least(model, config)
    trained, _ = get_peft_model(model, config).get_nb_trainable_parameters()
    assert trained / 4 < bound <= trained
