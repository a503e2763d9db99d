"""New tensors that are NaN, as memory of a GPU may be.

An element that was never written must not reach a result.
"""

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    if torch.cuda.is_available():  # there it is what it is, and algorithms are those of every day
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
