from pathlib import Path

import pytest

from bench.records import store
from bench.records.speed_schema import SpeedRecord
from bench.regress import speed
from bench.regress.speed import compare_ratios, newest_record

ROW = "malora-fused-liger-captured"


@pytest.fixture(scope="module")
def records():
    return store.read_speed(store.RESULTS / "speed")


def slower(record: SpeedRecord, name: str, factor: float) -> SpeedRecord:
    """Multiply the step times of a row."""
    rows = [
        row.replace(seconds={"step": [factor * s for s in row.seconds["step"]]}) if row.name == name else row
        for row in record.rows
    ]
    return record.replace(rows=rows)


def test_a_slower_row_is_named_and_the_same_times_are_not(records):
    committed = newest_record(records, "NVIDIA H200")
    assert not any(one.has_moved for one in compare_ratios(committed, committed))
    (one,) = [one for one in compare_ratios(committed, slower(committed, ROW, 1.3)) if one.has_moved]
    assert one.name == f"speed.{ROW}" and "malora/fused" in one.look_at
    assert not any(one.has_moved for one in compare_ratios(committed, slower(committed, ROW, 1.01)))


def test_a_row_that_does_not_run_any_more_has_moved(records):
    committed = newest_record(records, "NVIDIA H200")
    fresh = committed.replace(rows=[row for row in committed.rows if row.name != ROW])
    assert [one.name for one in compare_ratios(committed, fresh) if one.has_moved] == [f"speed.{ROW}"]


def test_only_records_of_the_same_device_are_compared(records, monkeypatch):
    assert newest_record(records, "another GPU") is None
    monkeypatch.setattr(speed, "device_name", lambda device: "another GPU")
    found, remark = speed.compare_speed(records)
    assert found == [] and "another GPU" in remark


def test_the_short_call_repeats_the_workload_of_the_record(records, monkeypatch):
    committed, calls = newest_record(records, "NVIDIA H200"), []
    monkeypatch.setattr(speed, "device_name", lambda device: "NVIDIA H200")

    def run_speed(arguments):
        calls.append(dict(zip(arguments[::2], arguments[1::2], strict=True)))
        store.write_speed(slower(committed, ROW, 2.0), Path(calls[0]["--results"]))
        return 0

    monkeypatch.setattr(speed, "run_speed", run_speed)
    found, _ = speed.compare_speed(records)
    assert [one.name for one in found if one.has_moved] == [f"speed.{ROW}"]
    assert calls[0]["--shape"] == committed.shape and calls[0]["--tokens"] == str(committed.options.tokens)
    assert {"floor-compiled", ROW} <= set(calls[0]["--variant"].split(","))
