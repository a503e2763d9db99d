"""Records whose scores can be compared: of the same test set, and of one version of the scorer."""

from __future__ import annotations

from collections import Counter

import pandas as pd

from bench.records.schema import RunConfig
from bench.records.scorer_versions import UNNAMED


def same_test(group: pd.DataFrame) -> pd.DataFrame:
    """Return the records with the most common test set of their mixture.

    Those that did not read any data are returned too.
    """
    known = group.dropna(subset=["test_hash"])
    commonest = known.groupby("mixture")["test_hash"].agg(lambda hashes: hashes.mode().iloc[0])
    return group[group["test_hash"].isna() | (group["test_hash"] == group["mixture"].map(commonest))]


def same_scorer(group: pd.DataFrame, like: RunConfig | None) -> pd.DataFrame:
    """Return the records whose scores of a task are all of one version of the scorer.

    The version is that of `like`, else the most common one. Records without scores are returned too.
    """
    versions = group["record"].map(
        lambda record: {task: _named(record.config).get(task, UNNAMED) for task in record.test or {}}
    )
    expected = _named(like)
    if like is None:
        counts = Counter((task, version) for of_record in versions for task, version in of_record.items())
        expected = {task: version for (task, version), _ in sorted(counts.items(), key=lambda item: item[::-1])}
    agrees = versions.map(lambda found: all(expected.get(task, UNNAMED) == found[task] for task in found))
    return group[agrees.astype(bool)]


def _named(config: RunConfig | None) -> dict[str, int]:
    return (config and config.scorer_versions) or {}
