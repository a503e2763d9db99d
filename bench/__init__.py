"""The harness: trains adapters on mixtures of tasks, scores them, keeps records and writes leaderboards from them."""
