"""Tiles fit into shared memory; for some sizes torch's matmuls are used instead of the kernels."""

import torch

from malora.fused.kernels import down_tiling, tiling


def test_as_many_tiles_are_prefetched_as_fit_and_plain_matmuls_run_where_none_do(monkeypatch):
    x = torch.empty(1, dtype=torch.bfloat16)
    sizes = [(96, 24), (192, 24), (96, 192), (256, 256)]

    def stages(launch):
        return [launch.stages(Z, L, x.device) for Z, L in sizes]

    assert stages(down_tiling.FORWARD) == [3, 3, 3, 3] and stages(down_tiling.BACKWARD) == [3, 3, 3, 2]
    assert not any(down_tiling.prefers_plain_matmul(x, Z, L) for Z, L in sizes)
    assert down_tiling.prefers_plain_matmul(x, 96, 264)
    monkeypatch.setattr(tiling, "shared_memory_bytes", lambda device: 99 << 10)  # of a consumer GPU
    assert stages(down_tiling.FORWARD) == [3, 2, 1, 1] and stages(down_tiling.BACKWARD) == [3, 1, 0, 0]
    assert [down_tiling.prefers_plain_matmul(x, Z, L) for Z, L in sizes] == [False, False, True, True]
