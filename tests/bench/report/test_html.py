"""The HTML report in a browser: it sums up, sorts, filters and opens records.

It loads nothing else.
"""

import base64
import gzip
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest

from bench.cli.parser import main
from bench.experiments.methods import method_options
from bench.experiments.profiles import PROFILES
from bench.experiments.registry import EXPERIMENTS
from bench.records import speed_schema, store
from bench.report.verdicts import Claim
from tests.bench.conftest import CLEAN
from tests.bench.records.test_store import make
from tests.bench.report.speed import speed_records

pytest.importorskip("itables", reason="the extra 'report' is not installed")
from bench.report import claims as bench_claims
from bench.report import figures
from bench.report.experiment_figures import step_seconds
from bench.report.html import page
from bench.report.method_styles import STYLES, style

TITLE = "Mean score against the time of a training step"


def claim(verdict, *records):
    return Claim("A < B", "Table 2", "+1", "+2", verdict, list(records), "tiny")


def runs():
    made = [
        make(seed, method=method, rate=rate, right=right, n=20)
        for seed in (0, 1)
        for method, rate, right in (
            ("lora", 4e-4, 0.5),
            ("lora", 2e-3, 0.95),
            ("molora", 4e-4, 0.35),
            ("dora", 4e-4, 0.1),
        )
    ]
    return [
        *made,
        make(0, method="base", rate=None, right=0.25, n=20, validation=None),
        make(0, "diverged", "malora", 4e-4),
    ]


def speed(**seconds):
    unknown = dict.fromkeys(("backend", "reason", "peak_bytes", "kernels", "launches", "synchronisations"))
    rows = [
        {"name": name, "method": method, "status": "ok", "trainable": 1234, "seconds": {"step": [step] * 3}, **unknown}
        for name, (method, step) in seconds.items()
    ]
    options = {"variant": "all", "sweep": None, "batch": 1, "length": 8, "tokens": 8, "dropout": 0.0, "rounds": 1,
               "layers": None, "flops": 1}  # fmt: skip
    rates = {"matrix_flops_per_second": 1.0, "copy_bytes_per_second": 1.0}
    return speed_schema.SpeedRecord(
        shape="toy",
        mode="train",
        options=options,
        provenance=CLEAN,
        peak_rates={"before": rates, "after": rates},
        rows=rows,
    )


def svgs(text):
    found = re.findall(r"<svg.*?</svg>", text[: text.index("<dialog")], re.DOTALL)
    drawn = [ElementTree.fromstring(svg) for svg in found]
    return {svg.get("aria-label"): svg for svg in drawn}


def links(svg):
    return {a.get("{http://www.w3.org/1999/xlink}href") for a in svg.iter("{http://www.w3.org/2000/svg}a")}


def test_the_same_records_give_the_same_page_and_it_loads_nothing():
    text = page({"tiny": runs()}, [], [])
    assert text == page({"tiny": runs()[::-1]}, [], [])
    own = text[: text.index('id="datatables"')]  # after it comes DataTables, whose strings name its home
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:,)|url\(\s*["']?(?!#)|@import""", own)
    nothing = page({}, [], [])
    assert "No claim has been compared with records yet" in nothing and not svgs(nothing)


def test_a_figure_links_to_the_records_that_it_is_computed_from():
    drawn = svgs(page({"tiny": runs()}, [], []))
    best = [r.id for r in runs() if (r.config.method, r.config.learning_rate) == ("lora", 2e-3)]
    base = next(r.id for r in runs() if r.config.method == "base")
    assert len(best) == 2 and links(drawn["Mean score against trainable parameters"]) == {
        figures.link(best),
        figures.link([base]),
    }
    assert links(drawn["Training loss"]) == {figures.link([run]) for run in (base, *best)}
    assert TITLE not in drawn and all(svg.get("role") == "img" for svg in drawn.values())


def test_step_times_are_of_the_same_adapter_computed_in_the_fastest_way():
    measured = speed(floor=(None, 0.1), slow=("lora", 0.9), fast=("peft-lora", 0.3))
    rows = [SimpleNamespace(method=m, records=[make(method=m)]) for m in ("lora", "molora")]
    _, _, step = step_seconds(rows, [measured])
    assert [step(row) for row in rows] == [0.3, None]
    rows[0].records[0].parameters = {"trainable": 4321, "total": 9, "adapter_bytes": 9}
    assert step(rows[0]) is None
    drawn = svgs(page({"tiny": runs()}, [measured], []))
    assert TITLE in drawn and links(drawn["Seconds of a step"]) == {figures.link([measured.id])}


def test_figures_of_adapters_and_of_settings_are_drawn_if_records_have_them():
    inside = {
        "similarity": {name: {"mean": {"A": [0.4, 0.1], "B": None}, "mean_square": {"A": [0.2, 0.1], "B": None}}
                       for name in ("within", "start")},
        "spectra": {side: {"values": [2.0, 1.0], "stable_rank": 1.5, "effective_rank": 1.8} for side in "AB"},
        "movement": {"factor": "A", "relative": [0.1, 0.2], "angle": 10.0},
        "routing": {**{kind: {"lexicon": [1.0, 0.5]} for kind in ("entropy", "largest_share", "unused")},
                    "load": [[0.7, 0.3], [0.6, 0.4]], "task_information": [0.0, 0.1]},
    }  # fmt: skip
    routed = [make(0, method=method, rate=4e-4, inside=inside) for method in ("malora", "molora")]
    drawn, each = svgs(page({"tiny": routed}, [], [])), {figures.link([r.id]) for r in routed}
    assert links(drawn["How alike experts are (Figure 2)"]) == each
    assert links(drawn["Singular values of the stacked experts (Figure 3)"]) == each
    assert "lexicon" in drawn["MALoRA: the busiest expert's share, by layer and task"].itertext()

    entries, tiny = EXPERIMENTS["table12"].entries, PROFILES["tiny"]
    grid = [make(0, method="malora", rate=4e-4) for _ in entries]
    for run, entry in zip(grid, entries, strict=True):
        options = method_options("malora", tiny, "procedural", entry.changes(tiny))
        run.config = run.config.replace(method_options=options)
    drawn = svgs(page({"tiny": grid}, [], []))["Mean score against β, for each d (Figure 4b)"]
    assert links(drawn) == {figures.link([r.id]) for r in grid} and {"d=16", "d=32", "d=48", "d=64"} <= set(
        drawn.itertext()
    )


def test_a_method_has_one_colour_and_its_variants_too():
    assert len({colour for colour, _ in STYLES.values()}) == len(STYLES)
    assert style("malora-fixed-s")[0] == style("malora")[0] != style("molora-r12")[0]


@pytest.fixture(scope="module")
def published_page(tmp_path_factory):
    """Return the page of the published records, which takes long to generate."""
    output = tmp_path_factory.mktemp("site") / "made" / "report.html"
    assert main(["report", "--output", str(output)]) == 0
    return output.read_text()


def test_the_command_writes_the_page_into_results_or_another_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bench.report.html.page", lambda *records: "<!doctype html>")
    monkeypatch.setattr("bench.cli.commands.LOCAL", tmp_path)
    monkeypatch.setattr(store, "RESULTS", tmp_path / "results")  # reading all published records takes seconds
    for arguments, path in ([], tmp_path / "report.html"), (["--output", f"{tmp_path}/a/b"], tmp_path / "a" / "b"):
        assert main(["report", *arguments]) == 0 and str(path) in capsys.readouterr().out
        assert path.read_text() == "<!doctype html>"
    assert main(["report", "--output", str(tmp_path)]) == 2
    assert f"--output {tmp_path} is a folder; name a file" in capsys.readouterr().err


def test_the_page_embeds_the_published_records(published_page):
    records = re.search(r'id="records">(.*?)</script>', published_page)[1]
    embedded = json.loads(gzip.decompress(base64.b64decode(records)))
    for run in store.read_all(store.RESULTS / "tiny"):
        there = json.loads(run.path.read_text())
        shown = embedded[figures.handle(run.id)]
        assert shown == {k: there.get(k) for k in shown}  # older records lack some fields
    published = [path.stem for path in store.RESULTS.glob("*/runs/*.json")]
    assert len({figures.handle(id) for id in published}) == len(published)
    assert len(published_page) < 3_000_000


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with driver.sync_playwright() as engines:
        try:
            found = engines.chromium.launch(executable_path=shutil.which("chromium"))
        except driver.Error as error:
            pytest.skip(f"no Chromium starts here: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Open a page from a file.

    At the end it must have made no network request and no console message.
    """
    said = []

    def open_(text, width=1280):
        (tmp_path / "report.html").write_text(text)
        tab = browser.new_page(viewport={"width": width, "height": 800})
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: request.url.startswith(("file:", "blob:")) or said.append(request.url))
        tab.goto((tmp_path / "report.html").as_uri())
        tab.wait_for_selector(".leaderboard .dt-container")
        return tab

    yield open_
    assert said == []


def test_tables_sort_by_number_filter_and_show_the_papers_rows_on_demand(open_page):
    from playwright.sync_api import expect

    tab = open_page(page({"tiny": [r for r in runs() if r.config.learning_rate != 2e-3]}, [], []))
    first = tab.locator(".leaderboard tbody tr:visible > :first-child")
    base = "base, no adapter"
    ours_and_theirs = [text for name in ("LoRA", "DoRA", "MoLoRA") for text in (name, f"{name}, the paper's")]
    expect(first).to_have_count(5)
    expect(first).to_contain_text([base, "LoRA", "DoRA", "MoLoRA", "MALoRA"])
    tab.get_by_label("show the paper's rows").check()
    expect(first).to_contain_text([base, *ours_and_theirs, "MALoRA"])
    tab.get_by_label("show the paper's rows").uncheck()
    tab.locator(".leaderboard th", has_text="mean").click()
    expect(first).to_contain_text(["MALoRA", "DoRA", base, "MoLoRA", "● LoRA"])  # none, 10, 25, 35, 50
    tab.locator(".leaderboard th", has_text="mean").click()
    expect(first).to_contain_text(["● LoRA", "MoLoRA", base, "DoRA", "MALoRA"])
    tab.get_by_label("Filter rows").first.fill("molora")
    expect(first).to_contain_text(["MoLoRA"])


def test_a_cell_opens_the_records_of_its_row_and_nothing_in_one_is_markup(open_page):
    hostile = "</script><img src=x onerror=alert(1)>"
    broken = make(0, "diverged", "malora", 4e-4)
    broken.error = hostile
    tab = open_page(
        page(
            {"tiny": [*runs()[:-1], broken]},
            [],
            [
                Claim(hostile, hostile, hostile, hostile, f"{bench_claims.HOLDS}, {hostile}", [], "tiny"),
                claim(f"{bench_claims.HOLDS}, on these items", broken.id),
                claim(bench_claims.FAILS),
            ],
        )
    )
    assert tab.locator("img").count() == 0 and tab.locator("[data-verdict=holds]").count() == 2
    assert tab.locator("[data-verdict=fails]").count() == 1
    tab.locator(".leaderboard td a", has_text="95.0 ±").first.click()
    ids = [r.id for r in runs() if r.config.method == "lora" and r.config.learning_rate == 2e-3]
    assert tab.locator("dialog[open] h3").all_inner_texts() == ids
    shown = tab.locator("dialog details", has_text="config").first
    shown.locator("summary").click()
    config = json.loads(shown.locator("pre").inner_text())
    assert config["learning_rate"] == 2e-3 and tab.locator("dialog polyline").count() == 2
    tab.keyboard.press("Escape")
    assert not tab.locator("dialog").is_visible()
    tab.goto(tab.url.partition("#")[0] + figures.link([broken.id]))  # a record has an address
    assert hostile in tab.locator("dialog[open] p").inner_text()


def test_the_top_of_the_page_sums_up_and_its_contents_resolve(open_page, published_page):
    tab = open_page(published_page)
    sentences = tab.locator(".summary li")
    assert sentences.count() == 3
    for place in (sentences.last, tab.locator("nav a").last):
        box = place.bounding_box()
        assert box["y"] + box["height"] <= 800  # above the fold of a desktop screen
    targets = tab.locator("nav a").evaluate_all("links => links.map(link => link.getAttribute('href').slice(1))")
    assert {"claims", "small", "tiny", "speed", "small-table2"} <= set(targets) and len(set(targets)) == len(targets)
    assert targets[0] == "claims" and targets.index("small") < targets.index("speed")
    for target in targets:
        assert tab.locator(f"[id='{target}']").count() == 1, target
    tab.locator("nav a", has_text="Table 12").first.click()
    assert tab.locator("#small-table12").bounding_box()["y"] < 10 and not tab.locator("dialog").is_visible()
    assert tab.locator(".paper").count() and not tab.locator(".paper:visible").count()
    assert tab.locator(".paper").count() == tab.locator(".with-paper .paper").count()  # all can be shown
    for box in tab.get_by_label("show the paper's rows").all():
        box.check()
    assert tab.locator(".paper:visible").count() == tab.locator(".paper").count()


def test_a_phone_scrolls_tables_and_not_the_page(open_page, published_page):
    tab = open_page(published_page, width=390)
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    wide = tab.locator(".leaderboard .scroll").first
    assert wide.evaluate("box => getComputedStyle(box, '::before').visibility") == "visible"  # "scroll sideways"
    assert "gradient" in wide.evaluate("box => getComputedStyle(box).maskImage")  # fades at its right edge
    wide.evaluate("box => box.scrollTo(box.scrollWidth, 0)")
    tab.wait_for_function("!document.querySelector('.leaderboard .scroll').classList.contains('more')")
    assert wide.evaluate("box => getComputedStyle(box).maskImage") == "none"
    name = wide.locator("tbody tr > :first-child").first.bounding_box()
    assert name["x"] >= 0 and name["width"] < 390 / 2  # stays visible, and leaves space for the others
    wide.evaluate("box => box.scrollTo(0, 0)")
    tab.locator(".leaderboard tbody a").first.click()
    assert tab.locator("dialog[open]").bounding_box()["width"] <= 390


def test_a_page_escapes_what_records_hold():
    """Without a browser: names of devices and rows, options and errors are text."""
    value = "</script><img src=x onerror=alert(1)><!-- end -->`|\n[x](javascript:alert(1))"
    record = speed_records.made_at(speed_records.make_speed(rows=[speed_records.row(value, 1.0)]), device=value)
    run = make(0, "diverged", "malora", 4e-4)
    run.error, run.provenance = value, CLEAN.replace(device=value)
    claims = [Claim(value, value, value, value, f"{bench_claims.HOLDS}, {value}", [], "tiny")]
    html, plain = page({"tiny": [*runs()[:-1], run]}, [record], claims), page({"tiny": runs()}, [], [])
    assert "<img" not in html and "&lt;img src=x onerror=alert(1)&gt;" in html
    assert html.count("</script>") == plain.count("</script>") and 'href="javascript' not in html
