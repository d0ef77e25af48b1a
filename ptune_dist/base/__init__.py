"""The frozen base: loading it by parts, int8, sharding, what is known about its architecture. Floor 2."""

# DeepSpeed picks its accelerator when it is first imported, and accelerate imports it: ours must be picked before.
from ptune_dist.distributed import world  # noqa: F401
