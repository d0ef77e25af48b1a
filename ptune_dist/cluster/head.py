"""The head node's decisions for all nodes: who has joined, when to start and end, whether to restart.

It runs in a thread of the head node's launcher. To the head, its own node is a node like any other.
"""

import contextlib
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ptune_dist.cluster.link import free_port
from ptune_dist.cluster.node_facts import judge_facts
from ptune_dist.cluster.node_links import NodeLinks
from ptune_dist.cluster.outcome import DONE, RESTARTABLE, STOPPED, STOPPED_EARLY, Outcome
from ptune_dist.cluster.rank_files import to_file_name
from ptune_dist.cluster.record import Record, ReplicaRecord
from ptune_dist.cluster.topology import Topology
from ptune_dist.config.schema import Config
from ptune_dist.errors import RunFault, UserError
from ptune_dist.run.folder import check_run_dir, describe_holder, is_finished

SECONDS_TO_END = 30.0  # for a node to end its ranks
SECONDS_FOR_OTHERS = 60.0  # between the first node that finishes and the last
SECONDS_BEFORE_NOTICE = 15.0  # before we print which nodes we wait for
SECONDS_FOR_LOCK = 180.0  # for dead processes to release the run's lock: a file system may notice only after 90 s
STACK_KINDS = ("stuck", "hang", "frozen", "unreachable")  # failures that stacks can explain


@dataclass(frozen=True)
class Limits:
    """The limits of a job."""

    start_timeout_s: float
    silence_s: float  # a node that has been silent for longer is considered lost
    max_restarts: int


class Head(threading.Thread):
    """Leads all nodes through the attempts of one job, and in the end tells each of them the outcome."""

    def __init__(
        self,
        listener: socket.socket,
        topology: Topology,
        config: Config | None,
        limits: Limits,
        *,
        secret: str,
        is_check: bool,
    ):
        super().__init__(name="head", daemon=True)
        self._nodes = NodeLinks(listener, topology, secret, is_awake=self.is_alive)
        self._topology = topology
        self._config = config
        self._limits = limits
        self._is_check = is_check
        self._run_dir = Path(config.output_dir if config else ".")
        self.record = build_record(topology, config, self._run_dir)

    def run(self) -> None:
        try:
            outcome = self._lead()
        except Exception as error:  # a bug or a failing disk here must not leave the nodes waiting
            outcome = self._describe_failure(error)
            with contextlib.suppress(Exception):
                if not self._is_check:
                    self.record.end(outcome)
            with contextlib.suppress(Exception):
                self._gather_nodes()  # the failure may have preceded them, and each must learn of it
        with contextlib.suppress(Exception):
            self._say(self.record.close(outcome))
        self._nodes.send_all(kind="leave", end=asdict(outcome))
        self._nodes.stop_listening()

    def _say(self, line: str) -> None:
        if line:
            announce(line)

    def _describe_failure(self, error: Exception) -> Outcome:
        if isinstance(error, RunFault):
            return Outcome("fault", str(error))
        return Outcome("error", f"the head's launcher: {type(error).__name__}: {error}")

    def _lead(self) -> Outcome:
        """The job from the first connection to its outcome."""
        if self._config is None:  # our own node's mistake: the others must not wait for us
            unfit = self._find_unfit_node()
            assert unfit is not None, "a node without a config is not fit"
            return unfit
        if not self._is_check:
            reason_to_leave = self._find_reason_to_leave(self._config)
            if reason_to_leave:
                return self._gather_nodes() or reason_to_leave
        for attempt in range(self._limits.max_restarts + 1):
            outcome = self._make_attempt(attempt)
            if not self._may_restart(outcome, attempt):
                return outcome
            announce(f"{outcome.reason}; restart {attempt + 1} of {self._limits.max_restarts} in place")
            self._nodes.outcomes.clear()
            is_free = self._wait_for_lock()
            self._nodes.receive_all()
            if self._nodes.is_stop_requested:
                return self._stop_between_attempts()
            if not is_free:
                return outcome
        raise AssertionError("the last attempt returns")

    def _make_attempt(self, attempt: int) -> Outcome:
        """Start the ranks of all nodes, and follow them to their outcome."""
        if not self._is_check:
            self._say(self.record.begin(in_place=attempt > 0))
        outcome = self._find_unfit_node() if attempt == 0 else None
        if outcome is None:
            self._nodes.outcomes.clear()
            self._nodes.send_all(kind="start", address=self._nodes.head_address, port=free_port())
            outcome = self._follow_attempt()
        if not self._is_check:
            self.record.end(outcome)
        return outcome

    def _stop_between_attempts(self) -> Outcome:
        outcome = Outcome(STOPPED, "asked to stop before the ranks were restarted")
        self.record.end(outcome)
        return outcome

    def _find_reason_to_leave(self, config: Config) -> Outcome | None:
        """The outcome of a job that has nothing to do, or whose run another process trains."""
        try:
            check_run_dir(config)
        except UserError as mistake:
            return Outcome("mistake", str(mistake))
        if not self._wait_for_lock():
            if self._nodes.is_stop_requested:
                return STOPPED_EARLY
            return Outcome("mistake", f"output_dir: {self._run_dir}: {describe_holder(self._run_dir)}")
        if is_finished(config):
            announce(f"{self._run_dir} is finished: nothing to do")
            return Outcome(DONE)
        return None

    def _wait_for_lock(self) -> bool:
        """Wait until nobody trains in the run directory, while answering the nodes; False if someone still does."""
        began = time.monotonic()
        give_up_at = began + SECONDS_FOR_LOCK
        is_told = False
        while self.record.is_held():
            if not is_told and time.monotonic() > began + SECONDS_BEFORE_NOTICE:
                announce(f"waiting: output_dir: {self._run_dir}: {describe_holder(self._run_dir)}")
                is_told = True
            self._nodes.accept_all()
            self._nodes.receive_all()
            if self._nodes.outcomes or self._nodes.is_stop_requested or time.monotonic() > give_up_at:
                return False
            time.sleep(0.05)
        return True

    def _find_unfit_node(self) -> Outcome | None:
        """What is wrong with the nodes before anything is started."""
        missing = self._gather_nodes()
        if missing:
            return missing
        facts, skews_s = self._nodes.facts_by_rank()
        return judge_facts(facts, skews_s, str(self._run_dir))

    def _gather_nodes(self) -> Outcome | None:
        """Wait until every node has joined; returns what is wrong if one does not."""
        timeout_s = self._limits.start_timeout_s
        deadline = time.monotonic() + timeout_s
        notice_at = time.monotonic() + SECONDS_BEFORE_NOTICE
        while self._nodes.missing_names():
            self._nodes.accept_all()
            missing = self._nodes.missing_names()
            if time.monotonic() > deadline:
                text = f"node {', '.join(missing)} did not join within {timeout_s:.0f} s{self._nodes.explain_missing()}"
                return Outcome("unreachable", text, node=missing[0]) if missing else None
            if missing and time.monotonic() > notice_at:
                announce(f"waiting for node {', '.join(missing)}, for up to {timeout_s:.0f} s")
                notice_at = deadline
            self._nodes.receive_all()
            if self._nodes.is_stop_requested:
                return STOPPED_EARLY
            self._nodes.note_closed_links()
            if self._nodes.outcomes:
                return self._nodes.find_cause()
            time.sleep(0.02)
        return None

    def _follow_attempt(self) -> Outcome:
        """Wait until the ranks of every node have ended, or all that can be ended have; returns the cause."""
        end_asked_at: float | None = None
        first_outcome_at: float | None = None
        while True:
            self._nodes.receive_all()
            self._nodes.give_up_silent_links(self._limits.silence_s)
            outcomes = self._nodes.outcomes
            if len(outcomes) == self._topology.num_nodes:
                return self._conclude()
            now = time.monotonic()
            if outcomes and first_outcome_at is None:
                first_outcome_at = now
            if end_asked_at is None and self._must_end(first_outcome_at, now):
                end_asked_at = now
                has_use_for_stacks = any(outcome.kind in STACK_KINDS for outcome in outcomes.values())
                self._nodes.send_all(kind="end", with_stacks=has_use_for_stacks)
            if end_asked_at is not None and now - end_asked_at > SECONDS_TO_END:
                return self._conclude()
            time.sleep(0.05)

    def _must_end(self, first_outcome_at: float | None, now: float) -> bool:
        """Whether the ranks that still run must be ended."""
        outcomes = self._nodes.outcomes.values()
        has_failed = any(outcome.kind not in (DONE, STOPPED) for outcome in outcomes)
        is_late = first_outcome_at is not None and now - first_outcome_at > SECONDS_FOR_OTHERS
        # A node that was stopped before it started its ranks will never start them, and the others wait for those.
        return has_failed or is_late or STOPPED_EARLY in outcomes

    def _conclude(self) -> Outcome:
        """The outcome of the attempt. If one node was stopped before its start, that is a stop of the whole job."""
        cause = self._nodes.find_cause()
        if STOPPED_EARLY in self._nodes.outcomes.values() and cause.kind in RESTARTABLE:
            return STOPPED_EARLY  # the ranks of other nodes have lost those that were ended
        has_stopped = any(outcome.kind == STOPPED for outcome in self._nodes.outcomes.values())
        if cause.kind == "ended" and self._nodes.is_stop_requested and has_stopped:
            return STOPPED_EARLY
        return cause

    def _may_restart(self, outcome: Outcome, attempt: int) -> bool:
        has_restarts_left = attempt < self._limits.max_restarts
        is_wanted = not (self._is_check or self._nodes.is_stop_requested)
        return outcome.kind in RESTARTABLE and has_restarts_left and is_wanted and self._nodes.have_all_ended()


def build_record(topology: Topology, config: Config | None, run_dir: Path) -> Record:
    if config is not None and config.train.nodes == "replicas":
        return ReplicaRecord(run_dir, topology.job_id, to_file_name(topology.node_name))
    return Record(run_dir, topology.job_id)


def announce(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be left to read it
        print(f"launcher: {text}", flush=True)
