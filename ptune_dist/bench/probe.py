"""Measure a side's own steps and memory, in the same way for every side.

The steady state is the time from the end of the fifth step (or a later one) to the end of the last, including anything
between steps (data, logging). Memory on a CPU is resident memory; its peak is the high-water mark of the kernel, which
`base_loaded` resets.
"""

import json
import time
from pathlib import Path

import torch

NUM_WARM_UP_STEPS = 5


class Probe:
    """One rank's clock and memory gauge."""

    def __init__(self, num_warm_up: int = NUM_WARM_UP_STEPS) -> None:
        self.num_warm_up = num_warm_up
        self._ends: list[tuple[float, float]] = []  # after each step: wall clock, CPU time of this process
        self._base_bytes: int | None = None
        self._peak_before = 0

    def base_loaded(self) -> None:
        """Call when the base is loaded and sharded, before training: the memory held now is the base's."""
        self._peak_before = peak_bytes() or 0
        self._base_bytes = held_bytes() if reset_peak() else None

    def step_done(self) -> None:
        """Call at the end of an optimizer step."""
        synchronize()
        self._ends.append((time.perf_counter(), time.process_time()))

    def window(self) -> tuple[float, float]:
        """Wall-clock and CPU seconds from the end of the last warm-up step to the end of the last step."""
        assert len(self._ends) > self.num_warm_up, f"{len(self._ends)} steps leave nothing after the warm-up"
        began, cpu_began = self._ends[self.num_warm_up - 1]
        ended, cpu_ended = self._ends[-1]
        return ended - began, cpu_ended - cpu_began

    def memory(self) -> dict[str, int]:
        """peak_memory_bytes, and extra_memory_bytes: the peak minus the base. Empty if the system reports neither."""
        peak = peak_bytes()
        if peak is None:
            return {}
        found = {"peak_memory_bytes": max(peak, self._peak_before)}
        if self._base_bytes is not None:
            found["extra_memory_bytes"] = peak - self._base_bytes
        return found


def steady_figures(
    window_s: float, cpu_s: float, step_rows: list[int], step_tokens: list[int], num_warm_up: int = NUM_WARM_UP_STEPS
) -> dict[str, float]:
    """Throughput after the warm-up, from the window's wall-clock seconds and the rows and tokens of every step.

    `cpu_s`, rows and tokens are those of all ranks; padding does not count. CPU seconds per 1,000 tokens mostly exclude
    time spent waiting for another rank or for a core, but include slowdowns from a shared cache or a busy host.
    """
    rows = sum(step_rows[num_warm_up:])
    tokens = sum(step_tokens[num_warm_up:])
    return {
        "samples_per_s": rows / window_s,
        "tokens_per_s": tokens / window_s,
        "cpu_s_per_1000_tokens": 1000 * cpu_s / tokens,
        "step_s": window_s / (len(step_rows) - num_warm_up),
        "rows_timed": rows,
        "tokens_timed": tokens,
    }


def write_result(path: str, content: dict) -> None:
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def held_bytes() -> int | None:
    """Memory held now: allocated on the GPU, or resident if there is no GPU. None if the system does not report it."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else status_bytes("VmRSS")


def peak_bytes() -> int | None:
    """Peak memory since the start or the last reset."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else status_bytes("VmHWM")


def reset_peak() -> bool:
    """Reset the peak to the memory held now; False if the system does not support that."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return False
    return True


def status_bytes(name: str) -> int | None:
    """The value of a line of /proc/self/status in bytes, or None."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
