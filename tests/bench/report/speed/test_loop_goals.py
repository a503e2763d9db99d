"""Goals of training programs: from the latest record that has both rows of a ratio, or not measured."""

from bench.report.speed import tables
from bench.report.speed.loop_goals import LOOP_GOALS, front_page_loop_goals, loop_goal_table
from tests.bench.report.speed.speed_records import made_at, make_speed, records, row

GIB = 2**30


def loop_row(name, step, gib=30, loop="plain", checkpointing="none", base="bf16", method=None, **more):
    asked = {"loop": loop, "checkpointing": checkpointing, "base": base, "method": method, **more}
    return row(name, step, gib * GIB) | {"seconds": {"step": [step] * 3}} | asked


def make_record(*more, world=1, **options):
    rows = [
        loop_row("floor-compiled", 0.75, loop="compiled"), loop_row("unsloth-lora", 1.0),
        loop_row("malora-plain", 0.9, method="malora"),
        loop_row("malora-captured", 0.8, loop="captured", method="malora"),
        loop_row("malora-lean-captured", 0.81, 20, "captured", "lean", method="malora"),
        loop_row("malora-offload-plain", 1.2, 15, checkpointing="offload", method="malora"),
        loop_row("unsloth-lora-full", 1.3, 14, checkpointing="full"), *more,
    ]  # fmt: skip
    return make_speed(mode="loop", rows=rows, world=world, **options)


def on_two_gpus(name, step, gib, **more):
    parallel = name.rpartition("-")[2]
    return loop_row(name, step, gib, **{"method": "malora", "parallel": parallel, "world": 2, **more})


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


TWO_GPUS = [
    on_two_gpus("malora-captured-ddp", 0.84, 32, loop="captured"), on_two_gpus("malora-plain-ddp", 0.95, 33),
    on_two_gpus("malora-plain-fsdp", 1.0, 24), on_two_gpus("malora-full-plain-fsdp", 1.2, 12, checkpointing="full"),
    on_two_gpus("peft-lora-fsdp", 0.1, 1, method="peft-lora"),
]  # fmt: skip


def test_two_gpus_count_their_tokens_against_the_best_of_one_gpu_in_the_same_call():
    found = figures(make_record(*TWO_GPUS, world=2))
    two = {figure: round(found.pop(figure), 4) for figure in [*found] if figure.startswith("two GPUs")}
    assert two == {
        "two GPUs, DDP: tokens per second / one GPU's best": 1.9048,  # 2 · 0.8 s / 0.84 s
        "two GPUs, FSDP2: tokens per second / one GPU's best": 1.6,
        "two GPUs, FSDP2: peak memory / one GPU's": 0.8,  # of the fastest row, though another takes less
    }
    assert found == figures(make_record())  # goals on one GPU do not see these rows
    assert not [figure for figure in figures(make_record(*TWO_GPUS, world=4)) if figure.startswith("two GPUs")]


def test_a_table_names_the_gpus_of_a_row_and_counts_their_tokens():
    page = tables.pages([make_record(*TWO_GPUS, world=2)])["table10.md"]
    header, cells = (
        [cell.strip() for cell in next(line for line in page.splitlines() if line.startswith(start)).split("|")]
        for start in ("| row ", "| `malora-captured-ddp`")
    )
    found = dict(zip(header, cells, strict=True))
    assert (found["GPUs"], found["step, s"], found["tokens/s"]) == ("2", "0.84", "39,010")
    assert "the slowest process" in page and "On two GPUs a step has twice the tokens" in page
    alone = tables.pages([make_record()])["table10.md"]
    assert "| GPUs " not in alone and "the slowest process" not in alone


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


def test_the_front_page_shows_figures_that_are_missed_too():
    page = front_page_loop_goals([make_record()])
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    assert "| 0.9 " in lines["plain loop: MALoRA / Unsloth LoRA (dropout 0.05)"]
    assert "**1.07**" in lines["checkpointed: MALoRA / Unsloth checkpointed, peak memory"]
    assert "not measured" in lines["NF4 base, checkpointed: MALoRA / PEFT QLoRA, seconds"]
    assert not any("FSDP2" in figure for figure in lines)
    assert "not measured yet" in front_page_loop_goals(records())
