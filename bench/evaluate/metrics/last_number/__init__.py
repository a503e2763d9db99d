"""The metric `last_number`."""
