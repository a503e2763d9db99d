"""Train one adapter: batches, the step, the loop and its checkpoint."""
