"""Where the time of a profiled step goes: read a Chrome trace of torch.profiler and group what it shows.

On a GPU these are the kernels and copies of the device, with the time in which it had nothing to do. Without one they
are the operators of the CPU, each without those that it calls. Times are in microseconds in a trace, in milliseconds
here.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

Event = dict[str, Any]

# group -> what its kernels or operators are called; the first match counts
GROUPS = [
    ("between GPUs", r"nccl|all_?gather|reduce_?scatter|all_?reduce|c10d"),
    ("attention", r"flash|fmha|flex|attention|sdpa"),
    ("cross entropy", r"softmax|nll_loss|cross_entropy"),
    ("products", r"gemm|nvjet|cutlass|cublas|xmma|wgmma|matmul|scaled_mm|int_mm|triton_tem|\bmm\b|addmm|bmm|linear"),
    ("norms", r"norm|rsqrt"),
    ("copies", r"memcpy|memset|copy|cat(array|$)|_to_copy|fill|zero_|contiguous"),
    ("indexing", r"index|gather|scatter|embedding"),
    ("elementwise", r"elementwise|triton_(poi|per|red)|vectorized|reduce|aten::|foreach|adam"),
]
OTHER = "other"
IDLE = "idle"
PATTERNS = [(name, re.compile(pattern, re.IGNORECASE)) for name, pattern in GROUPS]
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
RUNTIME = ("cuda_runtime", "cuda_driver")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
HOST_READS = ("aten::_local_scalar_dense",)
NUM_LONGEST = 25


def group_of(name: str) -> str:
    return next((group for group, pattern in PATTERNS if pattern.search(name)), OTHER)


def read_trace(events: Iterable[Event], num_steps: int, num_layers: int) -> dict[str, Any]:
    """Per step: milliseconds by group, the longest kernels, launches, and moments when the host waits for the device.

    `device` is "gpu" or "cpu". Launches are counted for each layer too. On a GPU the times of kernels on several
    streams may add up to more than the step.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    kernels = [event for event in complete if event.get("cat") in ON_DEVICE]
    calls = [event for event in complete if event.get("cat") in RUNTIME]
    operators = [event for event in complete if event.get("cat") == "cpu_op"]
    if kernels:
        times = [(event["name"], event["dur"]) for event in kernels]
        idle = span(kernels) - busy(kernels)
    else:
        times = own_times(operators)
        idle = 0.0
    launches = sum("LaunchKernel" in event["name"] for event in calls)
    names = Counter(event["name"] for event in [*calls, *operators])
    return {
        "device": "gpu" if kernels else "cpu",
        "groups_ms": groups_ms(times, idle, num_steps),
        "longest": longest(times, num_steps),
        "step_ms": span(kernels or operators) / num_steps / 1000,
        "launches_per_step": launches / num_steps,
        "launches_per_layer": launches / num_steps / num_layers,
        "host_waits_per_step": sum(names[name] for name in WAITS) / num_steps,
        "host_reads_per_step": sum(names[name] for name in HOST_READS) / num_steps,
        "waits": {name: names[name] / num_steps for name in (*WAITS, *HOST_READS) if names[name]},
    }


def groups_ms(times: list[tuple[str, float]], idle: float, num_steps: int) -> dict[str, float]:
    """Group -> milliseconds a step, the longest first, idle time last."""
    total: Counter[str] = Counter()
    for name, duration in times:
        total[group_of(name)] += duration  # pyright: ignore[reportArgumentType]  # a Counter may hold floats
    found = {group: duration / num_steps / 1000 for group, duration in total.most_common()}
    return found | {IDLE: idle / num_steps / 1000}


def longest(times: list[tuple[str, float]], num_steps: int) -> list[dict[str, Any]]:
    """The kernels with the most time in total: name, group, milliseconds and calls a step."""
    total: dict[str, float] = {}
    for name, duration in times:
        total[name] = total.get(name, 0.0) + duration
    calls = Counter(name for name, _ in times)
    chosen = sorted(total, key=lambda name: -total[name])[:NUM_LONGEST]
    return [
        {
            "name": name[:160],
            "group": group_of(name),
            "ms": total[name] / num_steps / 1000,
            "calls": calls[name] / num_steps,
        }
        for name in chosen
    ]


def span(events: list[Event]) -> float:
    """From the start of the first event to the end of the last."""
    if not events:
        return 0.0
    return max(event["ts"] + event["dur"] for event in events) - min(event["ts"] for event in events)


def busy(events: list[Event]) -> float:
    """The time in which at least one event runs."""
    total = 0.0
    reached = float("-inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        ends = event["ts"] + event["dur"]
        total += max(0.0, ends - max(reached, event["ts"]))
        reached = max(reached, ends)
    return total


def own_times(operators: list[Event]) -> list[tuple[str, float]]:
    """Name and duration of each operator, without the operators that it calls on the same thread."""
    found: list[tuple[str, float]] = []
    open_ones: dict[Any, list[tuple[float, int]]] = {}  # thread -> (end, index in found) of what is running
    for event in sorted(operators, key=lambda event: (event["ts"], -event["dur"])):
        stack = open_ones.setdefault((event.get("pid"), event.get("tid")), [])
        while stack and stack[-1][0] <= event["ts"]:
            stack.pop()
        if stack:
            name, duration = found[stack[-1][1]]
            found[stack[-1][1]] = (name, duration - event["dur"])
        stack.append((event["ts"] + event["dur"], len(found)))
        found.append((event["name"], event["dur"]))
    return found
