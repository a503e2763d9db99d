"""Rows that several GPUs train together, each in a process of its own."""
