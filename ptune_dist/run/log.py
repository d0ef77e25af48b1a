"""What a run shows and writes while it goes: console progress, train.log, metrics.jsonl, TensorBoard.

Floor 1. Rank 0 alone has a `MetricsWriter`; the others have none of it.
"""

import contextlib
import json
import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ptune_dist.common.files import fault_on_failed_write, replace_file
from ptune_dist.errors import RunFault

SECONDS_BETWEEN_LINES = 5.0
NUM_WARM_UP_STEPS = 5  # left out of throughput


class MetricsWriter:
    """Writes one run's progress. Use as a context manager."""

    def __init__(self, run_dir: Path, *, max_steps: int, first_step: int, members: dict[str, Path] | None = None):
        """`first_step` is the step that this process does first: what an earlier process wrote beyond it is dropped.

        `members`: the folders of a sweep's members.
        """
        from torch.utils.tensorboard import SummaryWriter  # 1 s to import, needed on rank 0 only

        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir, self.failure = run_dir, None
        self._jsonl = open_lines(run_dir, first_step)
        self._members = {name: open_lines(folder, first_step) for name, folder in (members or {}).items()}
        self._log: TextIO = open(run_dir / "train.log", "a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)
        self._max_steps, self._done, self._began = max_steps, first_step - 1, time.monotonic()
        self._first_step, self._last_line = first_step, 0.0
        self._progress = build_progress() if sys.stdout.isatty() else None
        self._task = None

    def __enter__(self) -> "MetricsWriter":
        self._excepthook, threading.excepthook = threading.excepthook, self._on_thread_error
        if self._progress:
            self._progress.start()
            self._task = self._progress.add_task("train", total=self._max_steps, completed=self._done, facts="")
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._progress:
            self._progress.stop()
        if error is not None:
            self._line(f"error: {error!r}", console=False)
        for stream in (self._jsonl, *self._members.values(), self._log, self._tensorboard):
            with self._remember_failure():
                stream.close()
        threading.excepthook = self._excepthook

    def _on_thread_error(self, error: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread, which would print a full disk's traceback; its next call says it again."""
        if not isinstance(error.exc_value, OSError):
            self._excepthook(error)

    @contextlib.contextmanager
    def _remember_failure(self) -> Iterator[None]:
        """A full disk must not end rank 0 alone: the loop sees `failure` and all ranks end together."""
        try:
            with fault_on_failed_write(self._run_dir):
                yield
        except RunFault as fault:
            self.failure = self.failure or fault

    def step(self, line: dict[str, float], members: dict[str, dict[str, float]]) -> None:
        """One optimizer step: a line of metrics.jsonl and of each member's, TensorBoard scalars, progress."""
        with self._remember_failure():
            for name, own in members.items():
                self._members[name].write(json.dumps(own) + "\n")
                self._members[name].flush()
                for key in ("loss", "learning_rate", "grad_norm"):
                    self._tensorboard.add_scalar(f"members/{name}/{key}", own[key], own["step"])
            self._step(line)

    def _step(self, line: dict[str, float]) -> None:
        self._jsonl.write(json.dumps(line) + "\n")
        self._jsonl.flush()
        self._done = int(line["step"])
        for key, value in line.items():
            if key != "step":
                self._tensorboard.add_scalar(f"train/{key}", value, self._done)
        facts = f"loss {line['loss']:.4f}  {line['tokens_per_s']:,.0f} tokens/s"
        if self._progress:
            self._progress.update(self._task, completed=self._done, facts=facts)
        now = time.monotonic()
        if self._done in (self._first_step, self._max_steps) or now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._line(
                f"step {self._done}/{self._max_steps}  {facts}  lr {line['learning_rate']:.3g}  ETA {self._eta()}",
                console=self._progress is None,
            )

    def evaluation(
        self, step: int, metrics: dict[str, float], samples: list[dict[str, str]], member: str | None = None
    ) -> None:
        """Validation metrics and generated answers, of a sweep's `member`."""
        values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.say(f"step {step}  validation  {values}" + (f"  {member}" if member else ""))
        tag = f"members/{member}/validation" if member else "validation"
        with self._remember_failure():
            for name, value in metrics.items():
                self._tensorboard.add_scalar(f"{tag}/{name}", value, step)
            if samples:
                self._tensorboard.add_text(f"{tag}/samples", render_samples(samples), step)
            self._tensorboard.flush()

    def ranks(self, step: int, ranks: list[dict[str, Any]]) -> None:
        """What each rank held and gathered, for TensorBoard."""
        with self._remember_failure():
            for rank in ranks:
                for name, value in rank.items():
                    values = value if isinstance(value, dict) else {"": value}
                    for kind, number in values.items():
                        tag = f"rank_{rank['rank']}/{name}" + (f"_{kind}" if kind else "")
                        self._tensorboard.add_scalar(tag, number, step)
            self._tensorboard.flush()

    def say(self, text: str) -> None:
        """A line for the console and the log."""
        self._line(text, console=True)

    def _line(self, text: str, *, console: bool) -> None:
        with self._remember_failure():
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
            self._log.flush()
        if console:
            with contextlib.suppress(BrokenPipeError):  # whoever read it is gone: the log has it
                self._progress.console.print(text, highlight=False, markup=False) if self._progress else print(text)

    def _eta(self) -> str:
        done = self._done - self._first_step + 1
        left = (time.monotonic() - self._began) / done * (self._max_steps - self._done)
        minutes, seconds = divmod(round(left), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class StepCount(NamedTuple):
    seconds: float
    num_samples: int
    num_tokens: int
    num_gathers: int = 0  # of weights, by this rank
    gathered_bytes: int = 0  # that this rank received
    gathered_bytes_between_nodes: int = 0


class Throughput:
    """Samples and tokens per second in the steady state: this process's first steps are left out."""

    def __init__(self) -> None:
        self._steps: list[StepCount] = []
        self._lap_began = time.monotonic()

    def count(self, step: StepCount) -> None:
        self._steps.append(step)

    def lap(self) -> float:
        """Seconds since the last call, or since this process's run began."""
        began, self._lap_began = self._lap_began, time.monotonic()
        return self._lap_began - began

    @property
    def last(self) -> StepCount:
        return self._steps[-1]

    @property
    def samples_per_s(self) -> float:
        return self._per_second("num_samples")

    @property
    def tokens_per_s(self) -> float:
        return self._per_second("num_tokens")

    def per_step(self, what: str) -> float:
        """Mean of a field of StepCount."""
        steady = self._steady()
        return sum(getattr(step, what) for step in steady) / len(steady) if steady else 0.0

    def _per_second(self, what: str) -> float:
        return self.per_step(what) / self.per_step("seconds") if self._steps else 0.0

    def _steady(self) -> list[StepCount]:
        return self._steps[NUM_WARM_UP_STEPS:] or self._steps


def build_progress() -> Progress:
    """The bar of a terminal: steps, loss, tokens/s, elapsed, ETA."""
    return Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(), TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=Console(),
    )  # fmt: skip


def open_lines(folder: Path, first_step: int) -> TextIO:
    """A folder's metrics.jsonl, to go on with at `first_step`."""
    folder.mkdir(parents=True, exist_ok=True)
    drop_lines_from_step(folder / "metrics.jsonl", first_step)
    return open(folder / "metrics.jsonl", "a", encoding="utf-8")


def drop_lines_from_step(path: Path, step: int) -> None:
    """Drop the lines of `step` and later, which a resumed run writes again, and a half-written last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line + "\n")
        except ValueError:
            continue
    with fault_on_failed_write(path):
        replace_file(path, "".join(kept).encode())


def render_samples(samples: list[dict[str, str]]) -> str:
    """Markdown table of answers for TensorBoard."""
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in sample.values()] for sample in samples]
    header = list(samples[0])
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def show_samples(samples: list[dict[str, str]]) -> None:
    """Table of answers for the console; line breaks are shown as \\n, long cells are folded."""
    if not samples:
        return
    table = Table(*samples[0])
    for sample in samples:
        table.add_row(*(Text(cell.replace("\n", "\\n")) for cell in sample.values()))
    Console().print(table)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: allocated on its GPU, or resident without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_memory_by_kind(device: torch.device) -> dict[str, int]:
    """Bytes: what a GPU's allocator handed out and what it reserved for that; without one, what was resident."""
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
    return {"resident": peak_memory_bytes(device)}


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
