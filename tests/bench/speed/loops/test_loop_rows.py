"""Rows of training programs: each has one name, and its program trains the model that the name says."""

import itertools

import pytest
import torch
from peft import get_peft_model
from torch import nn

import malora
from bench.errors import UserError
from bench.models.backbone import SHAPES, backbone
from bench.speed.loops import programs, rows
from bench.speed.loops.rounds import batches
from bench.speed.loops.rows import BASES, CHECKPOINTING, LOOPS, all_rows, select_rows
from bench.speed.steps import Workload

CPU = torch.device("cpu")
WORK = Workload("train", batch=2, length=16, tokens=64, dropout=0.0, vocab_size=512)


def losses(name, steps=2):
    base = backbone(SHAPES["toy"], 1, CPU)
    program = all_rows()[name].program(base, batches(WORK, CPU), 0.0)
    return [loss.item() for loss in itertools.islice(program, steps)]


def select(names, loops="plain", checkpointing="none", bases="bf16", on_cpu=False, world=1):
    found = select_rows(names.split(","), loops.split(","), checkpointing.split(","), bases.split(","), on_cpu, world)
    return [row.name for row in found]


def test_a_method_brings_the_baselines_of_the_same_kind():
    assert select("malora", "plain,captured") == [
        "floor", "floor-compiled", "peft-lora", "peft-lora-liger", "peft-lora-compiled", "peft-lora-captured",
        "unsloth-lora", "unsloth-lora-no-dropout", "malora-plain", "malora-captured",
    ]  # fmt: skip
    assert select("lora", "plain", "full,lean", on_cpu=True) == [
        "floor-full", "peft-lora-full", "unsloth-lora-full", "unsloth-lora-full-no-dropout",
        "lora-full-plain", "lora-lean-plain",
    ]  # fmt: skip
    assert select("malora", "plain", "offload", "nf4") == [
        "peft-lora-nf4-full", "unsloth-lora-nf4-full", "malora-nf4-offload-plain",
    ]  # fmt: skip
    assert select("malora", "plain,captured", on_cpu=True, world=2) == [
        "floor", "peft-lora", "peft-lora-ddp", "peft-lora-fsdp", "unsloth-lora", "unsloth-lora-no-dropout",
        "malora-plain", "malora-plain-ddp", "malora-plain-fsdp", "malora-captured", "malora-captured-ddp",
    ]  # fmt: skip
    assert select("floor,malora-fp8-captured") == ["floor", "malora-fp8-captured"]


def test_names_are_unique_and_no_row_is_out_of_reach():
    found = {
        select_name
        for method in rows.METHODS
        for select_name in select(method, *map(",".join, (LOOPS, CHECKPOINTING, BASES)), world=2)
    }
    assert found == set(all_rows())


@pytest.mark.parametrize(
    "name, message",
    [("malora-fast", "unknown variant 'malora-fast'"), ("malora", "no row with --loop compiled and --checkpointing")],
)
def test_a_row_that_is_not_there_is_an_error(name, message):
    with pytest.raises(UserError, match=message):
        select(name, "compiled", "lean")


def test_all_programs_of_a_method_take_the_same_steps():
    """The checkpointing and the loop change no loss, without dropout."""
    torch.manual_seed(0)
    expected = losses("peft-lora")
    assert losses("peft-lora-full") == pytest.approx(expected)
    plain = losses("malora-plain")
    assert plain == pytest.approx(expected, abs=0.05) and plain[1] != plain[0]  # the balance loss is in it
    for name in ("malora-captured", "malora-full-plain", "malora-lean-captured", "malora-offload-plain"):
        assert losses(name) == pytest.approx(plain, abs=1e-3), name


def test_the_floor_trains_nothing_and_goes_back_to_the_embeddings():
    base = backbone(SHAPES["toy"], 1, CPU)
    seen = []
    base.model.layers[0].register_full_backward_hook(lambda *call: seen.append(call[1]))
    next(all_rows()["floor-full"].program(base, batches(WORK, CPU), 0.0))
    assert len(seen) == 2 and not any(parameter.requires_grad for parameter in base.parameters())


def test_only_decoder_layers_are_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    programs.compile_layers(get_peft_model(backbone(SHAPES["toy"], 2, CPU), malora.METHODS["malora"]()))
    assert compiled == ["LlamaDecoderLayer"] * 2
