import pytest
import torch

from malora.fused.streams import run_on_parallel_streams


def test_outside_of_a_graph_works_run_in_their_order():
    done = []
    found = run_on_parallel_streams(
        torch.ones(1), [lambda place=place: done.append(place) or place for place in range(3)]
    )
    assert found == done == [0, 1, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_with_works_side_by_side_computes_as_a_row_of_them_does():
    """Chains of works whose memory comes back to the streams it is of, replayed with new inputs."""
    size, times = 256, 20
    x, weights = torch.randn(size, size, device="cuda"), torch.randn(3, size, size, device="cuda") / size**0.5

    def chain() -> torch.Tensor:
        y = x
        for _ in range(times):
            parts = run_on_parallel_streams(y, [lambda y=y, w=w: (y @ w).tanh() @ w for w in weights])
            y = sum(parts).tanh()
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_work_that_fails_in_a_capture_says_so_itself():
    x = torch.ones(8, 8, device="cuda")

    def fails():
        raise torch.cuda.OutOfMemoryError("no room")

    x @ x  # the library of matrix products is set up outside of a capture
    torch.cuda.synchronize()
    with pytest.raises(torch.cuda.OutOfMemoryError, match="no room"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        run_on_parallel_streams(x, [lambda: x @ x, lambda: x + x, fails])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scaled_matmul, _ = run_on_parallel_streams(x, [lambda: x @ x, lambda: x + x])
    graph.replay()
    assert scaled_matmul.eq(8).all()
