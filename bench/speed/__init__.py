"""Speed benchmark: time, memory and kernel launches of a step.

Run it with `python -m bench.speed`.
"""
