"""Whole layers of a projection group in few passes over the data.

Frozen linear layers, routers and experts of a projection group are computed together.

Imported as far as it can run: `eligibility`, `group` and `availability` need no Triton, all else does.
"""
