"""Texts of records in Markdown: each shows itself, whatever it holds."""

import re

import pytest
from markdown_it import MarkdownIt

from bench.report.markdown import code, table, text
from bench.report.speed.tables import section
from tests.bench.report.speed import speed_records
from tests.bench.report.test_readme import HOSTILE

PARSER = MarkdownIt("commonmark").enable("table")


def cells(markdown):
    """Return what the cells of the only row show, as HTML."""
    return re.findall(r"<td[^>]*>(.*?)</td>", PARSER.render(markdown))


def shown(html):
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        html = html.replace(entity, character)
    return html


@pytest.mark.parametrize("value", HOSTILE)
def test_a_text_shows_itself_in_its_own_cell(value):
    found = cells(table([["before", text(value), "after"]], ["a", "b", "c"]))
    assert len(found) == 3 and found[::2] == ["before", "after"]
    assert "<" not in found[1] and shown(found[1]) == " ".join(value.split())


@pytest.mark.parametrize("value", HOSTILE)
def test_code_stays_code(value):
    found = cells(table([["before", code(value), "after"]], ["a", "b", "c"]))
    assert len(found) == 3 and found[::2] == ["before", "after"]
    assert found[1].startswith("<code>") and found[1].endswith("</code>") and found[1].count("<") == 2


@pytest.mark.parametrize("value", HOSTILE)
def test_cells_that_nobody_escaped_stay_in_their_row_without_html(value):
    html = PARSER.render(table([["before", value, "after"]], ["a", "b", "c"]))
    assert html.count("<tr>") == 2 and html.count("<td") == 3
    assert "<img" not in html and "<script" not in html and "<!--" not in html


@pytest.mark.parametrize("value", HOSTILE)
def test_a_page_has_one_line_for_its_title_and_no_html(value):
    record = speed_records.made_at(speed_records.make_speed(), device=value)
    html = PARSER.render(section(record))
    assert html.count("<h2>") == 1 and html.partition("</h2>")[0].count("\n") == 0
    assert "<img" not in html and "<script" not in html and "<!--" not in html and "href" not in html


def test_plain_names_do_not_change():
    names = ["NVIDIA H200", "Intel(R) Xeon(R) CPU @ 2.20GHz", "malora-captured", "2.13.0+cpu", "x_y & z"]
    assert [text(name) for name in names] == names and code("a_b") == "`a_b`"
