"""Run model-written Python programs in a sandbox."""
