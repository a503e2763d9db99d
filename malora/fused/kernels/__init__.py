"""Triton kernels of the fused path, and the host functions that launch them.

| file | formula |
| --- | --- |
| `dropout.py` | bits ~ Bernoulli(1 - p); dropout(x) = x ⊙ bits / (1 - p) |
| `down_forward.py` | [z, logits] = [dropout(x) Wdᵀ, x Wrᵀ] |
| `gate.py` | h = top_k(softmax(logits)) ⊙ P z, and its gradient |
| `down_backward.py` | dx, dWd, dWr and dP from d[z, logits] |
| `up_backward.py` | dh = α dy Bᵀ and dB = α hᵀ dy |
| `quantize_fp8.py` | X ≈ scale ⊙ float8(X / scale), one scale per row |
| `transpose_copy.py` | padding of the augmented weight [W α·Bᵀ] |
| `multi_copy.py` | packed weights = cast(weights), many tensors per launch |
| `down_tiling.py`, `tiling.py` | tile sizes, what fits into shared memory |

A matrix is passed to a kernel as a pointer and a stride. The stride is the number of elements from one row to the next;
elements of a row are adjacent. So a matrix may be a column slice of a wider one. `*_group_stride` is the number of
elements from the matrix of one projection to that of the next.
"""
