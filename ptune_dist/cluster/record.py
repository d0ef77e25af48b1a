"""What launchers record of a run: in status.json, and of nodes that train as replicas in RUN/launchers/.

Where all nodes are one world, the head's launcher alone writes status.json. Replicas have one launcher each that knows
nothing of the others', which come and go. Each records its own node in RUN/launchers/NODE/status.json. It changes that
of the run only when it is the first to start, or when none is left: in between, the run is what the ranks say it is.
"""

import contextlib
from itertools import count
from pathlib import Path
from typing import Any

from ptune_dist.cluster.outcome import Outcome
from ptune_dist.cluster.rank_files import to_file_name
from ptune_dist.common.files import fault_on_failed_write, make_folder
from ptune_dist.common.locks import Attendance, Lock, try_lock
from ptune_dist.errors import UserError
from ptune_dist.run.folder import is_locked
from ptune_dist.run.ownership import check_own_files
from ptune_dist.run.status import LAUNCHERS, begin_status, end_status, read_status


def read_node_statuses(run_dir: Path) -> list[dict[str, Any]]:
    """The content of status.json of each node that has trained the run as a replica."""
    return [read_status(file.parent) for file in sorted((run_dir / LAUNCHERS).glob("*/status.json"))]


def claim_name(run_dir: Path, node: str) -> tuple[str, Lock | None]:
    """The name of a node that no other launcher of the run has, and its lock: machines may have one host name.

    Where the folder is no run's or cannot be written the name stays: the start of the ranks tells of it.
    """
    with contextlib.suppress(OSError, UserError):
        check_own_files(run_dir)
        make_folder(run_dir / LAUNCHERS)
        for number in count(1):
            name = f"{node}-{number}" if number > 1 else node
            if lock := try_lock(run_dir / LAUNCHERS / f".{to_file_name(name)}.lock"):
                return name, lock
    return node, None


class Record:
    """The record of a run that one launcher decides about."""

    def __init__(self, run_dir: Path, job_id: str):
        self._run_dir = run_dir
        self._job_id = job_id
        self.is_last = True  # once closed: whether no other launcher is left in the run's folder

    def is_held(self) -> bool:
        """Whether another process trains in the run's folder that this job cannot train beside."""
        return is_locked(self._run_dir)

    def begin(self, *, in_place: bool) -> str:
        """Count a start of the ranks; returns a line for the log, "" for most. Raises RunFault."""
        begin_status(self._run_dir, self._job_id, in_place=in_place)
        return ""

    def end(self, outcome: Outcome) -> None:
        """How an attempt has ended."""
        end_status(self._run_dir, outcome)

    def close(self, outcome: Outcome) -> str:
        """How the job has ended: nothing follows; returns a line for the log, "" for most."""
        return ""


class ReplicaRecord(Record):
    """The record of one node of a run that others may train as well."""

    def __init__(self, run_dir: Path, job_id: str, node: str):
        """node: its name as a file's."""
        super().__init__(run_dir, job_id)
        self._node = node
        self._folder = run_dir / LAUNCHERS / node
        self._others: Attendance | None = None

    def is_held(self) -> bool:
        return is_locked(self._run_dir, for_replicas=True)

    def begin(self, *, in_place: bool) -> str:
        begin_status(self._run_dir, self._job_id, in_place=in_place, of_node=self._folder)
        if self._others is not None:
            if self._others.is_alone():
                begin_status(self._run_dir, self._job_id, in_place=in_place)
            return ""
        with fault_on_failed_write(self._folder):
            make_folder(self._folder)
            self._others = Attendance(self._run_dir / LAUNCHERS / ".lock")
            is_first = self._others.enter()
        try:
            if is_first:
                begin_status(self._run_dir, self._job_id, in_place=in_place)
        finally:
            self._others.settle()
        return "" if is_first else f"node {self._node} joins the nodes that train {self._run_dir}"

    def end(self, outcome: Outcome) -> None:
        end_status(self._run_dir, outcome, of_node=self._folder)
        if self._others is not None and self._others.is_alone():
            self._end_run(outcome)

    def close(self, outcome: Outcome) -> str:
        if self._others is None:
            return ""
        self.is_last = self._others.leave()
        if self.is_last:
            self._end_run(outcome)
            return ""
        return f"node {self._node} has left; the other nodes continue"

    def _end_run(self, outcome: Outcome) -> None:
        if read_status(self._run_dir).get("state") != "done":
            end_status(self._run_dir, outcome)
