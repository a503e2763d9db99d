"""Tables follow from records, and say no more than the records do."""

import pytest

from bench.experiments.methods import method_options
from bench.experiments.profiles import PROFILES, TUNING_SEED
from bench.experiments.registry import EXPERIMENTS
from bench.records import scorer_versions, store
from bench.report import readme
from bench.report.scores.experiment_page import experiment_page
from bench.report.scores.leaderboard import compare_rows
from bench.report.scores.rates import choose_rates
from bench.report.scores.selection import (
    LearningRates,
    difference,
    mixture_rows,
    records_frame,
    select,
    select_comparable,
    spread,
    tuned_rates,
)
from bench.report.stats import Spread
from tests.bench.records.test_store import make

TABLE2 = EXPERIMENTS["table2"]


def records():
    runs = [
        make(seed, method="lora", rate=rate, right=right)
        for rate, right in ((4e-4, 0.4), (2e-3, 0.9))
        for seed in (0, 1)
    ]
    runs += [
        make(seed, method="molora", rate=rate, right=right)
        for rate, right in ((4e-4, 0.3), (2e-3, 0.5))
        for seed in (0, 1)
    ]
    runs += [make(0, "diverged", "malora", 2e-3), make(0, method="malora", rate=4e-4, right=0.9)]
    return [*runs, make(0, method="base", rate=None, right=0.25, validation=None)]


def page(runs=None, **options):
    return experiment_page(select(TABLE2, "tiny", records_frame(runs or records())), **options)


def page_at(tuned, runs, published=None):
    """The page of these runs at given learning rates."""
    selection = select(TABLE2, "tiny", records_frame(runs), rates=LearningRates(tuned, TABLE2))
    return experiment_page(selection, published=None if published is None else records_frame(published))


def line(text, start):
    return next(row for row in text.splitlines() if row.startswith(f"| {start}"))


def test_rates_are_chosen_on_validation_and_a_method_that_was_not_swept_has_none():
    assert choose_rates(records_frame(records())) == {"lora": 2e-3, "molora": 2e-3, "malora": 4e-4}
    assert choose_rates(records_frame([make(0)])) == {} == choose_rates(records_frame([]))


def searched(method, rate, loss, **options):
    """A run of a search: its validation loss, and an accuracy that rises with the rate."""
    one = make(TUNING_SEED, method=method, rate=rate, right=min(1.0, 100 * rate), **options)
    if one.status != "ok":
        return one
    return one.replace(validation={task: s.replace(loss=loss, label_tokens=40) for task, s in one.validation.items()})


def test_a_search_chooses_by_validation_loss_and_is_in_no_row():
    runs = [searched("lora", rate, loss) for rate, loss in ((4e-4, 1.0), (6e-4, 0.8), (9e-4, 0.8), (2e-3, 1.2))]
    runs += [searched("malora", 4e-4, 1.0), make(TUNING_SEED, "diverged", "malora", 9e-4)]
    assert choose_rates(records_frame([*records(), *runs])) == {"lora": 6e-4, "malora": 4e-4}
    reported = [make(seed, method="lora", rate=6e-4, right=0.7) for seed in (0, 1)]
    selection = select(TABLE2, "tiny", records_frame([*runs, *reported]))
    (row,) = selection.rows(selection.rates.tuned)
    assert [record.config.seed for record in row.records] == [0, 1]
    text = " ".join(experiment_page(selection).split())
    assert "| LoRA | 1.000 (5.0) | **0.800** (7.5) | 0.800 (10.0) | 1.200 (20.0) |" in text
    assert "| MALoRA | **1.000** (5.0) | not run | diverged by step 70 |" in text
    assert "**This sweep is not complete**: a rate next to the best one was not run of MALoRA." in text
    assert "By validation accuracy it would be LoRA 0.002, more than one rate away" in text


def test_rows_say_which_differences_are_real():
    text = page()
    assert "| best " in line(text, "LoRA ") and "90.0 ± 0.0" in line(text, "LoRA ")
    assert "worse: -40.0 [" in line(text, "MoLoRA ") and "1,234" in line(text, "MoLoRA ")
    assert "not distinguishable: +0.0 [+0.0, +0.0], p=1" in line(text, "MALoRA ")  # the same answers as LoRA's
    assert "25.0" in line(text, "base, no adapter")
    assert "*80.5*" in line(text, "*MALoRA, the paper's*")  # the mean of Table 2, rounded
    assert "diverged by step 70" in text and "validation or test set has them: 3 of lexicon." in text


def test_other_methods_have_rows_too_and_other_options_do_not_mix():
    extra = make(0, method="malora-small", rate=4e-4)
    other = make(0, method="lora", rate=2e-3, right=0.1)
    other.config = other.config.replace(method_options={"r": 3})
    text = page([*records(), extra, other])
    assert line(text, "MALoRA-Small ") and line(text, "LoRA ") == line(page(), "LoRA ")
    assert "1 records of other settings" in text


def test_a_sweep_counts_where_all_that_ran_were_swept():
    """Check that Table 2 lends its rates to all unless all that ran were swept.

    So no row is tuned while another is not.
    """
    table3, lent = EXPERIMENTS["table3"], records()

    def on_domains(method, rate, right=0.5):
        run = make(0, method=method, rate=rate, right=right)
        usual = method_options(method, PROFILES["tiny"], "procedural-inter", {})
        return run.replace(config=run.config.replace(mixture="procedural-inter", method_options=usual))

    swept = [on_domains("malora", 5e-4, right=0.4), on_domains("malora", 1e-3, right=0.6)]

    def tuned(known):
        rates = tuned_rates(table3, records_frame(known))
        return rates.tuned, rates.source

    assert tuned(lent + swept) == ({"malora": 1e-3}, table3)
    known = lent + swept + [on_domains("molora", 2e-3)]
    assert tuned(known) == ({"molora": 2e-3, "malora": 4e-4}, TABLE2)
    known += [on_domains("molora", 1e-3, right=0.7)]
    assert tuned(known) == ({"malora": 1e-3, "molora": 1e-3}, table3)


def test_the_origin_of_rates_is_named_with_its_format_if_that_is_another():
    table3, lent = EXPERIMENTS["table3"], records()
    usual = method_options("malora", PROFILES["tiny"], "procedural-inter", {})
    run = make(0, method="malora", rate=4e-4)
    for format, said in (
        ("letters", "of Table 2: intra-domain, which"),
        ("cloze", "intra-domain, format `letters`, which"),
    ):
        config = run.config.replace(mixture="procedural-inter", method_options=usual, format=format)
        here, both = (records_frame([run.replace(config=config), *more]) for more in ([], lent))
        assert said in experiment_page(select(table3, "tiny", both))
        assert said in experiment_page(
            select(table3, "tiny", here, rates=tuned_rates(table3, both)), published=records_frame(lent)
        )


def test_an_empty_folder_selects_nothing():
    nothing = select(EXPERIMENTS["table3"], "tiny", records_frame([]))
    assert nothing.records == [] and nothing.left_out == 0 and nothing.rates.tuned == {}
    assert nothing.rows(nothing.at_own_rate) == []


def test_records_like_a_configuration_are_selected_even_if_they_are_fewer():
    few = [run.replace(config=run.config.replace(epochs=2)) for run in records()[:2]]
    frame = records_frame([*records(), *few])
    assert len(select_comparable(frame, TABLE2)[0]) == len(records())
    mine, left_out = select_comparable(frame, TABLE2, few[0].config)
    assert sorted(mine["id"]) == sorted(run.id for run in few) and left_out == len(records())


def test_a_method_that_was_tried_at_fewer_rates_is_marked():
    assert "**Best of 2 of 3 rates**" in line(page([*records(), make(0, method="lora", rate=1e-3)]), "MoLoRA ")
    assert "Best of" not in page()


def test_a_reproduction_without_a_sweep_does_not_look_like_one():
    text = page([*records(), make(0, method="lora", rate=1e-3)], swept=False)
    assert "Best of" not in text and "Scores by learning rate" not in text and "by the published sweep" in text


def test_one_seed_is_a_statement_about_items():
    runs = [make(0, method="lora", right=0.9), make(0, method="molora", right=0.5)]
    text = page_at({"lora": 2e-3, "molora": 2e-3}, runs)
    assert "worse on these items" in line(text, "MoLoRA ") and "neither the interval nor the test covers" in text


def test_one_seed_with_rows_of_several_is_a_statement_about_methods():
    runs = [make(0, method="lora", right=0.9), make(0, method="molora", right=0.5)]
    for seed, right in enumerate((0.45, 0.5, 0.55)):
        runs.append(make(seed, method="dora", right=right))
    text = page_at({"lora": 2e-3, "molora": 2e-3, "dora": 2e-3}, runs)
    assert "worse: " in line(text, "MoLoRA ") and "takes it from all rows of this mixture" in text


def test_the_best_row_is_corrected_for_all_pairs_and_a_fixed_reference_for_its_own():
    """Of three rows, two comparisons are with the reference and three are pairs: the smallest p counts 2 or 3 times."""
    rights = {"lora": (0.60, 0.66, 0.72), "molora": (0.55, 0.59, 0.6), "dora": (0.5, 0.6, 0.7)}
    runs = [
        make(seed, method=method, right=right) for method, three in rights.items() for seed, right in enumerate(three)
    ]
    rates = dict.fromkeys(rights, 2e-3)
    lora, *others = select(TABLE2, "tiny", records_frame(runs), rates=LearningRates(rates, TABLE2)).rows(rates)
    p = min(difference(lora, row, None).p for row in others)
    of_pairs, of_fixed = (
        min(v.p for v in compare_rows([lora, *others], lora, None, is_fixed=fixed).values()) for fixed in (False, True)
    )
    assert of_pairs == pytest.approx(3 * p) and of_fixed == pytest.approx(2 * p)
    assert "all pairs of rows" in page_at(rates, runs)


def test_single_runs_take_their_spread_from_all_tables_of_the_mixture():
    runs = [make(seed, method="lora", rate=2e-3, right=right) for seed, right in enumerate((0.4, 0.5, 0.6))]
    runs += [make(0, method="lora", rate=1e-3, right=0.1), make(0, method="malora", right=0.5)]
    selection = select(
        EXPERIMENTS["table12"], "tiny", records_frame(runs), rates=LearningRates({"malora": 2e-3}, TABLE2)
    )
    assert [row.title for row in selection.rows(selection.rates.tuned)] == ["MALoRA r=12 d=32 β=1.25"]
    rows = mixture_rows(selection, selection.rates.tuned)
    assert sorted(row.title for row in rows) == ["LoRA", "MALoRA r=12 d=32 β=1.25"]
    assert spread(rows) == Spread(pytest.approx(0.01), 2)  # of 0.4, 0.5 and 0.6


def test_rows_without_two_common_seeds_are_compared_over_all_their_seeds():
    runs = [make(seed, method="lora", right=right) for seed, right in enumerate((0.6, 0.7, 0.8))]
    runs += [
        make(2, method="molora", right=0.5),
        make(3, method="molora", right=0.6),
        make(4, method="dora", right=0.1),
    ]
    text = page_at({"lora": 2e-3, "molora": 2e-3, "dora": 2e-3}, runs)
    assert "-15.0 [" in line(text, "MoLoRA ") and "-60.0 [" in line(text, "DoRA ")


def test_a_base_without_a_score_is_a_row():
    assert "1 of 1 runs oom" in line(
        page([*records()[:-1], make(0, "oom", "base", None, data=None)]), "base, no adapter"
    )


def test_a_run_that_diverged_is_not_hidden():
    text = page([*records(), make(1, "diverged", "malora", 4e-4)])
    assert "1 of 2 runs diverged" in line(text, "MALoRA ")


def test_the_same_records_give_the_same_page_in_any_order():
    assert page(records()) == page(records()[::-1])


def test_records_of_another_setting_are_not_mixed_in():
    other = make(5, method="lora", rate=4e-4, data={"sha256": {"test": "other"}, "dropped": {}})
    text = page([*records(), other])
    assert "1 records of other settings" in text
    assert line(text, "LoRA ") == line(page(), "LoRA ")


def test_runs_that_were_cut_short_are_marked():
    runs = records()
    for run in runs:
        run.config = run.config.replace(max_steps=3)
    assert "were cut short" in page(runs) and "were cut short" not in page()


@pytest.mark.parametrize("right, verdict", [(0.9, "reproduced"), (0.5, "not reproduced")])
def test_a_reproduction_is_compared_with_the_published_means(right, verdict):
    mine = [make(seed, method="lora", rate=2e-3, right=right) for seed in (0, 1)]
    text = page_at({"lora": 2e-3}, mine, published=records())
    assert f"LoRA at its own rate, 0.002: **{verdict}**: {100 * right:.1f} here, 90.0 published" in text


def test_a_reproduction_on_another_base_says_so():
    def text(model_hash):
        mine = [make(seed, method="lora", rate=2e-3) for seed in (0, 1)]
        for run in mine:
            run.config = run.config.replace(model_hash=model_hash)
        return page_at({"lora": 2e-3}, mine, published=records())

    published = records()[0].config.model_hash
    assert f"another base, `another` for the published `{published[:12]}`" in text("another")
    assert "another base" not in text(published)


def test_no_records_no_table():
    assert "No complete run is recorded yet" in page_at({}, [])


def test_the_published_tables_are_what_their_records_give():
    """Compare the committed pages of the tiny profile with their records, byte for byte.

    `make check-tables` does so with all pages, which takes longer.
    """
    published = {name: store.read_all(store.RESULTS / name) for name in ("tiny", "small", "paper")}
    pages = readme.published_pages({"tiny": published["tiny"]}, [])
    assert "tiny/table2.md" in pages
    for path, text in pages.items():
        if path.startswith("tiny/"):
            assert (store.RESULTS / path).read_text(encoding="utf-8") == text, path
    for name, found in published.items():
        for run in found:
            assert run.complete and run.provenance.commit and not run.provenance.dirty, (name, run.config.id)


@pytest.fixture
def changed_scorer(monkeypatch):
    """The scorer of lexicon has changed since the records of this file were made."""
    changes = (*scorer_versions.CHANGES, scorer_versions.Change(3, "lexicon", "its words are counted otherwise"))
    monkeypatch.setattr(scorer_versions, "CHANGES", changes)


def rescored(seed, **options):
    run = make(seed, **options)
    test = {task: score.replace(version=3 if task == "lexicon" else 2) for task, score in run.test.items()}
    return run.replace(test=test, config=run.config.replace(scorer_versions={"lexicon": 3}))


def test_scores_of_an_older_scorer_are_marked(changed_scorer):
    assert (
        "**Scored by an older version**: 10 of 11 records. Their scores of lexicon cannot be compared with scores "
        "made since: its words are counted otherwise."
    ) in page()


def test_scores_of_two_versions_are_not_in_one_table(changed_scorer):
    """The version with most records counts, and `like` chooses another; nothing is lost from the frame."""
    new = [rescored(seed, method="lora", rate=2e-3, right=0.1) for seed in (0, 1)]
    both = records_frame([*records(), *new])
    assert len(both) == len(records()) + 2
    older, left_out = select_comparable(both, TABLE2)
    assert len(older) == len(records()) and left_out == 2
    chosen, left_out = select_comparable(both, TABLE2, like=new[0].config)
    assert {record.id for record in chosen["record"] if record.status == "ok"} == {record.id for record in new}
    assert left_out == len(records()) - 1  # the diverged run has no scores
    assert page([*records(), *new]).count("Scored by an older version") > 0


def test_a_reproduction_with_another_scorer_is_not_compared(changed_scorer):
    mine = [rescored(seed, method="lora", rate=2e-3) for seed in (0, 1)]
    text = page_at({"lora": 2e-3}, mine, published=records())
    assert "The published scores of lexicon, majority are of another version of the scorer" in text
    assert "reproduced" not in text.replace("reproduction", "")


def test_single_tasks_without_a_change_stay_in_the_table_of_their_suite():
    """A domain's own runs have no changed task, so they belong to the table of the old suite and of the new one."""
    usual = method_options("lora", PROFILES["tiny"], "procedural-inter", {})

    def on(mixture, **changes):
        run = make(0, method="lora")
        config = run.config.replace(mixture=mixture, method_options=usual, **changes)
        return run.replace(config=config, test={"majority": run.test["majority"]} if "/" in mixture else run.test)

    old, new = on("procedural-inter"), on("procedural-inter", scorer_versions={"lexicon": 3})
    part = on("procedural-inter/counting_train")
    for suite in (old, new):
        found, _ = select_comparable(records_frame([old, new, part]), EXPERIMENTS["table1"], like=suite.config)
        assert {record.id for record in found["record"]} == {suite.id, part.id}
