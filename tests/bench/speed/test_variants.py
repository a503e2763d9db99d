"""Names of variants: a user's names select rows, and every method has some."""

import pytest
import torch

from bench.speed.variants import OURS, select_variants, variants

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_names_select_rows():
    names = [v.name for v in select_variants(["malora"], "train", GPU)]
    assert {"floor", "floor-captured", "peft-lora", "malora-dense-compiled"} < set(names)
    assert "molora-dense" not in names
    assert "malora-dense-compiled" not in [v.name for v in select_variants(["malora"], "decode", GPU)]
    assert {v.run for v in select_variants(["all"], "train", CPU)} == {"eager"}
    assert [v.name for v in select_variants(["floor-compiled"], "train", CPU)] == ["floor-compiled"]
    assert [name for name in variants() if "fp8" in name] == ["lora-fp8-liger-captured", "malora-fp8-liger-captured"]


@pytest.mark.parametrize("method", OURS)
def test_every_method_has_a_row_on_a_cpu(method):
    assert f"{method}-dense" in [v.name for v in select_variants([method], "train", CPU)]
