"""Former name of the analysis functions.

Use `malora.analysis`; this module goes in the next version.
"""

import warnings

from malora.analysis import (
    Movement,
    Similarity,
    Spectrum,
    canonical_correlations,
    chance_level,
    means,
    movement,
    similarities,
    spectra,
)

__all__ = [
    "Movement",
    "Similarity",
    "Spectrum",
    "canonical_correlations",
    "chance_level",
    "means",
    "movement",
    "similarities",
    "spectra",
]

warnings.warn(
    "malora.similarity is now malora.analysis; the old name goes in the next version.",
    DeprecationWarning,
    stacklevel=2,
)
