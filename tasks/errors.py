"""Errors that are told to the user in one line."""


class UserError(ValueError):
    """Raised when a request of the user cannot be met.

    The message says what, where and what to do. Command lines print it and exit with code 2.
    """


class DataError(UserError):
    """Raised when a data file is missing or broken. The message names the file, and the line where there is one."""
