"""Goals, computed from records.

Tested are the records that count, their figures, and the README's table.
"""

import re

import pytest

from bench.records import store
from bench.records.speed_schema import SpeedRow
from bench.report.speed import goals
from tests.bench.report.speed.speed_records import made_at, make_speed, records, row


def figures(records) -> list[dict]:
    return [goals.measured(goal, records) for goal in goals.GOALS]


def table(text) -> list[list[str]]:
    """Return the cells of the first table of a page, without the line below its head."""
    lines = text.partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]


def test_the_goals_are_arithmetic_on_records():
    expected = [1.0625, 0.85, 2 / 1.0625, 16, 1.2, 1.125, 0.8, 0, 15, 2, 0.5]
    assert figures(records()) == [{"a CPU": [pytest.approx(value)]} for value in expected]
    assert [row[-1] for row in table(goals.goal_table(records()))[1:]] == ["yes"] * 5 + ["**no**"] + ["yes"] * 5
    assert figures([make_speed(layers=2)]) == [{}] * 11


def test_records_of_the_same_code_and_later_ones_count_besides_the_one_with_most_baselines():
    fullest, same, few, old = (make_speed(variant=name) for name in ("all", "all again", "malora", "before"))
    few = few.replace(rows=[row for row in few.rows if row.name != "molora-loop"])
    for record, step in ((same, 1.03125), (few, 1.125), (old, 1.5)):
        record.rows[5] = SpeedRow(**row("malora-dense-compiled", step, 8.0, "malora"))
    fullest = made_at(fullest, "2026-01-02T00:00:00Z")
    few = made_at(few, "2026-01-03T00:00:00Z", source_sha256="of later code")
    old = made_at(old, source_sha256="of earlier code")
    all_figures = figures([old, few, same, fullest])
    assert all_figures[0] == {"a CPU": [1.0625, 1.03125, 1.125]} and all_figures[3] == {"a CPU": [16, 17 / 1.03125]}
    page = goals.goal_table([old, few, same, fullest])
    assert table(page)[1][2:] == ["1.062, 1.031, **1.125**", "**not always**"]
    assert few.id in goals.goal_table([fullest, few]) and old.id not in goals.goal_table([fullest, old])
    front = table(goals.front_page_goals([old, few, same, fullest]))
    assert front[1][2:] == ["**1.12**", "**not always**"]  # the worst of the device's records
    again = made_at(make_speed(variant="fullest, later"), "2026-01-04T00:00:00Z", source_sha256="of the last code")
    assert figures([fullest, same, few, again])[0] == {"a CPU": [1.0625]}


def test_each_device_has_a_column():
    here, there = make_speed(), made_at(make_speed(), device="a GPU")
    there.rows[5] = SpeedRow(**row("malora-dense-compiled", 1.125, 8.0, "malora"))
    both = table(goals.goal_table([there, here]))
    assert both[0] == ["figure", "goal", "a CPU", "a GPU", "reached"]
    assert both[1][2:] == ["1.062", "**1.125**", "**not always**"]
    assert table(goals.goal_table([there]))[9][2:] == ["not measured", "not measured"]


def test_a_row_that_did_not_run_is_no_figure():
    record = make_speed()
    record.rows[-3] = record.rows[-3].replace(status="oom", reason="too much", seconds={})
    assert figures([record])[3] == {"a CPU": []}


def test_the_front_page_has_five_goals_and_a_link():
    page = goals.front_page_goals(records())
    assert [row[0] for row in table(page)[1:]] == [
        "step: MALoRA / compiled frozen backbone",
        "step: PEFT LoRA out of the box / MALoRA",
        "step: MoLoRA by the expert loop / MALoRA",
        "peak memory: MALoRA / PEFT LoRA out of the box",
        "step: MALoRA in fp8 / compiled frozen backbone in bfloat16",
    ]
    assert [row[2] for row in table(page)[1:]] == ["1.06", "1.88", "16", "0.8", "0.5"]
    assert page.count("\n\n") == 1 and "](results/speed/table10.md)" in page.splitlines()[-1]
    assert "not measured yet" in goals.front_page_goals([])


def test_no_cell_of_the_published_goals_lists_more_than_three_files():
    published = store.read_speed(store.RESULTS / "speed")
    for page in (goals.goal_table(published), goals.front_page_goals(published)):
        for line in page.splitlines():
            for cell in line.split("|"):
                assert len(re.findall(r"\w+-\d{8}T\d{6}Z-\w{8}", cell)) <= 1, cell
