"""Tools that make the frozen part of a model, and its training steps, faster or smaller.

Nothing here runs unless the user calls it.
"""

from malora.backbone.capture import CapturedStep, capture_step
from malora.backbone.checkpointing_modes import checkpointing_mode, set_checkpointing
from malora.backbone.optimize import optimize_backbone, restore_backbone

__all__ = [
    "CapturedStep",
    "capture_step",
    "checkpointing_mode",
    "optimize_backbone",
    "restore_backbone",
    "set_checkpointing",
]
