"""Tools shared by training, evaluation and speed measurements.

They are attention, logits, tokens and timing.
"""
