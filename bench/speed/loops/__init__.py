"""Speed of whole training programs, as users write them: `python -m bench.speed --loop plain`."""
