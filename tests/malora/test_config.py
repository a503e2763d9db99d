"""Options of MaloraConfig that choose layers: what PEFT would ignore is an error, as in its LoraConfig."""

import pytest
from peft import LoraConfig

from malora import MaloraConfig

PER_EXPERT = {"down": "A_t"}


@pytest.mark.parametrize("options, message", [
    ({"target_modules": ".*q_proj", "layers_to_transform": [1]}, "layers_to_transform=.* cannot be used"),
    ({"target_modules": ".*q_proj", "layers_to_transform": 0}, "layers_to_transform=0 cannot be used"),
    ({"target_modules": "all-linear", "layers_to_transform": [1]}, "cannot be used with target_modules='all-linear'"),
    ({"target_modules": ".*q_proj", "layers_pattern": "layers"}, "layers_pattern='layers' cannot be used"),
    ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "no effect without layers_to_transform"),
    ({"layers_pattern": ["layers"]}, "no effect without layers_to_transform"),
])  # fmt: skip
def test_a_choice_of_layers_that_would_be_ignored_is_an_error(options, message):
    with pytest.raises(ValueError, match=r"cannot be used|must also be specified"):
        LoraConfig(**options)
    with pytest.raises(ValueError, match=message):
        MaloraConfig(**PER_EXPERT, **options)


def test_layers_by_index_and_pattern_are_accepted():
    config = MaloraConfig(**PER_EXPERT, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    assert config.layers_to_transform == [1]
