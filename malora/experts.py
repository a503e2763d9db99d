"""Former name of `malora.analysis.experts`.

`malora.analysis.experts` has new names for two functions. This name goes in the next version.
"""

import warnings

from malora.analysis.experts import Experts, paired_experts
from malora.analysis.experts import extract_experts as experts
from malora.analysis.experts import load_experts as saved_experts

__all__ = ["Experts", "experts", "paired_experts", "saved_experts"]

warnings.warn(
    "malora.experts is now malora.analysis (experts is extract_experts, saved_experts is load_experts); "
    "the old name goes in the next version.",
    DeprecationWarning,
    stacklevel=2,
)
