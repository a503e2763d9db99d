"""Speed benchmark: time, memory and kernel launches of a step; run it with `python -m bench.speed`."""
