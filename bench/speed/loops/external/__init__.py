"""Rows of other packages, which train in a worker process with an environment of their own."""
