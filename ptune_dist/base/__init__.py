"""The frozen base: loading it by parts, int8 and fp8, sharding, what is known about its architecture."""

import os

import torch

# accelerate, which loading needs, imports DeepSpeed, and DeepSpeed picks its accelerator when it is imported: without a
# GPU it must not look for one.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
