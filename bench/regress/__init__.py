"""Find what a change has moved: a short run, import time, layer time, suite time and speed, against committed ones."""
