"""Speed records that are made up for tests."""

from bench.records.speed_schema import PeakRates, SpeedOptions, SpeedRecord
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
    rates = PeakRates(matrix_flops_per_second=16.0, copy_bytes_per_second=1.0)
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
        options=SpeedOptions.model_validate(asked | options),
        provenance=CLEAN.replace(cuda="13"),
        peak_rates={"before": rates, "after": rates},
        rows=rows,
    )


def made_at(record: SpeedRecord, time: str = CLEAN.time, **provenance) -> SpeedRecord:
    """Return the record with another time, and with these changes of its provenance."""
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
