"""Whole layers in few passes over the data: frozen linear layers, routers and experts of a projection group together.

Imported as far as it can run: `eligibility`, `group` and `availability` need no Triton, all else does.
"""
