"""Faster execution of the frozen part of a model: fused norms, Liger's kernels and CUDA graphs."""
