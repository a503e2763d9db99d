"""Goals of training programs: from the latest record that has both rows of a ratio, or not measured."""

from bench.report.speed import tables
from bench.report.speed.loop_goals import LOOP_GOALS, loop_goal_table
from tests.bench.report.speed.speed_records import made_at, make_speed, records, row

GIB = 2**30


def loop_row(name, step, gib=30, loop="plain", checkpointing="none", base="bf16", method=None):
    asked = {"loop": loop, "checkpointing": checkpointing, "base": base, "method": method}
    return row(name, step, gib * GIB) | {"seconds": {"step": [step] * 3}} | asked


def make_record(*more, **options):
    rows = [
        loop_row("floor-compiled", 0.75, loop="compiled"), loop_row("unsloth-lora", 1.0),
        loop_row("malora-plain", 0.9, method="malora"),
        loop_row("malora-captured", 0.8, loop="captured", method="malora"),
        loop_row("malora-lean-captured", 0.81, 20, "captured", "lean", method="malora"),
        loop_row("malora-offload-plain", 1.2, 15, checkpointing="offload", method="malora"),
        loop_row("unsloth-lora-full", 1.3, 14, checkpointing="full"), *more,
    ]  # fmt: skip
    return make_speed(mode="loop", rows=rows, world=1, **options)


def figures(*found):
    return {goal.figure: next(iter(goal.latest([*found]).values()))[0] for goal in LOOP_GOALS if goal.latest([*found])}


def test_each_figure_is_of_the_fastest_row_of_its_kind():
    assert {figure: round(value, 4) for figure, value in figures(make_record()).items()} == {
        "plain loop: MALoRA / Unsloth LoRA (dropout 0.05)": 0.9,
        "compiled or captured: MALoRA / Unsloth LoRA": 0.8,
        "compiled or captured: MALoRA / compiled floor": 1.0667,
        "checkpointed: MALoRA / Unsloth checkpointed, seconds": 0.9231,
        "checkpointed: MALoRA / Unsloth checkpointed, peak memory": 1.0714,
        "lean: peak memory / 31 GiB": 0.6452,
        "lean: MALoRA / MALoRA captured with all activations": 1.0125,
    }


def test_a_later_record_counts_and_one_without_the_rows_does_not():
    later = made_at(make_speed(mode="loop", rows=[loop_row("unsloth-lora", 9.0)], world=1), "2026-12-01T00:00:00Z")
    assert figures(make_record(), later) == figures(make_record())
    faster = made_at(
        make_record(loop_row("malora-compiled", 0.6, loop="compiled", method="malora")), later.provenance.time
    )
    assert figures(make_record(), faster)["compiled or captured: MALoRA / Unsloth LoRA"] == 0.6


def test_one_round_a_cpu_and_fewer_layers_reach_no_goal():
    assert not figures(make_record(rounds=1), make_record(layers=2), made_at(make_record(), cuda=None))


def test_a_row_that_a_last_round_lacks_reaches_no_goal():
    record = make_record()
    cut = next(row for row in record.rows if row.name == "unsloth-lora-full")
    cut.sensors["clock_mhz"], cut.sensors["watts"] = [1500.0], [690.0]
    assert not [figure for figure in figures(record) if figure.startswith("checkpointed")]
    assert "lean: peak memory / 31 GiB" in figures(record)


def test_the_page_shows_the_goals_once_training_programs_are_measured():
    page = tables.pages([*records(), make_record()])["table10.md"]
    line = next(line for line in page.splitlines() if "Unsloth checkpointed, seconds" in line)
    assert "**0.923**" in line and "**no**" in line and "-loop-" in line
    assert next(line for line in page.splitlines() if "FSDP2: peak" in line).count("not measured") == 2
    assert loop_goal_table(records()) is None and "as users run it" not in tables.pages(records())["table10.md"]
