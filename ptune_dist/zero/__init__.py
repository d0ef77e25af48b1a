"""The DeepSpeed seam: the base under ZeRO. Nothing else in the package imports deepspeed."""
