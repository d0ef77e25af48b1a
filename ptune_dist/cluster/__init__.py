"""What runs once on each node and starts its ranks: `launch/run.sh`, or `python -m ptune_dist.cluster`.

No torch: it starts in a fraction of a second, finds mistakes before torch is imported, and outlives whatever happens to
the ranks. The head node's launcher decides for all nodes (`head.py`); each node's launcher starts torchrun, watches the
ranks and follows the head (`node.py`). torchrun alone would do neither: its nodes learn of each other's faults only
when a collective fails, and it restarts on every exit status, including a user's mistake.
"""
