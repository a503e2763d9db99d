"""Tools shared by training, evaluation and speed measurements: attention, logits and timing."""
