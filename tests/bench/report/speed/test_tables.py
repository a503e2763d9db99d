"""Tables and pages of the speed benchmark are computed from its records."""

from bench.records import store
from bench.report.speed import summary, tables
from tests.bench.report.speed.speed_records import made_at, make_speed, records, row


def test_a_sweep_names_the_values_at_which_a_sparse_row_is_the_fastest():
    def swept(method, **milliseconds):  # at 8, 64 and 256 experts; 0 did not run
        for name, (*steps,) in milliseconds.items():
            for value, step in zip((8, 64, 256), steps, strict=True):
                found = row(f"{method}-{name}", step, method=method) | {"backend": name, "value": value}
                yield found if step else found | {"status": "oom", "seconds": {}}

    rows = [
        *swept("molora", fused=(1, 2, 8), dispatch=(9, 9, 3), sorted=(2, 1.5, 4)),
        *swept("malora", fused=(1, 2, 0), sorted=(2, 3, 4)),
        *swept("moasylora", fused=(1, 2, 3), sorted=(2, 3, 0)),
    ]
    page = tables.section(make_speed(mode="layer", rows=rows, sweep="experts", flops=None))
    molora = "`molora-sorted` is the fastest at 64; `molora-dispatch` is the fastest at 256"
    assert f"Crossover, molora by experts: {molora}.\n" in page
    assert "Crossover, malora by experts: `malora-sorted` is the fastest at 256.\n" in page
    assert page.endswith("Crossover, moasylora by experts: no sparse row wins.")


def test_a_page_shows_each_set_of_rows_of_the_newest_code_and_a_line_for_the_rest():
    def made(variant, day, code):
        return made_at(make_speed(variant=variant, rounds=day), f"2026-01-0{day}T00:00:00Z", source_sha256=code)

    old, few, full, again = made("all", 1, "a"), made("dispatch", 2, "b"), made("all", 3, "b"), made("all", 4, "b")
    few = few.replace(rows=few.rows[:5])
    small = make_speed("smollm2-135m", batch=16, length=128)
    assert summary.shown([small, again, few, full, old]) == [again, few, small]
    page = tables.pages([full, few, small, old, again])["table10.md"]
    assert page.count("## llama2-7b, train, a CPU") == 2 and page.count("## smollm2-135m, train, a CPU") == 1
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `llama2")]
    commit = "`000000000000`"
    assert lines == [[f"`{r.id}`", commit, str(r.options.rounds), "12", "1.062", "1.062", "0.5312"]
                     for r in (old, full)]  # fmt: skip


def test_a_row_that_did_not_run_has_a_reason():
    record = make_speed()
    record.rows[-3] = record.rows[-3].replace(status="oom", reason="too much", seconds={})
    assert "oom: too much" in tables.section(record)


def test_the_table_has_ratios_and_shares():
    (line,) = (line for line in tables.section(make_speed()).splitlines() if line.startswith("| peft-lora "))
    cells = [cell.strip() for cell in line.split("|")]
    # × compiled backbone, × eager backbone, × PEFT LoRA; 8 operations in 2 s on a device that does 16 per second.
    assert cells[8:12] == ["2", "1.67", "1", "25.0%"] and cells[5] == "2" and cells[7] == "8,192"
    assert cells[14:16] == ["1600", "700"]  # MHz, W


def test_the_page_lists_the_longest_kernels():
    """Check that the kernels of MALoRA's fastest row and its baseline are listed.

    The baseline is the compiled frozen backbone.
    """
    page = tables.section(make_speed())
    (line,) = (line for line in page.splitlines() if "slow_kernel_of_malora-dense-compiled" in line)
    assert [cell.strip() for cell in line.split("|")[2:4]] == ["3", "796.9"]  # 0.75 of a step of 1.0625 s
    assert "slow_kernel_of_floor-compiled" in page and "slow_kernel_of_malora-dense`" not in page


def test_pages_are_the_same_in_any_order_and_from_what_was_read_back(tmp_path, history):
    made = records()
    paths, refused = store.publish(made, tmp_path)
    assert len(paths) == 4 and not refused
    assert store.publish(made, tmp_path) == ([], [])  # a published record is never replaced
    assert tables.pages(store.read_speed(tmp_path)) == tables.pages(made[::-1]) != {}


def test_a_record_of_a_machine_without_history_is_published_once(tmp_path, history):
    made = made_at(make_speed(), commit="earlier", dirty=True)
    assert len(store.publish([made], tmp_path)[0]) == 1
    assert store.publish([made], tmp_path) == ([], [])


def test_the_published_pages_are_generated_from_their_records():
    folder = store.RESULTS / "speed"
    for name, text in tables.pages(store.read_speed(folder)).items():
        assert (folder / name).read_text() == text, name
