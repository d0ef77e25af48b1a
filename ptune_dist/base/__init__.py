"""The frozen base: loading all or part of it, int8, recomputation, and facts about its architecture."""

# DeepSpeed selects its accelerator when it is first imported, which accelerate does: ours must be set before that.
from ptune_dist.distributed import world  # noqa: F401
