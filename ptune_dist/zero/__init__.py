"""The DeepSpeed seam: the base under ZeRO. Nothing else in the package imports deepspeed."""

# DeepSpeed picks its accelerator when it is imported; `base` says which before anything imports it.
from ptune_dist import base  # noqa: F401
