"""Peak memory is that of this process."""

import torch

from ptune_dist.run.memory import peak_memory_bytes


def test_peak_memory_is_this_processes_in_bytes():
    before = peak_memory_bytes(torch.device("cpu"))
    torch.ones(40_000_000, dtype=torch.uint8).add_(1)
    assert 50e6 < before <= peak_memory_bytes(torch.device("cpu")) < 100e9
