"""Base models, the cache of those that are made here, and adapters on them."""
