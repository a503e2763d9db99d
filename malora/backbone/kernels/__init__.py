"""Triton kernels of the frozen layers, each with the function that launches it."""
