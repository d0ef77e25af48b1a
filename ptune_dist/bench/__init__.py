"""Benchmarks: `ptune-dist bench MATRIX` runs this trainer and its peers in turn and reports speed, memory and loss.

`harness` runs a matrix of command lines, `matrix` reads it, `machine` says where it ran; `ours` and `peft_trainer` are
the two sides and measure themselves with the one `probe`; `data` makes rows and a tokenizer that need no download;
`report` copies figures from a result into a document. A later benchmark adds a matrix, and a side where it needs one.
"""
