"""Benchmarks: `ptune-dist bench MATRIX` runs this trainer and its peers in turn and reports speed, memory and loss.

`matrix` reads a matrix of command lines, `harness` runs it, and `machine` describes the machine. `ours` and
`peft_trainer` are the two sides, which measure themselves with the same `probe`. `data` makes rows and a tokenizer
without a download. `check` is what launch/gpu_check.sh runs: all that a GPU should run first. `report` copies figures
from a result into a document. To add a benchmark, add a matrix and, if necessary, a side.
"""
