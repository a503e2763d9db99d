"""The metric `pass_at_1`."""
