import json

import pytest

from bench.records import provenance
from bench.records.regressions import Figure, read_regressions, write_regressions
from bench.regress import cli
from bench.regress.figures import Measured
from tests.bench.conftest import CLEAN
from tests.bench.regress.conftest import MACHINE, make_regressions


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """File of committed figures of this machine, and a stand-in for the measurement of the part `data`."""
    monkeypatch.setattr(cli, "this_machine", lambda packages: MACHINE)
    monkeypatch.setitem(cli.MEASURED, "data", lambda: {"data.train": Measured("a", "exact")})
    path = tmp_path / "regressions.json"
    write_regressions(make_regressions(data_train=Figure(value="a")), path)
    return path


def test_exit_code_and_report(figures, monkeypatch, capsys):
    arguments = ["--only", "data", "--figures", str(figures)]
    assert cli.main(arguments) == 0
    assert "nothing has moved: 1 figures" in capsys.readouterr().out
    monkeypatch.setitem(cli.MEASURED, "data", lambda: {"data.train": Measured("b", "exact")})
    assert cli.main(arguments) == 1
    report = capsys.readouterr().out
    assert "MOVED  data.train: b, committed a, bound: equal" in report and "tasks/base.py" in report
    assert f"git diff {CLEAN.commit[:12]}" in report


def test_another_machine_is_named(figures, monkeypatch, capsys):
    other = MACHINE.replace(instructions="AVX512", packages=MACHINE.packages | {"torch": "2"})
    monkeypatch.setattr(cli, "this_machine", lambda packages: other)
    assert cli.main(["--only", "data", "--figures", str(figures)]) == 0
    report = capsys.readouterr().out
    assert "instructions AVX512 here, AVX2 committed; torch 2 here, 1 committed" in report


def test_what_cannot_be_done_is_one_line_and_writes_nothing(figures, tmp_path, monkeypatch, capsys):
    before = figures.read_text(encoding="utf-8")
    dirty = CLEAN.replace(dirty=True)
    monkeypatch.setattr(cli, "provenance", lambda device, jobs: dirty)
    broken = tmp_path / "broken.json"
    broken.write_text('{"schema": 1')
    for arguments, reason in (
        (["--update", "--only", "data"], "leave --only out"),
        (["--update"], "commit first"),
        (["--figures", str(tmp_path / "none.json")], "does not exist"),
        (["--figures", str(broken)], "is not a file of figures"),
    ):
        assert cli.main(["--figures", str(figures), *arguments]) == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1
    assert figures.read_text(encoding="utf-8") == before
    with pytest.raises(SystemExit) as exit:
        cli.main(["--only", "dta"])
    assert exit.value.code == 2 and "data" in capsys.readouterr().err


def test_update_writes_provenance_and_bounds(figures, monkeypatch, capsys):
    clean = CLEAN
    monkeypatch.setattr(cli, "provenance", lambda device, jobs: clean)
    for name in cli.MEASURED:
        monkeypatch.setitem(cli.MEASURED, name, lambda: {"training.base": Measured("h", "exact")})
    monkeypatch.setattr(cli, "measure_bounds", lambda here: {n: Figure(value=m.value) for n, m in here.items()})
    assert cli.main(["--update", "--figures", str(figures)]) == 0
    written = read_regressions(figures)
    assert (written.provenance, written.machine, written.base_hash) == (clean, MACHINE, "h")
    monkeypatch.setitem(cli.MEASURED, "layer", lambda: {"training.malora.status": Measured("failed", "exact")})
    assert cli.main(["--update", "--figures", str(figures)]) == 2, "figures of a failed run are none"


def test_json_prints_values_alone(figures, capsys):
    assert cli.main(["--only", "data", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"data.train": "a"}


def test_the_committed_figures_are_of_a_commit():
    committed = read_regressions(provenance.ROOT / "results" / "regressions.json")
    assert committed.provenance.dirty is False and committed.provenance.commit
    assert {name.partition(".")[0] for name in committed.figures} == set(cli.MEASURED)
