"""The log of a run while it trains: console progress, train.log, metrics.jsonl and TensorBoard.

Only rank 0 has a `MetricsWriter`.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ptune_dist.common.files import fault_on_failed_write, replace_file
from ptune_dist.errors import RunFault

SECONDS_BETWEEN_LINES = 5.0


class MetricsWriter:
    """Writes the progress of one run. Use as a context manager."""

    def __init__(self, run_dir: Path, *, max_steps: int, first_step: int, members: dict[str, Path] | None = None):
        """`first_step` is the first step of this process; lines that an earlier process wrote for it and later steps
        are dropped. `members` are the folders of a sweep's members.
        """
        from torch.utils.tensorboard import SummaryWriter  # takes 1 s to import, and only rank 0 needs it

        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self.failure: RunFault | None = None
        self._jsonl = open_metrics(run_dir, first_step)
        self._members = {name: open_metrics(folder, first_step) for name, folder in (members or {}).items()}
        self._log: TextIO = open(run_dir / "train.log", "a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)
        self._max_steps = max_steps
        self._first_step = first_step
        self._done = first_step - 1
        self._began = time.monotonic()
        self._last_line = 0.0  # when a line of a step was last written
        self._bar = StepBar(max_steps, done=self._done) if sys.stdout.isatty() else None

    def __enter__(self) -> "MetricsWriter":
        self._excepthook = threading.excepthook
        threading.excepthook = self._on_thread_error
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._bar:
            self._bar.stop()
        if error is not None:
            self._line(f"error: {error!r}", console=False)
        for stream in (self._jsonl, *self._members.values(), self._log, self._tensorboard):
            with self._remember_failure():
                stream.close()
        threading.excepthook = self._excepthook

    def _on_thread_error(self, error: threading.ExceptHookArgs) -> None:
        """Silence an OSError in TensorBoard's thread (a full disk): the next call to TensorBoard raises it again."""
        if not isinstance(error.exc_value, OSError):
            self._excepthook(error)

    @contextlib.contextmanager
    def _remember_failure(self) -> Iterator[None]:
        """Store a failed write in `failure`, because rank 0 must not end alone: the loop ends all ranks together."""
        try:
            with fault_on_failed_write(self._run_dir):
                yield
        except RunFault as fault:
            self.failure = self.failure or fault

    def step(self, line: dict[str, float], members: dict[str, dict[str, float]]) -> None:
        """Write one optimizer step: a line of metrics.jsonl and of each member's, TensorBoard scalars, progress."""
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
        if self._bar:
            self._bar.update(self._done, facts)
        now = time.monotonic()
        if self._done in (self._first_step, self._max_steps) or now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._line(
                f"step {self._done}/{self._max_steps}  {facts}  lr {line['learning_rate']:.3g}  ETA {self._eta()}",
                console=self._bar is None,
            )

    def evaluation(
        self, step: int, metrics: dict[str, float], samples: list[dict[str, str]], member: str | None = None
    ) -> None:
        """Write validation metrics and generated answers, of `member` if the run is a sweep."""
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
        """Write what each rank held and gathered to TensorBoard."""
        with self._remember_failure():
            for rank in ranks:
                for name, value in rank.items():
                    values = value if isinstance(value, dict) else {"": value}
                    for kind, number in values.items():
                        tag = f"rank_{rank['rank']}/{name}" + (f"_{kind}" if kind else "")
                        self._tensorboard.add_scalar(tag, number, step)
            self._tensorboard.flush()

    def say(self, text: str) -> None:
        """Write a line to the console and to train.log."""
        self._line(text, console=True)

    def _line(self, text: str, *, console: bool) -> None:
        with self._remember_failure():
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
            self._log.flush()
        if not console:
            return
        with contextlib.suppress(BrokenPipeError):  # the reader of the console is gone; train.log has the line
            if self._bar:
                self._bar.print(text)
            else:
                print(text)

    def _eta(self) -> str:
        done = self._done - self._first_step + 1
        left = (time.monotonic() - self._began) / done * (self._max_steps - self._done)
        minutes, seconds = divmod(round(left), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class StepBar:
    """The progress bar on a terminal: steps, loss, tokens/s, elapsed time, ETA."""

    def __init__(self, max_steps: int, done: int):
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(),
        )
        self._task = self._progress.add_task("train", total=max_steps, completed=done, facts="")

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def update(self, done: int, facts: str) -> None:
        self._progress.update(self._task, completed=done, facts=facts)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, highlight=False, markup=False)


def open_metrics(folder: Path, first_step: int) -> TextIO:
    """A folder's metrics.jsonl, opened to append the lines of `first_step` and later."""
    folder.mkdir(parents=True, exist_ok=True)
    drop_lines_from_step(folder / "metrics.jsonl", first_step)
    return open(folder / "metrics.jsonl", "a", encoding="utf-8")


def drop_lines_from_step(path: Path, step: int) -> None:
    """Drop the lines of `step` and later, which a resumed run writes again, and an incomplete last line."""
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


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def render_samples(samples: list[dict[str, str]]) -> str:
    """A Markdown table of answers, for TensorBoard."""
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in sample.values()] for sample in samples]
    header = list(samples[0])
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def show_samples(samples: list[dict[str, str]]) -> None:
    """Print a table of answers; line breaks are shown as \\n, long cells are folded."""
    if not samples:
        return
    table = Table(*samples[0])
    for sample in samples:
        table.add_row(*(Text(cell.replace("\n", "\\n")) for cell in sample.values()))
    Console().print(table)
