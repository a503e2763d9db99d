"""Run commands in tests, and compare folders before and after."""

from pathlib import Path

from bench.cli.parser import main


def snapshot(folder: Path) -> dict[Path, bytes]:
    """Return the contents of all files in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(arguments: list, capsys, tmp_path) -> str:
    """Run a command that must be refused and write nothing.

    Returns the last line of its error.
    """
    before = snapshot(tmp_path)
    code: int | str | None
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as exit:  # raised by argparse
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error
    assert snapshot(tmp_path) == before
    return error.strip().splitlines()[-1]
