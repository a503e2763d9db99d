"""The paper's tables as lists of rows."""

import pytest

import malora
from bench.experiments.registry import EXPERIMENTS, TableEntry, single_task_mixtures
from bench.report.paper import paper


def config_of(experiment, title):
    entry = next(entry for entry in EXPERIMENTS[experiment].entries if entry.title == title)
    return malora.METHODS[entry.method](**entry.options)


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table11", "table12"])
def test_a_table_has_the_papers_rows(name):
    assert {entry.title for entry in EXPERIMENTS[name].entries} == set(paper()[name]) - {"base, no adapter"}


def test_the_rows_have_the_papers_sizes():
    """Check that all (r, d) of Table 12 have equally many parameters.

    Section 3 and Table 12: 8 r + d = 128 matrix rows.
    """
    for entry in EXPERIMENTS["table12"].entries:
        config = malora.METHODS[entry.method](**entry.options)
        assert entry.title == f"MALoRA r={config.r} d={config.d} β={config.beta:g}"
        assert 8 * config.r + config.d == 128 and config.scaling == 2
    config = config_of("table11", "MALoRA r=48 d=128 β=5")
    assert (config.r, config.d, config.beta, config.scaling) == (48, 128, 5, 2)
    assert config_of("table11", "MoLoRA r=8") == malora.METHODS["molora"]()
    assert config_of("fig5", "AsyLoRA r=256").freeze == ["A"] and config_of("fig5", "LoRA r=8").lora_alpha == 16


def test_a_variant_has_the_learning_rate_of_its_method():
    assert TableEntry("malora-frozen-p").tuning_group == "malora" and TableEntry("moasylora").tuning_group == "molora"
    assert TableEntry("malora-small", own_rate=True).tuning_group == "malora-small"


def test_every_mixture_has_its_single_tasks():
    assert single_task_mixtures("intra") == [
        f"intra/{t}" for t in ("piqa", "openbookqa", "boolq", "arc_challenge", "arc_easy")
    ]
    assert "inter-open/mathematics" in single_task_mixtures("inter-open") and len(single_task_mixtures("inter")) == 6
