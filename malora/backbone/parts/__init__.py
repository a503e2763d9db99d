"""The parts of a transformer that `optimize_backbone` can make faster, one file each.

Each part has a function `settings`, which returns what the part needs to know of a module, or None if the module is of
another kind; and a function `make_forward`, which returns the new `forward` for a class of modules.
"""
