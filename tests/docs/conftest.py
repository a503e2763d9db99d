"""Fixtures of the documentation's programs."""

from tests.bench.conftest import base_folder  # noqa: F401
