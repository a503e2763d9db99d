"""Passes of several runs at once: padded to one shape, and captured."""

import pytest
import torch

import bench.train.together
from bench.runs.together import run_together
from bench.train.batching import IGNORED_TARGET, Encoded, collate
from bench.train.joint_step import Part, divide_parts, join_parts
from tests.bench.runs.test_together import CLOSE, plan, points, without_dropout
from tests.malora.backbone.fake_graphs import graphs  # noqa: F401  # a fixture

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the graphs are real")


def part(name, lengths, label_length=1):
    encoded = [Encoded(list(range(1, n + 1)), label_length) for n in lengths]
    (batch,) = collate(encoded, 0, row_length=16)
    return Part(name, name != "lora", batch)


def test_micro_batches_are_padded_to_the_shape_of_the_largest():
    parts = [part("lora", [17, 3]), part("malora", [17, 14, 9], 2)]
    joined = join_parts(parts, pad_id=99)
    assert joined["ids"].shape == joined["example"].shape == (2 * 3, 16) and joined["target"].shape == (2 * 6,)
    small, large = (one.batch for one in parts)
    for name in ("ids", "position", "example"):
        assert torch.equal(joined[name][3:], getattr(large, name))
        assert torch.equal(joined[name][:2], getattr(small, name)[:2])
    assert (joined["ids"][2] == 99).all() and not joined["example"][2].any()
    assert torch.equal(joined["row"][6:], large.row + 3) and torch.equal(joined["row"][:2], small.row)
    assert (joined["target"][2:6] == IGNORED_TARGET).all() and joined["labels"].tolist() == [2.0, 6.0]
    assert joined["adapters"] == ("lora", "malora") and joined["routers"] == (False, True)


@pytest.mark.parametrize("max_tokens, sizes", [(1, [1] * 5), (96, [2, 3]), (10_000, [5])])
def test_parts_are_divided_evenly_among_passes(max_tokens, sizes):
    parts = [part(f"run{k}", [17, 14] if k == 3 else [17, 3]) for k in range(5)]  # 32 tokens each after padding
    assert [len(chunk) for chunk in divide_parts(parts, max_tokens)] == sizes


@on_cpu
@pytest.mark.usefixtures("fresh_accelerator")
def test_captured_passes_train_as_eager_ones(base_folder, tmp_path, graphs, monkeypatch):  # noqa: F811
    """Also when a run diverges and the others are captured anew, and in the router statistics."""
    monkeypatch.setattr(bench.train.together, "ROUTER_EVERY", 2)
    runs = (("lora", 0, 1e-2, {}), ("malora", 1, 1e-2, {}), ("molora", 0, 1e30, {}))
    captured = list(run_together(plan(without_dropout(base_folder, tmp_path / "1", max_items=1), *runs), 3))
    assert 2 <= graphs.captures <= 6
    monkeypatch.setattr("bench.train.joint_step.MAX_GRAPHS", 0)
    captures = graphs.captures
    eager = list(run_together(plan(without_dropout(base_folder, tmp_path / "2", max_items=1), *runs), 3))
    assert graphs.captures == captures
    for got, expected in zip(captured, eager, strict=True):
        assert got.status == expected.status and len(got.train.router) == len(expected.train.router)
        if got.status == "diverged":
            continue
        torch.testing.assert_close(points(got, "loss"), points(expected, "loss"), **CLOSE)
        assert got.train.router or got.config.method == "lora"
        for mine, theirs in zip(got.train.router, expected.train.router, strict=True):
            assert mine.entropy == pytest.approx(theirs.entropy, rel=1e-3)
    assert [record.status for record in captured] == ["ok", "ok", "diverged"]
