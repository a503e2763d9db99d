"""The profiler: its rows run in turns, what cannot run says why, and its goal table is arithmetic on a record."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from bench import goals, record, rounds, sensors, speed, speed_report
from bench import variants as bench_variants
from bench.__main__ import main
from bench.liger import LigerKernels
from bench.measure import DecodeStep, TrainStep, Work, backbone_flops
from bench.record import SpeedRecord
from bench.rivals import registered
from bench.variants import DEFAULT_BACKENDS, SHAPES, Subject, Variant, backbone, choose, variants
from tests.bench.conftest import CLEAN, stand_in_for_liger

CPU = torch.device("cpu")
TOY = SHAPES["toy"]


def run(tmp_path, *arguments) -> SpeedRecord:
    assert speed.main([*map(str, arguments), "--results", str(tmp_path)]) == 0
    return record.read_speed(tmp_path)[-1]


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch):
    monkeypatch.setattr(rounds, "WARM_SECONDS", 0.1)
    monkeypatch.setattr(rounds, "ROUND_SECONDS", 0.1)


def test_a_call_makes_a_record_a_table_and_a_figure(tmp_path, capsys):
    names = ["floor", "peft-lora", "malora-dense", "molora-loop"]
    made = run(tmp_path, "--variant", ",".join(names), "--rounds", 2, "--layers", 1)
    assert [row["name"] for row in made.rows] == names
    for row in made.rows:
        parts = row["seconds"]
        assert len(parts["step"]) >= 2 and set(parts) == {"forward", "backward", "optimizer", "step"}
        assert parts["step"][0] == pytest.approx(sum(parts[part][0] for part in ("forward", "backward", "optimizer")))
    assert made.ceilings["before"]["matrix_flops_per_second"] > 0 and not made.complete
    page = (tmp_path / "table10.md").read_text()
    assert "These are a CPU's figures" in page and "cut to 1 layers" in page
    assert "*14.687*" in page and "*1.07*" in page  # the paper's MALoRA, and what it is of its LoRA
    assert ">malora-dense</text>" in (tmp_path / "figure4c.svg").read_text()
    assert str(tmp_path) in capsys.readouterr().out
    assert main(["publish", "--profile", "speed", "--results", str(tmp_path)]) == 0
    assert f"{made.id} was cut short" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_inference(mode, tmp_path, capsys):
    made = run(tmp_path, "--variant", "peft-lora,malora-dense", "--rounds", 1, "--layers", 1, "--mode", mode)
    assert all(row["status"] == "ok" for row in made.rows)
    assert f"## toy, {mode}" in capsys.readouterr().out


def test_a_sweep_has_a_row_a_value_and_backend(tmp_path, capsys):
    arguments = ("--variant", "molora,malora", "--sweep", "top-k", "--tokens", 16, "--rounds", 1)
    made = run(tmp_path, *arguments)
    backends = set(DEFAULT_BACKENDS) - ({"fused"} if not torch.cuda.is_available() else set())
    assert len(made.rows) == 4 * 2 * (len(backends) + 1)  # the sorted one besides
    assert {row["status"] for row in made.rows} == {"ok"} and "| top-k |" in capsys.readouterr().out.replace("  ", "")


def test_a_sweep_says_where_a_sparse_row_is_the_fastest():
    def swept(method, **milliseconds):  # at 8, 64 and 256 experts; 0 did not run
        for name, (*steps,) in milliseconds.items():
            for value, step in zip((8, 64, 256), steps, strict=True):
                made = row(f"{method}-{name}", step, method=method) | {"backend": name, "value": value}
                yield made if step else made | {"status": "oom", "seconds": {}}

    rows = [
        *swept("molora", fused=(1, 2, 8), dispatch=(9, 9, 3), sorted=(2, 1.5, 4)),
        *swept("malora", fused=(1, 2, 0), sorted=(2, 3, 4)),
        *swept("moasylora", fused=(1, 2, 3), sorted=(2, 3, 0)),
    ]
    page = speed_report.section(make_speed(mode="layer", rows=rows, sweep="experts", flops=None))
    molora = "`molora-sorted` is the fastest at 64; `molora-dispatch` is the fastest at 256"
    assert f"Crossover, molora by experts: {molora}.\n" in page
    assert "Crossover, malora by experts: `malora-sorted` is the fastest at 256.\n" in page
    assert page.endswith("Crossover, moasylora by experts: no sparse row wins.")


class Fake:
    """A row that writes down when it runs, and fails where it is told to."""

    work = Work("train", batch=4, length=8, tokens=64, dropout=0.0, vocab_size=8)

    def __init__(self, name, log, fits=4, error=None):
        self.about, self.log, self.batch, self.fits, self.error = {"name": name}, log, 4, fits, error

    @contextmanager
    def session(self):
        self.log.append(self.about["name"])
        if self.error:
            raise self.error
        if self.batch > self.fits:
            raise torch.OutOfMemoryError("Tried to allocate 2 GiB.\nmore")
        yield lambda done: done("forward")


def test_rows_are_measured_in_turns():
    log = []
    rounds.measure([Fake(name, log) for name in "abc"], 3, CPU)
    assert log == list("abcabccbaabc")  # the first pass, and three rounds


def test_the_devices_sensors_are_read_while_a_row_runs(monkeypatch):
    monkeypatch.setattr(sensors, "PERIOD", 0.001)
    monkeypatch.setattr(sensors, "READINGS", {"clock_mhz": lambda device: 1980, "watts": lambda device: next(watts)})
    watts, gpu = iter(range(10**9)), torch.device("cuda")
    with sensors.Sensors(gpu) as read:
        while len(read.samples["watts"]) < 3:
            time.sleep(0.001)
    medians, taken = read.medians(), list(read.samples["watts"])
    assert medians["clock_mhz"] == 1980 and medians["watts"] == statistics.median(taken)
    time.sleep(0.01)
    assert read.samples["watts"] == taken  # it has stopped

    def unreadable(device):
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(sensors, "READINGS", {"clock_mhz": unreadable})
    for device in (gpu, CPU):
        with sensors.Sensors(device) as read:
            time.sleep(0.01)
        assert read.medians() is None


def test_a_turn_begins_with_heat_and_what_the_sensors_say_is_kept(monkeypatch):
    class Read(sensors.Sensors):
        def medians(self):
            return {"watts": 700.0}

    monkeypatch.setattr(rounds, "Sensors", Read)
    monkeypatch.setattr(rounds, "heat", lambda device, seconds: log.append(seconds))
    (found,), _ = rounds.measure([Fake("a", log := [])], 2, CPU)
    assert log == ["a", *["a", rounds.HEAT_SECONDS] * 2] and found["sensors"] == {"watts": [700.0, 700.0]}


def test_no_round_is_begun_that_would_end_too_late():
    found, done = rounds.measure([Fake("a", log := [])], 5, CPU, seconds=0)
    assert done == 1 and log == ["a"] * 2 and found[0]["seconds"]["step"]


def test_every_round_times_as_many_steps_after_as_many_that_it_does_not(monkeypatch):
    monkeypatch.setattr(rounds, "_ignore", lambda part: warm_ups.append(part))
    warm_ups: list[str] = []
    (found,), _ = rounds.measure([Fake("short", [])], 2, CPU)
    assert len(warm_ups) == 2 + 2 * rounds.MOST_STEPS  # two in the first pass
    assert len(found["seconds"]["step"]) == 2 * rounds.MOST_STEPS


def test_ligers_functions_are_there_only_while_its_row_runs(monkeypatch):
    from transformers.models.llama import modeling_llama

    original, fused = modeling_llama.rotate_half, object()

    def apply(model, **_):
        modeling_llama.rotate_half = fused
        modeling_llama.__builtins_dict___0 = {}  # torch.compile leaves such names

    stand_in_for_liger(monkeypatch, apply)
    monkeypatch.setattr(bench_variants, "has_liger", lambda: True)
    monkeypatch.setattr(modeling_llama, "__builtins_dict___0", None, raising=False)  # so that it is gone in the end
    del modeling_llama.__builtins_dict___0
    subject = Subject(variants()["floor-liger"], backbone(TOY, 1, CPU), "prefill", 0.0)
    assert modeling_llama.rotate_half is original
    subject.load()
    assert modeling_llama.rotate_half is fused
    subject.park()
    assert modeling_llama.rotate_half is original


@pytest.mark.parametrize("as_it_comes", [False, True])
def test_norms_are_torchs_own_where_liger_is_ours(as_it_comes, monkeypatch):
    model = backbone(TOY, 1, CPU).float()
    norm, x = model.model.norm, torch.randn(3, 5, model.config.hidden_size)
    expected = norm(x)

    def apply(model, **_):
        norm.casting_mode, norm.forward = "llama", torch.relu

    stand_in_for_liger(monkeypatch, apply)
    LigerKernels(model.bfloat16(), as_it_comes)
    if as_it_comes:
        assert norm.forward is torch.relu
    else:
        with torch.autocast("cpu", torch.bfloat16):
            y = norm(x.bfloat16())
        assert y.dtype == torch.bfloat16 and (y - expected).norm() < 4e-3 * expected.norm()


def test_training_that_does_not_fit_is_tried_with_smaller_micro_batches():
    (half, none, broken, fine), _ = rounds.measure(
        [
            Fake("half", [], fits=2),
            Fake("none", [], fits=0),
            Fake("broken", [], error=ValueError("why")),
            Fake("x", []),
        ],
        1,
        CPU,
    )
    assert (half["status"], half["batch"]) == ("ok", 2) and "micro-batches of 2" in half["reason"]
    assert (none["status"], none["reason"]) == ("oom", "Tried to allocate 2 GiB.")
    assert (broken["status"], broken["reason"]) == ("failed", "ValueError: why")
    assert fine["status"] == "ok" and fine["seconds"]["step"]


@pytest.mark.parametrize("run, passes", [("eager", 1), ("compiled", 2)])
def test_a_slow_row_gets_two_samples_and_is_warm_once_it_has_run_or_been_compiled(run, passes, monkeypatch):
    monkeypatch.setattr(rounds, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(rounds, "_ignore", lambda part: warm_ups.append(part))
    row, warm_ups = Fake("slow", log := []), []
    row.about["run"] = run
    (slow,), _ = rounds.measure([row], 5, CPU)
    assert log == ["slow"] * 3 and len(slow["seconds"]["step"]) >= 2
    assert len(warm_ups) == passes and slow["warm_seconds"] > 0


def test_all_variants_share_one_set_of_frozen_weights():
    base = backbone(TOY, 1, CPU)
    before = {name: p.clone() for name, p in base.named_parameters()}
    with registered():
        rows = variants()
        for name in ("floor", "peft-lora", "peft-dora", "malora-dense", "asylora-dense-compiled", "molora-loop"):
            subject = Subject(replace(rows[name], run="eager"), base, "train", 0.05)
            shared = {id(p) for p in base.parameters()}
            assert shared <= {id(p) for p in subject.model.parameters()}, name
            assert all(p.any() and not p.is_meta for p in subject.own), name
            subject.load()
            ids = torch.randint(0, 512, (2, 8))
            subject.model(input_ids=ids, labels=ids).loss.backward()
            assert all((p.grad is not None) == p.requires_grad for p in subject.model.parameters()), name
            subject.park()
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_decoding_over_a_static_cache_makes_the_tokens_of_generate():
    work = Work("decode", batch=2, length=5, tokens=6, dropout=0.0, vocab_size=512)
    eager = Variant("malora-dense", "malora", "dense")
    subject = Subject(eager, backbone(TOY, None, CPU), "decode", 0.0)
    expected = DecodeStep(subject, work, 2)(lambda part: None)
    subject.variant = replace(eager, run="static")  # what a captured row does, without the graph
    step = DecodeStep(subject, work, 2)
    for _ in range(2):  # a second generation starts anew
        assert torch.equal(step(lambda part: None), expected) and expected.shape == (2, 6)


class FakeGraph:
    """What is replayed writes its gradients where those of the capture stand."""

    def __init__(self, run):
        run()
        self.run, self.parameters = run, run.__self__.parameters
        self.static = [p.grad for p in self.parameters]

    def replay(self):
        self.run()
        for static, p in zip(self.static, self.parameters, strict=True):
            static.copy_(p.grad)


@pytest.mark.parametrize("tokens", [8, 24])
def test_a_captured_step_trains_on_all_micro_batches(tokens, monkeypatch):
    monkeypatch.setattr("bench.measure.capture", FakeGraph)
    work = Work("train", batch=2, length=4, tokens=tokens, dropout=0.0, vocab_size=512)
    eager = Variant("malora-dense", "malora", "dense")
    trained = []
    for run in ("eager", "captured"):
        subject = Subject(eager, backbone(TOY, 1, CPU), "train", 0.0)
        subject.variant = replace(eager, run=run)
        step = TrainStep(subject, work, 2)
        for _ in range(2):
            step(lambda part: None)
        trained.append([p.detach() for p in step.parameters])
    for plain, replayed in zip(*trained, strict=True):
        torch.testing.assert_close(plain, replayed)


def test_the_backbone_s_operations():
    """Written out for one layer of the toy: q, k, v, o of 128 × 128, three of the MLP of 128 × 256, a head of 512."""
    base = backbone(TOY, 1, CPU)
    linear, attention = 2 * (4 * 128 * 128 + 3 * 128 * 256 + 128 * 512), 2 * 64 * 128
    work = Work("train", batch=4, length=64, tokens=256, dropout=0.0, vocab_size=512)
    assert backbone_flops(base, work) == 256 * (2 * linear + 3 * attention)
    assert backbone_flops(base, replace(work, mode="prefill")) == 256 * (linear + attention)
    assert backbone_flops(base, replace(work, mode="decode")) is None


def test_names_stand_for_rows():
    names = [v.name for v in choose(["malora"], "train", torch.device("cuda"))]
    assert {"floor", "floor-captured", "peft-lora", "malora-dense-compiled"} < set(
        names
    ) and "molora-dense" not in names
    assert "malora-dense-compiled" not in [v.name for v in choose(["malora"], "decode", torch.device("cuda"))]
    assert {v.run for v in choose(["all"], "train", CPU)} == {"eager"}
    assert [v.name for v in choose(["floor-compiled"], "train", CPU)] == ["floor-compiled"]
    assert [name for name in variants() if "fp8" in name] == ["lora-fp8-liger-captured", "malora-fp8-liger-captured"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--variant", "mola"], "unknown variant 'mola'; there are all, lora, asylora"),
        (["--variant", "malora-dense-captured"], "malora-dense-captured needs a GPU"),
        (["--variant", "malora-fused"], "malora-fused needs a GPU"),
        (["--shape", "llama3"], "unknown shape 'llama3'; there are llama2-7b, smollm2-135m, toy"),
        (["--mode", "serve"], "unknown mode 'serve'; there are train, prefill, decode"),
        (["--sweep", "depth"], "unknown sweep 'depth'; there are experts, rank, tokens, top-k"),
        (["--sweep", "rank", "--mode", "decode"], "leave --mode decode out"),
        (["--sweep", "rank", "--variant", "peft-lora"], "--sweep takes mixtures of ours, molora"),
        (["--tokens", "100"], "--tokens 100 is no multiple of --batch 4 × --length 64"),
        (["--mode", "prefill", "--tokens", "7"], "leave --tokens 7 out"),
        (["--rounds", "0"], "'0' is not a whole number from 1"),
        (["--dropout", "1"], "'1' is not a number from 0 to below 1"),
    ],
)
def test_wrong_arguments(arguments, message, capsys, tmp_path):
    try:
        code = speed.main([*arguments, "--results", str(tmp_path / "results")])
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and message in error.strip().splitlines()[-1] and not list(tmp_path.iterdir())


def test_every_option_has_a_help_line_and_a_default():
    for action in speed._parser()._actions:
        assert action.help and not action.required, action.option_strings
        assert action.default is not None or "default" in action.help or action.dest in ("sweep", "layers")
    assert isinstance(speed._parser(), argparse.ArgumentParser)


def test_a_broken_record_is_found_before_the_measurement(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "broken.json").write_text(json.dumps({"schema": 1})[:-3])
    assert speed.main(["--results", str(tmp_path)]) == 2
    assert "broken.json is not a whole record of speed" in capsys.readouterr().err


def test_it_needs_nothing_of_the_harness_that_scores():
    code = "import sys; sys.modules.update(dict.fromkeys(('datasets', 'lm_eval', 'evaluate'))); import bench.speed"
    assert subprocess.run([sys.executable, "-c", code], cwd=record.ROOT, timeout=120).returncode == 0


def row(name, step, peak=10.0, method=None, waits=0, backend=None) -> dict:
    return {
        "name": name, "status": "ok", "reason": None, "method": method, "backend": backend, "batch": 4,
        "trainable": 5,
        "seconds": {"step": [step, step, 2 * step]}, "peak_bytes": {"allocated": peak, "reserved": peak},
        "sensors": {"clock_mhz": [1500.0, 1700.0], "watts": [690.0, 710.0]},
        "kernels": 7, "launches": 7, "synchronisations": waits,
        "where": [[f"slow_kernel_of_{name}", 3, 0.75 * step], ["fast_kernel", 4, 0.125 * step]],
    }  # fmt: skip


def make_speed(shape="llama2-7b", mode="train", rows=None, **options) -> SpeedRecord:
    asked = {"variant": "all", "sweep": None, "batch": 4, "length": 1024, "tokens": 16384, "dropout": 0.05,
             "rounds": 3, "layers": None, "flops": 8}  # fmt: skip
    rate = {"matrix_flops_per_second": 16.0, "copy_bytes_per_second": 1.0}
    packages = {"packages": dict.fromkeys(("torch", "transformers", "peft"), "1.0"), "cuda": "13"}
    rows = rows or [
        row("floor", 1.2), row("floor-compiled", 1.0), row("peft-lora", 2.0), row("lora-plain-compiled", 1.25),
        row("malora-dense", 4.0, 99.0, "malora", 3), row("malora-dense-compiled", 1.0625, 8.0, "malora"),
        row("malora-fp8-liger-captured", 0.5, method="malora", backend="fp8"),  # too inexact to stand for MALoRA
        row("molora-dense-compiled", 1.125, method="molora"), row("lora-dense-compiled", 1.0, method="lora"),
        row("molora-loop", 17.0), row("molora-sorted", 1.5), row("molora-sorted-compiled", 1.275),
    ]  # fmt: skip
    return SpeedRecord(shape, mode, asked | options, CLEAN | packages, {"before": rate, "after": rate}, rows)


def records() -> list[SpeedRecord]:
    small = [row("floor-compiled", 1.0), row("peft-lora", 3.0), row("malora-dense-captured", 0.2, method="malora")]
    decode = [row("peft-lora", 3.0), row("malora-dense-captured", 1.0, method="malora")]
    slower = [row("peft-lora", 3.0), row("malora-dense-captured", 1.5, method="malora")]
    return [
        make_speed(),
        make_speed("smollm2-135m", rows=small, batch=16, length=128),
        make_speed(mode="decode", rows=decode, batch=1, flops=None),
        make_speed(mode="decode", rows=slower, batch=16, flops=None),
    ]


def test_the_goals_are_arithmetic_on_records():
    found = goals.goals(records())
    measured = [1.0625, 0.85, 2 / 1.0625, 16, 1.2, 1.125, 0.8, 0, 15, 2, 0.5]
    assert [goal.measured for goal in found] == pytest.approx(measured)
    assert [goal.verdict for goal in found] == ["yes"] * 5 + ["**no**"] + ["yes"] * 5
    cut = goals.goals([make_speed(layers=2)])
    assert {(goal.measured, goal.verdict) for goal in cut} == {(None, "")}


def test_a_later_record_of_fewer_rivals_stands_beside_the_one_of_most():
    earlier, few, again = make_speed(), make_speed(variant="malora"), make_speed(variant="malora,molora-loop")
    few.provenance = again.provenance = earlier.provenance | {"time": "2099-01-01T00:00:00+00:00"}
    few.rows = [row for row in few.rows if row["name"] != "molora-loop"]
    assert [g.measured for g in goals.goals([earlier, few])] == [g.measured for g in goals.goals([earlier])]
    few.rows[5] = row("malora-dense-compiled", 1.125, 8.0, "malora")
    first, *_ = goals.goals([few, earlier])
    assert (first.measured, first.later, first.verdict) == (1.0625, (1.125,), "**not always**")
    lines = goals.goal_table([few, earlier]).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[3:6]] == ["1.062", "**1.125**", "**not always**"]
    assert lines[-1].endswith(f"Later records, and steps timed: {few.id[-8:]}: 3.")
    again.rows[5] = row("malora-dense-compiled", 1.03125, 8.0, "malora")
    assert goals.goals([earlier, few, again])[0].measured == 1.03125


def test_a_row_that_did_not_run_is_no_figure():
    made = make_speed()
    made.rows[-3] |= {"status": "oom", "reason": "too much", "seconds": {}}
    assert goals.goals([made])[3].measured is None and "oom: too much" in speed_report.section(made)


def test_the_table_says_ratios_and_shares():
    (line,) = (line for line in speed_report.section(make_speed()).splitlines() if line.startswith("| peft-lora "))
    cells = [cell.strip() for cell in line.split("|")]
    # × compiled floor, × floor, × PEFT LoRA; 8 operations in 2 s, where the device does 16 a second.
    assert cells[8:12] == ["2", "1.67", "1", "25.0%"] and cells[5] == "2" and cells[7] == "8,192"
    assert cells[14:16] == ["1600", "700"]  # MHz, W


def test_the_page_says_where_the_time_goes():
    """Of MALoRA's fastest row and of the compiled floor, which it is measured against."""
    page = speed_report.section(make_speed())
    (line,) = (line for line in page.splitlines() if "slow_kernel_of_malora-dense-compiled" in line)
    assert [cell.strip() for cell in line.split("|")[2:4]] == ["3", "796.9"]  # 0.75 of a step of 1.0625 s
    assert "slow_kernel_of_floor-compiled" in page and "slow_kernel_of_malora-dense`" not in page


def test_the_readme_is_filled_between_its_marks_only():
    readme = "before\n<!-- speed -->\nold\n<!-- end -->\nafter\n"
    filled = goals.fill_readme(readme, records())
    assert filled.startswith("before\n<!-- speed -->\n\n| figure ") and filled.endswith("\n\n<!-- end -->\nafter\n")
    assert "old" not in filled and goals.fill_readme(filled, records()) == filled
    assert "not measured yet" in goals.fill_readme(readme, [])


def test_pages_are_the_same_in_any_order_and_from_what_was_read_back(tmp_path, history):
    made = records()
    paths, refused = record.publish(made, tmp_path)
    assert len(paths) == 4 and not refused
    assert record.publish(made, tmp_path) == ([], [])  # what is there is never replaced
    assert speed_report.pages(record.read_speed(tmp_path)) == speed_report.pages(made[::-1]) != {}


def test_the_published_pages_are_what_their_records_give():
    folder = record.RESULTS / "speed"
    for name, text in speed_report.pages(record.read_speed(folder)).items():
        assert (folder / name).read_text() == text, name
