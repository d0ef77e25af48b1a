"""The entry point of `launch/gpu_check.sh`."""

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from ptune_dist.bench.check.folder import FAILED, CheckFolder, part_status
from ptune_dist.bench.check.page import write_page
from ptune_dist.bench.check.plan import Part, Values, load_parts, select_parts
from ptune_dist.bench.check.runner import Runner
from ptune_dist.cluster.devices import count_listed_gpus
from ptune_dist.errors import RunFault, UserError

DONE_STATUS = 0
FAILED_STATUS = 1
MISTAKE_STATUS = 2
LEFT_STATUS = 75  # as for a run: the same command continues
INTERRUPTED_STATUS = 130


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 all chosen parts are done, 1 one has failed, 75 some are left, 2 a mistake, 130."""
    began = time.monotonic()
    try:
        return check(parse(arguments), began)
    except (UserError, RunFault) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE_STATUS


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch/gpu_check.sh", description="The first hour on a GPU, in parts.")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for this call (8)")
    parser.add_argument("--parts", metavar="LIST", help="names separated by commas (all)")
    parser.add_argument("--out", type=Path, help="folder of the figures (docs/benchmarks/NAME-OF-GPU)")
    parser.add_argument("--scratch", type=Path, default=Path("runs/gpu_check"), help="folder for data and runs")
    parser.add_argument("--repeats", type=int, default=1, help="runs of every side of a benchmark (1)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replace a value of the plan")
    parser.add_argument("--again", action="store_true", help="repeat the chosen parts that are done or have failed")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes; the default without a GPU")
    parser.add_argument("--list", action="store_true", help="show the parts and what is known about them")
    parser.add_argument("--plan", type=Path, default=Path("configs/bench/gpu_check.yaml"), help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.minutes <= 0 or parsed.repeats < 1:
        parser.error("--minutes and --repeats must be positive")
    return parsed


def check(parsed: argparse.Namespace, began: float) -> int:
    """Run the parts and write the page. Raises UserError and RunFault."""
    scratch = parsed.scratch.absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    machine = read_machine(scratch)
    gpus = machine["hardware"]["gpus"]
    console = Console()
    is_tiny = parsed.tiny or not gpus
    if not gpus and not parsed.tiny:
        check_no_gpu(machine["versions"]["torch"])
        say(console, "there is no GPU: tiny shapes, whose figures mean nothing")
    every = load_parts(parsed.plan, is_tiny=is_tiny, changes=parse_values(parsed.set), num_repeats=parsed.repeats)
    parts = select_parts(every, parsed.parts)
    folder = CheckFolder((parsed.out or default_folder(gpus, is_tiny, scratch)).absolute())
    if parsed.list:
        list_parts(parts, folder, console)
        return DONE_STATUS
    if parsed.again:
        for part in parts:
            folder.forget(part)
    runner = Runner(folder, scratch, began + 60 * parsed.minutes, len(gpus), machine, console)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: with a valid folder, no processes
    is_interrupted = False
    try:
        runner.run(parts)
    except KeyboardInterrupt:
        is_interrupted = True
    write_page(every, folder, machine, is_tiny=is_tiny)
    say(console, f"figures: {folder.path / 'README.md'}")
    if is_interrupted:
        return INTERRUPTED_STATUS
    if runner.left:
        say(console, f"left for the next call: {', '.join(runner.left)}")
        return LEFT_STATUS
    has_failed = any(part_status(part, folder.records(part)) == FAILED for part in parts)
    return FAILED_STATUS if has_failed else DONE_STATUS


def read_machine(scratch: Path) -> dict[str, Any]:
    """Hardware, versions and commit, asked in a process of its own, so that this one holds no GPU. Raises RunFault."""
    result = scratch / "machine.json"
    command = [sys.executable, "-m", "ptune_dist.bench.machine", "--result", str(result)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunFault(f"cannot ask torch for the GPUs: {last}")
    return json.loads(result.read_text(encoding="utf-8")) | {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def check_no_gpu(torch_version: str) -> None:
    """Raise RunFault if this machine has GPUs that torch does not see."""
    count = count_listed_gpus()
    if count:
        raise RunFault(
            f"nvidia-smi lists {count} GPUs, but torch {torch_version} sees none: its build does not fit the driver, "
            "or CUDA_VISIBLE_DEVICES hides them; --tiny tries the parts without a GPU"
        )


def default_folder(gpus: list[str], is_tiny: bool, scratch: Path) -> Path:
    """docs/benchmarks/h100_80gb_hbm3_x1, for example. Figures of tiny shapes are for no document."""
    if is_tiny:
        return scratch / "tiny"
    words = re.sub(r"[^a-z0-9]+", "_", gpus[0].lower()).strip("_").removeprefix("nvidia_")
    return Path("docs/benchmarks") / f"{words}_x{len(gpus)}"


def parse_values(words: list[str]) -> Values:
    """`key=value` words. Raises UserError."""
    found: Values = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--set {word}: expected KEY=VALUE")
        found[key] = value
    return found


def list_parts(parts: list[Part], folder: CheckFolder, console: Console) -> None:
    for part in parts:
        status = part_status(part, folder.records(part)) or "not begun"
        minutes = sum(step.minutes for step in part.steps)
        say(console, f"{part.name:12} about {minutes:4.1f} min  {status:10} {part.about}")


def say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
