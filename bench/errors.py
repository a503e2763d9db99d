"""The error that command lines tell the user in one line."""

from tasks.errors import UserError

__all__ = ["UserError"]
