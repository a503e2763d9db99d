"""Tools that make the frozen part of a model faster.

Nothing here runs unless the user calls it.
"""

from malora.backbone.optimize import optimize_backbone, restore_backbone

__all__ = ["optimize_backbone", "restore_backbone"]
