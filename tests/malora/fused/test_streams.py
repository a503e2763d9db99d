"""Tasks on parallel CUDA streams.

Outside a graph they run in order, and in one they have equal results and plain errors.
"""

from functools import partial

import pytest
import torch

from malora.fused.streams import run_on_parallel_streams

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_outside_a_graph_tasks_run_in_order():
    done = []
    results = run_on_parallel_streams(
        torch.ones(1), [lambda index=index: done.append(index) or index for index in range(3)]
    )
    assert results == done == [0, 1, 2]


@needs_gpu
def test_a_graph_with_parallel_tasks_equals_sequential_tasks():
    """Replay chains of tasks with new inputs.

    The memory of the tasks returns to the stream where it was allocated.
    """
    size, times = 256, 20
    x, weights = torch.randn(size, size, device="cuda"), torch.randn(3, size, size, device="cuda") / size**0.5

    def branch(y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (y @ w).tanh() @ w

    def chain() -> torch.Tensor:
        y = x
        for _ in range(times):
            y = sum(run_on_parallel_streams(y, [partial(branch, y, w) for w in weights])).tanh()
        return y

    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain()
    stream.synchronize()
    with torch.cuda.graph(graph):
        replayed = chain()
    for seed in range(50):
        x.copy_(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))
        expected = chain()
        graph.replay()
        torch.testing.assert_close(replayed, expected, rtol=1e-4, atol=1e-4)


@needs_gpu
def test_a_task_that_fails_during_capture_raises_its_own_error():
    x = torch.ones(8, 8, device="cuda")

    def fails():
        raise torch.cuda.OutOfMemoryError("no memory left")

    x @ x  # cuBLAS must be initialized outside a capture
    torch.cuda.synchronize()
    with pytest.raises(torch.cuda.OutOfMemoryError, match="no memory left"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        run_on_parallel_streams(x, [lambda: x @ x, lambda: x + x, fails])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product, _ = run_on_parallel_streams(x, [lambda: x @ x, lambda: x + x])
    graph.replay()
    assert product.eq(8).all()
