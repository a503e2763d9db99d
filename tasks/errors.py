"""Errors that command lines report in one line."""


class UserError(ValueError):
    """Raised when a user's request cannot be met.

    The message says what is wrong, where, and what to do. Command lines print it and exit with code 2.
    """


class DataError(UserError):
    """Raised when a data file is missing or broken.

    The message names the file and, for a broken record, its number or line.
    """
