"""The harness: trains adapters on mixtures of tasks, scores them, keeps records and writes leaderboards from them."""


class UserError(ValueError):
    """Something the user asked for cannot be done; the message says what, where and what to do. Exit code 2."""
