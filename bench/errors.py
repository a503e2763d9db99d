"""The error that command lines report in one line, and its text for an unknown name."""

from tasks.errors import UserError, unknown_name

__all__ = ["UserError", "unknown_name"]
