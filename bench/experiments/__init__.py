"""Describe the experiments: profiles, methods at a profile's size, and the registry of tables and figures."""
