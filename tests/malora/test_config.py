"""Options of MaloraConfig that choose layers: what PEFT would ignore is an error, as in its LoraConfig."""

import pytest
from peft import LoraConfig

from malora import MaloraConfig

PER_EXPERT = {"down": "A_t"}


@pytest.mark.parametrize("options", [
    {"target_modules": ".*q_proj", "layers_to_transform": [1]},
    {"target_modules": ".*q_proj", "layers_to_transform": 0},
    {"target_modules": "all-linear", "layers_to_transform": [1]},
    {"target_modules": ".*q_proj", "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_pattern": "layers"},
    {"layers_pattern": ["layers"]},
])  # fmt: skip
def test_a_choice_of_layers_that_would_be_ignored_is_an_error(options):
    with pytest.raises(ValueError) as pefts:
        LoraConfig(**options)
    with pytest.raises(ValueError) as ours:
        MaloraConfig(**PER_EXPERT, **options)
    assert str(ours.value).startswith(str(pefts.value).strip(" ."))  # then it says what to do


def test_layers_by_index_and_pattern_are_accepted():
    config = MaloraConfig(**PER_EXPERT, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    assert config.layers_to_transform == [1]
