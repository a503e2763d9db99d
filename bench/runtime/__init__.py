"""Tools shared by training, evaluation and speed measurements.

They are attention, logits and timing.
"""
