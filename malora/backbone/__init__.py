"""Tools that make the frozen part of a model, and its training steps, faster.

Nothing here runs unless the user calls it.
"""

from malora.backbone.capture import CapturedStep, capture_step
from malora.backbone.optimize import optimize_backbone, restore_backbone

__all__ = ["CapturedStep", "capture_step", "optimize_backbone", "restore_backbone"]
