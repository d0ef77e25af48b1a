"""Run the steps of a check within a time limit, each as a process of its own with its output in a log."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from ptune_dist.bench.check.folder import CUT, DONE, FAILED, CheckFolder, StepRecord, part_status, write_json
from ptune_dist.bench.check.plan import Part, Step
from ptune_dist.bench.harness import last_lines
from ptune_dist.cluster.processes import is_dead

SECONDS_FOR_REPORT = 15.0
SECONDS_TO_END = 5.0  # for a step's processes after SIGTERM
PATIENCE = 4.0  # a step fails after this many times its expected minutes
MIN_PATIENCE_S = 240.0


@dataclass
class Ending:
    """How a process has ended: `status` of StepRecord."""

    status: str
    reason: str = ""


@dataclass
class Runner:
    """Runs parts. `ends` is a time of time.monotonic."""

    folder: CheckFolder
    scratch: Path
    ends: float
    num_gpus: int
    machine: dict[str, Any]
    console: Console = field(default_factory=Console)
    min_step_s: float = 10.0  # less time than this is not worth starting anything
    has_run: bool = False
    left: list[str] = field(default_factory=list)  # parts with something for the next call

    def remaining_s(self) -> float:
        return self.ends - SECONDS_FOR_REPORT - time.monotonic()

    def run(self, parts: list[Part]) -> None:
        """Run every step that is neither done nor failed, if the time is enough for it. Raises UserError.

        Steps that an earlier call has cut come last: otherwise they could keep the others from running at all.
        """
        known = {part.name: self.folder.records(part) for part in parts}
        for part in parts:
            if part_status(part, known[part.name]) in (DONE, FAILED):
                self.say(part, describe_ended(known[part.name]))
        for is_cut in (False, True):
            for part in parts:
                for step in part.steps:
                    record = known[part.name].get(step.name)
                    if is_cut == (record is not None) and (record is None or record.status == CUT):
                        self.run_if_it_fits(part, step, record)

    def run_if_it_fits(self, part: Part, step: Step, known: StepRecord | None) -> None:
        """Run a step or say that it is left; `known` is how an earlier call has cut it."""
        if part.name in self.left:
            return
        needed_s = 60 * step.minutes
        if known is not None:
            needed_s = max(needed_s, 1.2 * known.seconds)
        remaining_s = self.remaining_s()
        is_first = not self.has_run  # it may have all the time there is
        if remaining_s < self.min_step_s or (remaining_s < needed_s and not is_first):
            self.left.append(part.name)
            waiting = f"{step.name} needs about {needed_s / 60:.1f} min, {max(0, remaining_s) / 60:.1f} left"
            self.say(part, f"{waiting}: left for the next call")
            return
        record = self.run_step(part, step, known)
        self.folder.add(part, record)
        self.say(part, describe_step(record))
        if record.status == CUT:
            self.left.append(part.name)

    def run_step(self, part: Part, step: Step, known: StepRecord | None) -> StepRecord:
        """Raises UserError for a mistake in a command, KeyboardInterrupt after the step is recorded as cut."""
        self.has_run = True
        work = self.scratch / "work" / f"{part.name}-{step.name}-{os.getpid()}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        result = work / "result.json"
        write_json(work / "before.json", known.result if known else {})
        built_in = self.built_in(work, result)
        began = time.monotonic()
        log = self.folder.log_of(part, step.name)
        try:
            ending = self.prepare(part, built_in)
            if ending.status == DONE:
                ending = self.execute(step.words(built_in), log, patience_s(step))
        except KeyboardInterrupt:
            self.folder.add(part, self.record(step, Ending(CUT, "interrupted"), began, read_result(result)))
            raise
        found = read_result(result)
        if ending.status == DONE and not found:
            ending = Ending(FAILED, f"it left no result: {last_lines(log)}")
        return self.record(step, ending, began, found)

    def record(self, step: Step, ending: Ending, began: float, result: dict[str, Any]) -> StepRecord:
        seconds = round(time.monotonic() - began, 3)
        return StepRecord(step.name, ending.status, seconds, ending.reason, result, self.machine)

    def built_in(self, work: Path, result: Path) -> dict[str, object]:
        return {
            "python": sys.executable,
            "result": result,
            "work": work,
            "shared": self.scratch,
            "before": work / "before.json",
            "gpus": max(1, self.num_gpus),
            "out": shlex.quote(str(self.folder.path)),
        }

    def prepare(self, part: Part, built_in: dict[str, object]) -> Ending:
        """Run a part's preparations that this scratch folder has not seen."""
        known = self.scratch / "prepared.txt"
        seen = known.read_text(encoding="utf-8").splitlines() if known.exists() else []
        for number, step in enumerate(part.prepare):
            words = step.words(built_in)
            line = shlex.join(words)
            if line in seen:
                continue
            ending = self.execute(words, self.folder.log_of(part, f"prepare-{number}"), patience_s(step))
            if ending.status != DONE:
                return Ending(ending.status, f"{line}: {ending.reason}")
            with open(known, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        return Ending(DONE)

    def execute(self, words: list[str], log: Path, limit_s: float) -> Ending:
        """Run a command until it ends, or until its limit or this call's time is over."""
        remaining_s = self.remaining_s()
        with open(log, "wb") as stream:
            try:
                process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                return Ending(FAILED, f"cannot run {words[0]}: {error.strerror}")
            try:
                status = process.wait(timeout=max(0.0, min(limit_s, remaining_s)))
            except subprocess.TimeoutExpired:
                end_tree(process)
                if remaining_s <= limit_s:
                    return Ending(CUT, "the time of this call was over")
                return Ending(FAILED, f"not finished after {limit_s:.0f} s: {last_lines(log)}")
            except BaseException:  # an interrupt must not leave processes behind
                end_tree(process)
                raise
        return Ending(DONE) if status == 0 else Ending(FAILED, f"exit status {status}: {last_lines(log)}")

    def say(self, part: Part, text: str) -> None:
        self.console.print(f"{part.name}: {text}", highlight=False, markup=False, soft_wrap=True)


def descendants(process: psutil.Process) -> Iterator[psutil.Process]:
    """Every process below one. torchrun and launch/run.sh give their ranks sessions of their own."""
    try:
        yield from process.children(recursive=True)
    except psutil.NoSuchProcess:
        return


def end_tree(process: subprocess.Popen) -> None:
    """End a process and all below it: SIGTERM, and SIGKILL after some seconds."""
    top = psutil.Process(process.pid)
    below = list(descendants(top))
    process.terminate()
    try:
        process.wait(timeout=SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        below += descendants(top)
        process.kill()
        process.wait()
    for left in below:
        try:
            left.kill()
        except psutil.NoSuchProcess:
            continue
    give_up_at = time.monotonic() + SECONDS_TO_END
    while not all(is_dead(left.pid) for left in below) and time.monotonic() < give_up_at:
        time.sleep(0.02)


def read_result(path: Path) -> dict[str, Any]:
    """A step's result, empty if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def describe_step(record: StepRecord) -> str:
    reason = f": {record.reason}" if record.reason else ""
    return f"{record.name} {record.status} in {record.seconds:.0f} s{reason}"


def patience_s(step: Step) -> float:
    """After so long a step has failed."""
    return max(MIN_PATIENCE_S, PATIENCE * 60 * step.minutes)


def describe_ended(records: dict[str, StepRecord]) -> str:
    """Why a part is not run again."""
    failed = [name for name, record in records.items() if record.status == FAILED]
    if failed:
        return f"failed before ({', '.join(failed)}); --again repeats it"
    return "done before"
