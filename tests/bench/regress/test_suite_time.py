import pytest

from bench.errors import UserError
from bench.regress.suite import MAX_SECONDS, MAX_SECONDS_ELSEWHERE, compare_suite


def write(path, seconds):
    attributes = f'time="{seconds}" tests="7" timestamp="2026-12-01T10:00:00.123456+00:00"'
    path.write_text(f'<?xml version="1.0"?><testsuites><testsuite name="pytest" {attributes}/></testsuites>')
    return path


@pytest.mark.parametrize(
    ("seconds", "is_same", "has_moved"),
    [(MAX_SECONDS - 1, True, False), (MAX_SECONDS + 1, True, True), (MAX_SECONDS_ELSEWHERE - 1, False, False)],
)
def test_the_time_of_the_suite_has_a_bound(tmp_path, seconds, is_same, has_moved):
    (one,), remark = compare_suite(write(tmp_path / "suite.xml", seconds), is_same)
    assert (one.found, one.has_moved) == (seconds, has_moved)
    assert "7 tests, measured at 2026-12-01T10:00:00" in remark


def test_without_a_report_nothing_is_compared_and_a_broken_one_is_an_error(tmp_path):
    found, remark = compare_suite(tmp_path / "none.xml", is_same=True)
    assert found == [] and "not compared" in remark
    (tmp_path / "broken.xml").write_text("<testsuites>")
    with pytest.raises(UserError, match=r"broken\.xml is not a report of pytest"):
        compare_suite(tmp_path / "broken.xml", is_same=True)
