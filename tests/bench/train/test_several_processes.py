"""Two processes train as one does: losses, gradients, learning curves and router statistics."""

import pytest
import torch

from tests.bench.launch import COUNT, run_module
from tests.bench.train import together
from tests.bench.train.together import LABELS, MAX_TOKENS, METHODS


@pytest.fixture(scope="module")
def found(base_folder, tmp_path_factory):
    """Results of one process, and of each of two that share the batches."""
    path = tmp_path_factory.mktemp("together") / "results"
    done = run_module(together.__name__, base_folder, path)
    assert done.returncode == 0, done.stderr
    alone = together.results(base_folder)
    return alone, [torch.load(f"{path}.{number}") for number in range(COUNT)]


@pytest.mark.parametrize("split", MAX_TOKENS)
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_of_a_batch(method, kind, split, found):
    """Both processes have the gradients of the whole batch, with the balance loss in them."""
    alone, processes = found
    losses, gradients = alone["step", method, kind, split]
    for process in processes:
        got_losses, got = process["step", method, kind, split]
        torch.testing.assert_close(got_losses, losses, rtol=1e-5, atol=1e-6)
        assert got.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("split", MAX_TOKENS)
@pytest.mark.parametrize("method", METHODS)
def test_ten_steps(method, split, found):
    alone, processes = found
    expected = alone["training", method, split]
    assert len(expected["curve"]) == 10
    for process in processes:
        log = process["training", method, split]
        assert log["tokens"] == expected["tokens"]
        for part in ("curve", "router"):
            assert len(log[part]) == len(expected[part])
            for got, point in zip(log[part], expected[part], strict=True):
                assert got == pytest.approx(point, rel=1e-3), (part, point["step"])
