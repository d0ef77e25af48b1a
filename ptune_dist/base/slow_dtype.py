"""A line for a CPU without instructions for the type of a base's weights, which then takes several times as long."""

import time

import torch

from ptune_dist.base.open import OpenedBase

LEAST_PARAMETERS = 20_000_000  # a smaller base is fast in any type
LEAST_RATIO = 2.0
NUM_ROWS, WIDTH = 128, 512  # of the product that is timed: a few milliseconds, tens where the type is slow


def describe_slow_dtype(opened: OpenedBase, device: torch.device) -> str:
    """What to say before a large base is computed on a CPU in a type that takes over twice the time of float32."""
    if device.type != "cpu" or opened.dtype == torch.float32 or opened.model.num_parameters() < LEAST_PARAMETERS:
        return ""
    ratio = time_product(opened.dtype) / time_product(torch.float32)
    if ratio < LEAST_RATIO:
        return ""
    name = str(opened.dtype).removeprefix("torch.")
    return (
        f"warning: model.dtype: this CPU multiplies {name} numbers {ratio:.0f} times as slowly as float32: "
        "model.dtype=float32, with a preset that ends in fp32, is faster if the base fits in memory"
    )


def time_product(dtype: torch.dtype) -> float:
    """Seconds of one linear layer on the CPU, the best of three."""
    rows = torch.ones(NUM_ROWS, WIDTH, dtype=dtype)
    weight = torch.ones(WIDTH, WIDTH, dtype=dtype)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        torch.nn.functional.linear(rows, weight)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])  # the first one loads the kernel
