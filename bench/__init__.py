"""A harness that trains adapters on mixtures of tasks, scores them, and writes leaderboards from its records."""
