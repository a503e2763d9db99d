"""The metric `balanced_accuracy`."""
