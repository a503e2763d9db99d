"""Teachers with a dial: does a shared down projection pay, if we know how alike the tasks are?

A task is a low-rank change ΔW*_t = B*_t A*_t of one frozen linear layer. Two dials set the principal cosines between
the tasks' down projections and between their up projections. Students are the adapters of `malora.METHODS`, trained on
noisy outputs of the teachers. The protocol is section 5 of docs/notes/protocol-2026-12-01.md (level 1).

Suffixes of names are shapes:

| symbol | meaning |
| --- | --- |
| n, m | inputs and outputs of the layer |
| r | rank of a teacher's change |
| T | tasks |
| N | samples per task |
| K | members: students that train together, each with weights of its own |
| S | seeds, that is different data |
| B | samples in a batch |
"""
