"""Score a model with lm-eval, generate and grade answers, and analyze trained adapters."""
