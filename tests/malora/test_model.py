"""The tuner in PEFT: what it takes and what it refuses."""

import pytest
import torch
from peft import get_peft_model

from malora import METHODS
from tests.conftest import make_model
from tests.malora.test_methods import ours, randomise


@pytest.mark.parametrize("method", ours)
def test_adapter_names_are_refused_and_not_dropped(method, ids):
    model = randomise(get_peft_model(make_model(), METHODS[method]())).eval()
    for names in (["default", "default"], ["__base__", "default"]):
        with pytest.raises(ValueError, match="adapter_names= is not supported by malora"):
            model(ids, adapter_names=names)
        with pytest.raises(ValueError, match="adapter_names= is not supported by malora"):
            model.generate(input_ids=ids, adapter_names=names, max_new_tokens=2, pad_token_id=0)
    with pytest.raises(ValueError, match="alora_offsets= is not supported by malora"):
        model(ids, alora_offsets=[1, 1])
    assert torch.equal(model(ids, adapter_names=None).logits, model(ids).logits)
