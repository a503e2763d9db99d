"""A harness that trains adapters on mixtures of tasks and scores them.

It writes leaderboards from its records.
"""
