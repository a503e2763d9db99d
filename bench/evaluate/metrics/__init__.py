"""Metrics of written answers, each a module of Hugging Face `evaluate`.

`evaluate.load("bench/evaluate/metrics/NAME")` loads one by its path, without a network. The benchmark calls the plain
function that each module has. A module imports nothing of this repository when it is loaded, because `evaluate` runs a
copy of its file.
"""
