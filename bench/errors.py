"""The error that command lines report in one line."""

from tasks.errors import UserError

__all__ = ["UserError"]
