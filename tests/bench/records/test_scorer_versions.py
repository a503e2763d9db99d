"""Versions of the scorer: which scores a change concerns, and which runs it makes new."""

from dataclasses import replace

import pytest

from bench.experiments.profiles import PROFILES
from bench.records import store
from bench.records.scorer_versions import changes_since, named_versions, scorer_version
from bench.runs.setting import RunSettings, make_run_config
from tests.bench.conftest import SOURCE
from tests.bench.records.test_store import CONFIG


def test_a_change_concerns_a_metric_or_a_task():
    assert scorer_version("arc_easy", "acc") == 2 and scorer_version("arc_easy", "acc_norm") == 3
    assert scorer_version("e2e", "rougeL") == 3 and scorer_version("report", "rougeL") == 2
    assert named_versions({"piqa": "acc_norm", "e2e": "rougeL", "humaneval": "pass@1"}) == {"e2e": 3, "piqa": 3}
    assert named_versions({"piqa": "acc", "report": "rougeL"}) is None
    assert len(changes_since("piqa", "acc_norm", 1)) == 2 and changes_since("piqa", "acc_norm", 3) == []


def test_a_configuration_names_only_later_versions():
    """Otherwise runs that a change does not concern would be made again."""
    named = CONFIG.replace(scorer_versions={"e2e": 3})
    assert "scorer_versions" not in CONFIG.to_json() and named.to_json()["scorer_versions"] == {"e2e": 3}
    assert named.hash != CONFIG.hash == CONFIG.replace(scorer_versions=None).hash


@pytest.mark.parametrize("format, versions", [("letters", None), ("cloze", 3)])
def test_a_run_has_the_versions_of_its_tasks(format, versions, base_folder, tmp_path):
    profile = replace(PROFILES["tiny"], source=SOURCE, format=format)
    setting = RunSettings(profile, str(base_folder), SOURCE, "intra", tmp_path)
    named = make_run_config(setting, "lora", 0).scorer_versions
    assert named == (versions and dict.fromkeys(("comparison", "lexicon", "majority", "seasons", "second"), 3))


def test_no_published_record_names_a_version_that_its_scores_do_not_have():
    for profile in ("tiny", "small"):
        for record in store.read_all(store.RESULTS / profile):
            named = record.config.scorer_versions or {}
            for task, score in (record.test or {}).items():
                assert named.get(task, 2) == max(score.version, 2), record.id
