"""The choice of learning rates from the runs of sweeps."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd

from bench.experiments.profiles import SWEEP_SEED, TUNING_SEED
from bench.experiments.registry import TableEntry


def swept_runs(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of the sweeps in a frame of one mixture.

    A search, on its own seed, counts more than a sweep that tried all rates. Runs with other options than the method's
    own do not count.
    """
    frame = frame[frame["learning_rate"].notna()]
    searched = frame[frame["seed"] == TUNING_SEED]
    sweep = searched if len(searched) else frame[frame["seed"] == SWEEP_SEED]
    examples = sweep.drop_duplicates("variant")
    usual = {
        variant: TableEntry(record.config.method).matches(record.config)
        for variant, record in zip(examples["variant"], examples["record"], strict=True)
    }
    sweep = sweep[sweep["variant"].map(usual).astype(bool)]
    return sweep.drop_duplicates(["method", "learning_rate"], keep="last")


def choose_rates(frame: pd.DataFrame, at_floor: Collection[str] = ()) -> dict[str, float]:
    """Return by method the learning rate that its sweep chose.

    A search chooses the lowest validation loss; a sweep of all rates chose the best validation mean. Of equal ones the
    lower rate is taken. A method with a single rate was not tuned and is left out.

    Args:
        frame: Records of one mixture.
        at_floor: Tasks whose loss does not count.
    """
    tried = swept_runs(frame)
    by_loss = (tried["seed"] == TUNING_SEED).any()
    scores = tried["record"].map(lambda record: -record.validation_loss(at_floor)) if by_loss else tried["validation"]
    scores = scores.where(tried["status"] == "ok").astype(float).fillna(-np.inf)
    tried = tried.assign(score=scores)
    best = tried.sort_values(["score", "learning_rate"], ascending=[False, True]).groupby("method").first()
    counts = tried.groupby("method", sort=False).size()
    return {method: float(best.loc[method, "learning_rate"]) for method in counts[counts > 1].index}
