"""Errors that are told to the user in one line."""


class UserError(ValueError):
    """Something the user asked for cannot be done; the message says what, where and what to do. Exit code 2."""
