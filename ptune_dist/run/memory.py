"""The peak memory of this process."""

import resource

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: allocated on its GPU, or resident if the device is a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_memory_by_kind(device: torch.device) -> dict[str, int]:
    """Peak bytes: those allocated and those reserved by the allocator of a GPU, or those resident on a CPU."""
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
    return {"resident": peak_memory_bytes(device)}
