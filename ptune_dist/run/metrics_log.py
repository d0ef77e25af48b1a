"""The log of a run while it trains: console progress, train.log, metrics.jsonl and TensorBoard.

Only rank 0 has a `MetricsWriter`.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ptune_dist.common.files import fault_on_failed_write, replace_file
from ptune_dist.common.progress_line import render_duration
from ptune_dist.errors import RunFault
from ptune_dist.run.eta import Eta
from ptune_dist.run.folder import check_in_place
from ptune_dist.run.trackers import Trackers

SECONDS_BETWEEN_LINES = 5.0
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"  # a line for each evaluation; one that was repeated has two

Listener = Callable[[int, dict[str, float]], None]  # gets a step and its numbers by TensorBoard's names


class MetricsWriter:
    """Writes the progress of one run. Use as a context manager."""

    def __init__(
        self,
        run_dir: Path,
        *,
        max_steps: int,
        first_step: int,
        members: dict[str, Path] | None = None,
        evaluate_every: int = 0,
        log_every: int | None = None,
        report_to: Sequence[str] = (),
        settings: dict[str, dict[str, Any]] | None = None,
    ):
        """`first_step` is the first step of this process; lines that an earlier process wrote for it and later steps
        are dropped. `members` are the folders of a sweep's members, each of which is a run of its own in TensorBoard.
        `settings` are TensorBoard's hyperparameters of each member, or of the only prompt, which is named "".
        """
        from torch.utils.tensorboard import SummaryWriter  # takes 1 s to import, and only rank 0 needs it

        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self.failure: RunFault | None = None
        self.listener: Listener | None = None
        self._excepthook = threading.excepthook
        threading.excepthook = self._on_thread_error
        own = {"": run_dir, **(members or {})}
        self._jsonl = open_lines(run_dir / METRICS, first_step)
        self._members = {name: open_lines(own[name] / METRICS, first_step) for name in members or {}}
        self._evaluations = {name: open_lines(folder / EVALUATIONS, first_step) for name, folder in own.items()}
        self._log: TextIO = open(run_dir / "train.log", "a", encoding="utf-8")
        boards = {name: run_dir / "tensorboard" / name for name in ("", *self._members)}
        self._boards = {name: SummaryWriter(str(path), purge_step=first_step) for name, path in boards.items()}
        self._tensorboard = self._boards[""]
        for name, values in (settings or {}).items():
            write_settings(self._boards[name], values)
        self._trackers = Trackers(list(report_to), run_dir, shared_settings(list((settings or {}).values())))
        self._max_steps = max_steps
        self._first_step = first_step
        self._log_every = log_every
        self._done = first_step - 1
        self.eta = Eta(max_steps, evaluate_every)
        self._last_line = 0.0  # when a line of a step was last written
        self._bar = StepBar(max_steps, done=self._done) if sys.stdout.isatty() else None

    def __enter__(self) -> "MetricsWriter":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._bar:
            self._bar.stop()
        if error is not None:
            self._line(f"error: {error!r}", console=False)
        self._trackers.close()
        streams = (self._jsonl, *self._members.values(), *self._evaluations.values(), self._log, *self._boards.values())
        for stream in streams:
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
            self.failure = self.failure or self._find_cause(fault)

    def _find_cause(self, fault: RunFault) -> RunFault:
        try:
            check_in_place(self._run_dir)
        except RunFault as cause:
            return cause
        return fault

    def step(self, line: dict[str, Any], members: dict[str, dict[str, float]]) -> None:
        """Write one optimizer step: a line of metrics.jsonl and of each member's, TensorBoard scalars, progress."""
        self._done = int(line["step"])
        if not self._is_logged(self._done) and "nodes" not in line:  # each change of nodes is logged
            self._show_bar(line)
            return
        with self._remember_failure():
            for name, own in members.items():
                self._members[name].write(json.dumps(own) + "\n")
                self._members[name].flush()
                for key in ("loss", "learning_rate", "grad_norm"):
                    self._boards[name].add_scalar(f"train/{key}", own[key], own["step"])
            self._step(line)

    def _is_logged(self, step: int) -> bool:
        """Whether a step has lines; a resumed run writes those that it would have written anyway."""
        every = self._log_every or 1
        return step % every == 0 or step in (1, self._max_steps)

    def _show_bar(self, line: dict[str, float]) -> None:
        if self._bar:
            self._bar.update(self._done, self._describe(line), self._eta())

    def _describe(self, line: dict[str, float]) -> str:
        mean = "mean " if self._members else ""
        return f"{mean}loss {line['loss']:.4f}  {line['tokens_per_s']:,.0f} tokens/s"

    def _step(self, line: dict[str, Any]) -> None:
        self._jsonl.write(json.dumps(line) + "\n")
        self._jsonl.flush()
        line = {key: value for key, value in line.items() if isinstance(value, (int, float))}
        for key, value in line.items():
            if key != "step" and not is_idle(key, value):
                self._tensorboard.add_scalar(f"train/{key}", value, self._done)
        self._track({f"train/{key}": value for key, value in line.items() if key != "step"}, self._done)
        self._show_bar(line)
        now = time.monotonic()
        is_end = self._done in (self._first_step, self._max_steps)
        if self._log_every or is_end or now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            check_in_place(self._run_dir)
            rate = f"{'mean ' if self._members else ''}lr {line['learning_rate']:.3g}"
            text = f"step {self._done}/{self._max_steps}  {self._describe(line)}  {rate}  ETA {self._eta()}"
            self._line(text, console=self._bar is None)

    def evaluation(
        self, step: int, metrics: dict[str, float], samples: list[dict[str, str]], member: str | None = None
    ) -> None:
        """Write validation metrics and generated answers, of `member` if the run is a sweep."""
        values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.say(f"step {step}  validation  {values}" + (f"  {member}" if member else ""))
        board = self._boards[member or ""]
        lines = self._evaluations[member or ""]
        with self._remember_failure():
            lines.write(json.dumps({"step": step, **metrics}) + "\n")
            lines.flush()
            for name, value in metrics.items():
                board.add_scalar(f"validation/{name}", value, step)
            of_member = f"/{member}" if member else ""
            self._track({f"validation/{name}{of_member}": value for name, value in metrics.items()}, step)
            if samples:
                board.add_text("validation/samples", render_samples(samples), step)
            board.flush()

    def _track(self, values: dict[str, float], step: int) -> None:
        self._trackers.log(values, step)
        if self.listener is not None:
            self.listener(step, values)

    def without_prompt(self, metrics: dict[str, float]) -> None:
        """Write the validation metrics of the base alone."""
        values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.say(f"base without prompt  validation  {values}")
        with self._remember_failure():
            for name, value in metrics.items():
                self._tensorboard.add_scalar(f"base_without_prompt/{name}", value, 0)
            self._track({f"base_without_prompt/{name}": value for name, value in metrics.items()}, 0)

    def ranks(self, step: int, ranks: list[dict[str, Any]]) -> None:
        """Write what each rank held and gathered to TensorBoard."""
        with self._remember_failure():
            for rank in ranks:
                for name, value in rank.items():
                    if name == "rank":
                        continue
                    values = value if isinstance(value, dict) else {"": value}
                    for kind, number in values.items():
                        tag = f"rank_{rank['rank']}/{name}" + (f"_{kind}" if kind else "")
                        if not is_idle(name, number):
                            self._tensorboard.add_scalar(tag, number, step)
            self._tensorboard.flush()

    def say(self, text: str) -> None:
        """Write a line to the console and to train.log."""
        self._line(text, console=True)

    def note(self, text: str) -> None:
        """Write a line to train.log alone."""
        self._line(text, console=False)

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
        return render_duration(self.eta.left_s(self._done))


class StepBar:
    """The progress bar on a terminal: steps, loss, tokens/s, elapsed time, ETA."""

    def __init__(self, max_steps: int, done: int):
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=Console(),
        )
        self._task = self._progress.add_task("train", total=max_steps, completed=done, facts="", eta="")

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def update(self, done: int, facts: str, eta: str) -> None:
        self._progress.update(self._task, completed=done, facts=facts, eta=f"ETA {eta}")

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, highlight=False, markup=False)


def shared_settings(of_members: list[dict[str, Any]]) -> dict[str, Any]:
    """What all members have alike: trackers get one run."""
    first, *others = of_members or [{}]
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def open_lines(file: Path, first_step: int) -> TextIO:
    """A file of JSON lines, opened to append those of `first_step` and later."""
    file.parent.mkdir(parents=True, exist_ok=True)
    drop_lines_from_step(file, first_step)
    return open(file, "a", encoding="utf-8")


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
    return [json.loads(line) for line in (run_dir / METRICS).read_text(encoding="utf-8").splitlines()]


def render_samples(samples: list[dict[str, str]]) -> str:
    """A Markdown table of answers, for TensorBoard."""
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in sample.values()] for sample in samples]
    header = list(samples[0])
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def is_idle(key: str, value: float) -> bool:
    """Whether a chart would be empty: nothing is gathered, on one rank for instance."""
    return not value and key.startswith(("num_gathers", "gathered_bytes", "gathers_per_step"))


def write_settings(board: Any, settings: dict[str, Any]) -> None:
    """TensorBoard's hyperparameters of one of its runs; `board` is a SummaryWriter.

    `SummaryWriter.add_hparams` would put them into a run of their own.
    """
    from torch.utils.tensorboard.summary import hparams

    for summary in hparams(settings, {"validation/loss": None}):
        board.file_writer.add_summary(summary)
