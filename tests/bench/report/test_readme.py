"""The README's generated blocks."""

import pytest

from bench.cli.parser import main
from bench.errors import UserError
from bench.records import provenance, store
from bench.report.claims import claims
from bench.report.readme import fill_readme
from tests.bench.cli.helpers import refused
from tests.bench.report.scores.test_experiment_page import records
from tests.bench.report.speed import speed_records

CLAIMS = claims({}, [])
HOSTILE = (
    "a <!-- end --> b", "`<!-- end -->`", "a | b", "a\nb\r\nc\u2028d", "`", "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))", "\\| x", "**b** <script>", "&lt;script&gt; <b>",
)  # fmt: skip


def fill(text, profiles=None):
    return fill_readme(text, profiles or {}, [], CLAIMS)


@pytest.mark.parametrize("name, start", [("table2 tiny", "| method"), ("claims", "| claim"), ("speed", "The goals")])
def test_a_block_is_filled_between_its_marks_only(name, start):
    text = f"before\n<!-- {name} -->\nstale text\n<!-- end -->\nafter <!-- a comment -->\n"
    filled = fill(text, {"tiny": records()})
    assert filled.startswith(f"before\n<!-- {name} -->\n\n{start}")
    assert filled.endswith("\n\n<!-- end -->\nafter <!-- a comment -->\n")
    assert "stale text" not in filled and fill(filled, {"tiny": records()}) == filled


def test_a_table_without_records_says_so():
    assert "No run is published yet" in fill("<!-- table2 tiny -->\n<!-- end -->")


def test_the_short_leaderboard_has_a_line_per_method_and_a_short_verdict():
    filled = fill("<!-- table2 tiny -->\n<!-- end -->", {"tiny": records()})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in filled.splitlines() if line.startswith("| ")]
    assert cells[0] == ["method", "lexicon", "majority", "mean", "seeds", "against the best"]
    assert [row[0] for row in cells[1:]] == ["base, no adapter", "LoRA", "MoLoRA", "MALoRA"]
    assert cells[2][1:] == ["90.0", "90.0", "90.0 ± 0.0", "2", "best"]
    assert cells[3][-1].startswith("worse, p=") and cells[4][-1] == "not distinguishable"
    assert "the paper's |" not in filled and "(results/tiny/table2.md)" in filled


@pytest.mark.parametrize("text", ["<!-- claims -->\n", "<!-- claims -->\n<!-- speed -->\n<!-- end -->"])
def test_a_marker_without_its_end_is_an_error(text):
    with pytest.raises(UserError, match="<!-- claims --> has no <!-- end -->"):
        fill(text)


def test_an_end_without_its_marker_is_an_error():
    with pytest.raises(UserError, match="<!-- end --> without a marker"):
        fill("<!-- claims -->\n<!-- end -->\n<!-- end -->")


@pytest.mark.parametrize("size", [20, 3000, -5])
def test_an_incomplete_readme_is_refused_and_stays_as_it_is(size, monkeypatch, capsys, tmp_path):
    text = (provenance.ROOT / "README.md").read_bytes()
    readme = tmp_path / "README.md"
    readme.write_bytes(text[:size])
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(store, "RESULTS", tmp_path / "results")
    for options in ([], ["--check"]):
        assert "README.md is incomplete" in refused(["leaderboard", *options], capsys, tmp_path)
    readme.write_bytes(text)
    assert main(["leaderboard"]) == 0 and main(["leaderboard", "--check"]) == 0


def gpu_records(device):
    return [speed_records.made_at(record, device=device) for record in speed_records.records()]


@pytest.mark.parametrize("device", HOSTILE)
def test_the_readme_settles_whatever_a_record_holds(device):
    speeds = gpu_records(device)
    text = "<!-- speed -->\n<!-- end -->\n\n<!-- claims -->\n<!-- end -->\nthe rest\n"
    once = fill_readme(text, {}, speeds, CLAIMS)
    assert once.count("<!--") == 4 and once.endswith("the rest\n")
    assert fill_readme(once, {}, speeds, CLAIMS) == once
