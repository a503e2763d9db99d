"""Figure 4c is drawn once, for the file and for the HTML report."""

import xml.etree.ElementTree as ElementTree

from bench.report.speed.figure4c import figure4c, step_figure
from tests.bench.report.speed.speed_records import make_speed

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    return [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_bars_are_medians_with_the_slowest_first_and_the_paper_s_below():
    record = make_speed()
    record.rows[0] = record.rows[0].replace(status="oom", seconds={})
    names = texts(figure4c(record))
    assert names[:5] == ["Seconds of a training step, llama2-7b, a CPU", "molora-loop", "17", "malora-dense", "4"]
    assert "floor" not in names and names[-2:] == ["LoRA", "13.7"] and "17.6" in names  # of the paper's Table 10


def test_the_report_s_figure_has_the_same_bars_and_leads_to_the_record():
    record = make_speed()
    svg = step_figure("Seconds of a step", record, "#some<record")
    ours = texts(figure4c(record))[1:]
    assert texts(svg) == ours[: 2 * len(record.rows)]
    (link,) = ElementTree.fromstring(svg).iter(f"{SVG}a")
    assert link.get("{http://www.w3.org/1999/xlink}href") == "#some<record"
    record.rows.clear()
    assert step_figure("Seconds of a step", record, "#x") is None


def test_the_bytes_depend_on_the_record_only():
    assert figure4c(make_speed()) == figure4c(make_speed())
