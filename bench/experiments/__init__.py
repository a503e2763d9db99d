"""Profiles, methods at a profile's size, and the registry of tables and figures.

They describe the experiments.
"""
