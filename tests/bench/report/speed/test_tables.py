"""Goals, tables and pages of speed are arithmetic on its records."""

import pytest

from bench.records import store
from bench.records.schema import SpeedRecord, SpeedRow
from bench.report.speed import goals, summary, tables
from tests.bench.conftest import CLEAN


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
    rows = rows or [
        row("floor", 1.2), row("floor-compiled", 1.0), row("peft-lora", 2.0), row("lora-plain-compiled", 1.25),
        row("malora-dense", 4.0, 99.0, "malora", 3), row("malora-dense-compiled", 1.0625, 8.0, "malora"),
        row("malora-fp8-liger-captured", 0.5, method="malora", backend="fp8"),  # too inexact to stand for MALoRA
        row("molora-dense-compiled", 1.125, method="molora"), row("lora-dense-compiled", 1.0, method="lora"),
        row("molora-loop", 17.0), row("molora-sorted", 1.5), row("molora-sorted-compiled", 1.275),
    ]  # fmt: skip
    return SpeedRecord(
        shape=shape,
        mode=mode,
        options=asked | options,
        provenance=CLEAN.replace(cuda="13"),
        peak_rates={"before": rate, "after": rate},
        rows=rows,
    )


def made_at(record: SpeedRecord, time: str = CLEAN.time, **provenance) -> SpeedRecord:
    return record.replace(provenance=record.provenance.replace(time=time, **provenance))


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
    page = tables.section(make_speed(mode="layer", rows=rows, sweep="experts", flops=None))
    molora = "`molora-sorted` is the fastest at 64; `molora-dispatch` is the fastest at 256"
    assert f"Crossover, molora by experts: {molora}.\n" in page
    assert "Crossover, malora by experts: `malora-sorted` is the fastest at 256.\n" in page
    assert page.endswith("Crossover, moasylora by experts: no sparse row wins.")


def figures(records) -> list[dict]:
    return [goals.measured(goal, records) for goal in goals.GOALS]


def table(records) -> list[list[str]]:
    lines = [line for line in goals.goal_table(records).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_the_goals_are_arithmetic_on_records():
    expected = [1.0625, 0.85, 2 / 1.0625, 16, 1.2, 1.125, 0.8, 0, 15, 2, 0.5]
    assert figures(records()) == [{"a CPU": [pytest.approx(value)]} for value in expected]
    assert [row[-1] for row in table(records())[1:]] == ["yes"] * 5 + ["**no**"] + ["yes"] * 5
    assert figures([make_speed(layers=2)]) == [{}] * 11


def test_records_of_the_same_code_and_later_ones_stand_beside_the_one_of_most_rivals():
    most, same, few, old = (make_speed(variant=name) for name in ("all", "all again", "malora", "before"))
    few = few.replace(rows=[row for row in few.rows if row.name != "molora-loop"])
    for made, step in ((same, 1.03125), (few, 1.125), (old, 1.5)):
        made.rows[5] = SpeedRow(**row("malora-dense-compiled", step, 8.0, "malora"))
    most = made_at(most, "2026-01-02T00:00:00Z")
    few = made_at(few, "2026-01-03T00:00:00Z", source_sha256="of later code")
    old = made_at(old, source_sha256="of earlier code")
    all_figures = figures([old, few, same, most])
    assert all_figures[0] == {"a CPU": [1.0625, 1.03125, 1.125]} and all_figures[3] == {"a CPU": [16, 17 / 1.03125]}
    assert table([old, few, same, most])[1][2:] == ["1.062, 1.031, **1.125**", "**not always**"]
    assert few.id in goals.goal_table([most, few]) and old.id not in goals.goal_table([most, old])
    again = make_speed(variant="most, later")
    again = made_at(again, "2026-01-04T00:00:00Z", source_sha256="of the last code")
    assert figures([most, same, few, again])[0] == {"a CPU": [1.0625]}


def test_each_device_has_a_column():
    here, there = make_speed(), make_speed()
    there = made_at(there, device="a GPU")
    there.rows[5] = SpeedRow(**row("malora-dense-compiled", 1.125, 8.0, "malora"))
    assert table([there, here])[0] == ["figure", "goal", "a CPU", "a GPU", "reached"]
    assert table([there, here])[1][2:] == ["1.062", "**1.125**", "**not always**"]
    assert table([there])[9][2:] == ["not measured", "not measured"]


def test_a_page_shows_each_set_of_rows_of_the_newest_code_and_a_line_for_the_rest():
    def made(variant, day, code):
        return made_at(make_speed(variant=variant, rounds=day), f"2026-01-0{day}T00:00:00Z", source_sha256=code)

    old, few, most, again = made("all", 1, "a"), made("dispatch", 2, "b"), made("all", 3, "b"), made("all", 4, "b")
    few = few.replace(rows=few.rows[:5])
    small = make_speed("smollm2-135m", batch=16, length=128)
    assert summary.shown([small, again, few, most, old]) == [again, few, small]
    page = tables.pages([most, few, small, old, again])["table10.md"]
    assert page.count("## llama2-7b, train, a CPU") == 2 and page.count("## smollm2-135m, train, a CPU") == 1
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `llama2")]
    commit = "`000000000000`"
    assert lines == [[f"`{r.id}`", commit, str(r.options.rounds), "12", "1.062", "1.062", "0.5312"]
                     for r in (old, most)]  # fmt: skip


def test_a_row_that_did_not_run_is_no_figure():
    made = make_speed()
    made.rows[-3] = made.rows[-3].replace(status="oom", reason="too much", seconds={})
    assert figures([made])[3] == {"a CPU": []} and "oom: too much" in tables.section(made)


def test_the_table_says_ratios_and_shares():
    (line,) = (line for line in tables.section(make_speed()).splitlines() if line.startswith("| peft-lora "))
    cells = [cell.strip() for cell in line.split("|")]
    # × compiled floor, × floor, × PEFT LoRA; 8 operations in 2 s, where the device does 16 a second.
    assert cells[8:12] == ["2", "1.67", "1", "25.0%"] and cells[5] == "2" and cells[7] == "8,192"
    assert cells[14:16] == ["1600", "700"]  # MHz, W


def test_the_page_says_where_the_time_goes():
    """Of MALoRA's fastest row and of the compiled floor, which it is measured against."""
    page = tables.section(make_speed())
    (line,) = (line for line in page.splitlines() if "slow_kernel_of_malora-dense-compiled" in line)
    assert [cell.strip() for cell in line.split("|")[2:4]] == ["3", "796.9"]  # 0.75 of a step of 1.0625 s
    assert "slow_kernel_of_floor-compiled" in page and "slow_kernel_of_malora-dense`" not in page


def test_pages_are_the_same_in_any_order_and_from_what_was_read_back(tmp_path, history):
    made = records()
    paths, refused = store.publish(made, tmp_path)
    assert len(paths) == 4 and not refused
    assert store.publish(made, tmp_path) == ([], [])  # what is there is never replaced
    assert tables.pages(store.read_speed(tmp_path)) == tables.pages(made[::-1]) != {}


def test_a_record_of_a_machine_without_history_is_published_once(tmp_path, history):
    made = made_at(make_speed(), commit="earlier", dirty=True)
    assert len(store.publish([made], tmp_path)[0]) == 1
    assert store.publish([made], tmp_path) == ([], [])


def test_the_published_pages_are_what_their_records_give():
    folder = store.RESULTS / "speed"
    for name, text in tables.pages(store.read_speed(folder)).items():
        assert (folder / name).read_text() == text, name
