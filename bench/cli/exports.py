"""The command `export`: leaderboards, runs and scores as CSV and JSON files."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.cli.commands import LOCAL
from bench.errors import UserError
from bench.experiments.profiles import PROFILES
from bench.records import store
from bench.records.files import write_atomically
from bench.records.leftovers import remove_temporary_files
from bench.records.schema import Record
from bench.report.export import export_frames

# All digits of a double, so that JSON and CSV have the same figures.
JSON_DIGITS = 15


def export_records(options: argparse.Namespace) -> int:
    """Write a CSV and a JSON file for each frame of `bench.report.export`."""
    output: Path = options.output or LOCAL / "export"
    frames = export_frames(_records(options.results))
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be a folder ({error.strerror}); name another.") from error
    remove_temporary_files(output)
    for name, frame in frames.items():
        text = frame.to_json(orient="records", indent=1, double_precision=JSON_DIGITS, force_ascii=False)
        write_atomically(output / f"{name}.csv", frame.to_csv(index=False))
        write_atomically(output / f"{name}.json", f"{text}\n")
        print(f"{len(frame):6} rows in {output / name}.csv and .json")
    return 0


def _records(folder: Path | None) -> dict[str, list[Record]]:
    """Return the records of a folder, or the published ones, by profile."""
    if folder is None:
        return {name: store.read_all(store.RESULTS / name) for name in PROFILES}
    if not (folder / "runs").is_dir():
        raise UserError(f"--results {folder} has no records, because it has no folder runs; name another folder.")
    found = store.read_all(folder)
    return {name: mine for name in PROFILES if (mine := [r for r in found if r.config.profile == name])}
