"""Scoring of a model with lm-eval, and analysis of trained adapters.

This package also generates and grades answers.
"""
