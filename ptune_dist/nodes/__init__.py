"""Nodes as replicas: each node trains in a world of its own, and the nodes exchange sums of gradients.

Nothing here loads torch. `group.py` is what the training loop uses.
"""
