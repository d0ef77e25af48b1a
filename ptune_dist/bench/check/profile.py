"""Profile some steps of a run: which kernels they spend their time in, and how often the host waits for the device.

    python -m ptune_dist.bench.check.profile CONFIG [key.path=value ...] --trace FILE.json.gz --result FILE

The run is that of `train`. The first steps are not profiled: they compile.
"""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ptune_dist import loop
from ptune_dist.base.layers import layers_of
from ptune_dist.bench.arguments import side_parser
from ptune_dist.bench.check.kernels import read_trace
from ptune_dist.bench.probe import synchronize, write_result
from ptune_dist.config.load import load_config
from ptune_dist.errors import RunFault, UserError
from ptune_dist.loop import Training

NUM_WARM_UP = 5
NUM_PROFILED = 5


class StepProfiler:
    """Wraps the loop's `take_step`. `num_layers` and `tokens` are known once the steps are done."""

    def __init__(self, take_step: Callable[[Training], bool]):
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities)
        self.num_layers = 0
        self._take_step = take_step
        self._done = 0

    def __call__(self, training: Training) -> bool:
        if self._done == NUM_WARM_UP:
            synchronize()
            self.profiler.start()
        is_taken = self._take_step(training)
        self._done += 1
        if self._done == NUM_WARM_UP + NUM_PROFILED:
            synchronize()
            self.profiler.stop()
            self.num_layers = len(layers_of(training.job.engine.model.base))
        return is_taken


def read_profile(profiler: StepProfiler, trace: Path) -> dict:
    """Write the trace and group what it shows. Raises RunFault if something is missing."""
    if not profiler.num_layers:
        raise RunFault(f"the run ended before step {NUM_WARM_UP + NUM_PROFILED}: set train.max_steps")
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.profiler.export_chrome_trace(str(trace))
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        content = json.load(file)
    found = read_trace(content["traceEvents"], NUM_PROFILED, profiler.num_layers)
    if torch.cuda.is_available() and found["device"] != "gpu":
        raise RunFault("the profiler has recorded no kernel of the GPU: its user may not read the counters (CUPTI)")
    return found


def main() -> int:
    parser = side_parser(__doc__)
    parser.add_argument("--trace", type=Path, required=True, help="where to put the trace, a .json.gz file")
    args = parser.parse_intermixed_args()
    profiler = StepProfiler(loop.take_step)
    loop.take_step = profiler
    try:
        status = loop.train(load_config(args.config, args.overrides))
        if status == 0:
            write_result(args.result, read_profile(profiler, args.trace))
    except (UserError, RunFault) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.distributed.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
