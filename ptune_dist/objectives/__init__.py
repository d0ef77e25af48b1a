"""Objectives: how a loss is made from the outputs at supervised positions.

To add an objective, write its class in a file of its own (`objective.py` is the interface) and name it here.
"""

from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.objectives.mse import MeanSquaredError
from ptune_dist.objectives.objective import Objective

OBJECTIVES: dict[str, type[Objective]] = {
    "cross_entropy": CrossEntropy,
    "mse": MeanSquaredError,
}
