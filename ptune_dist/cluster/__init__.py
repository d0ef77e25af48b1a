"""The launcher, which runs once on each node and starts its ranks: `launch/run.sh`, `python -m ptune_dist.cluster`.

It does not load torch: it starts in a fraction of a second, finds mistakes before torch is imported, and survives
whatever happens to the ranks. The head node's launcher decides for all nodes (`head.py`). Each node's launcher starts
torchrun, watches the ranks and follows the head (`node.py`). torchrun alone would do neither: its nodes notice each
other's failures only when a collective fails, and it restarts on every exit status, including a user's mistake.
"""
