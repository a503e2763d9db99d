"""Goals, tables and pages of speed are arithmetic on its records."""

import pytest

from bench import goals, record, speed_report
from bench.record import SpeedRecord
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
    assert "later" not in goals.goal_table([earlier])
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


def test_a_record_of_a_machine_without_history_is_published_once(tmp_path, history):
    made = make_speed()
    made.provenance |= {"commit": "earlier", "dirty": True}
    assert len(record.publish([made], tmp_path)[0]) == 1
    assert record.publish([made], tmp_path) == ([], [])


def test_the_published_pages_are_what_their_records_give():
    folder = record.RESULTS / "speed"
    for name, text in speed_report.pages(record.read_speed(folder)).items():
        assert (folder / name).read_text() == text, name
