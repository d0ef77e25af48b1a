"""What runs once on each node and starts its ranks: `launch/run.sh`, or `python -m ptune_dist.launcher`.

Floor 6. No torch: it starts in a fraction of a second, finds mistakes before torch is imported, and outlives whatever
happens to the ranks. The head node's launcher decides for all (`head.py`); each node's starts torchrun, watches the
ranks and does as the head says (`node.py`). torchrun alone would do neither: its nodes learn of each other's faults
only where a collective fails, and it takes every exit status, a user's mistake too, for a reason to restart.
"""
