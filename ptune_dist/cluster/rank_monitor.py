"""How the ranks of one node are doing, judged from outside: from their files, their stacks and /proc."""

import time
from dataclasses import replace
from pathlib import Path

from ptune_dist.cluster.outcome import DONE, STOPPED, Outcome, find_cause
from ptune_dist.cluster.processes import is_dead, process_state
from ptune_dist.cluster.rank_files import Heartbeat, read_heartbeats, read_outcomes, stack_file
from ptune_dist.cluster.stacks import find_busy_place

ABORTED = ": Fatal Python error: Aborted"
SECONDS_FOR_OUTCOMES = 3.0  # after the first failure, for other ranks to report theirs


class RankMonitor:
    """Finds the ranks of one node that are dead, frozen, hung or failed."""

    def __init__(self, folder: Path, node: str, num_procs: int, start_timeout_s: float, *, on_gpu: bool):
        self.num_procs = num_procs
        self._on_gpu = on_gpu
        self.resumed_at = 0.0  # when the launcher itself continued after it was suspended
        self._folder = folder
        self._node = node
        self._start_timeout_s = start_timeout_s
        self._started_at = time.monotonic()
        self._failed_at = 0.0
        self._frozen: Outcome | None = None

    def outcomes(self) -> list[Outcome]:
        """Those that ranks have recorded, the earliest first."""
        return list(read_outcomes(self._folder).values())

    def find_problem(self) -> Outcome | None:
        """What is wrong with a rank of this node, if anything."""
        found = self._frozen or self._find_dead() or self._find_hung() or self._find_failed()
        if found and found.kind == "lost":
            return self.summarize()  # another rank's outcome may explain it
        return found

    def summarize(self) -> Outcome:
        """What this node knows when its ranks must be ended because of a failure on another node."""
        found = [outcome for outcome in (self._find_dead(), self._find_frozen(), *self.outcomes()) if outcome]
        failures = [outcome for outcome in found if outcome.kind not in (DONE, STOPPED)]
        return self.with_node(find_cause(failures) if failures else Outcome("ended"))

    def with_node(self, outcome: Outcome) -> Outcome:
        """The outcome with this node's name, unless it names a node already."""
        return replace(outcome, node=outcome.node or self._node)

    def remember_frozen(self) -> None:
        """Look for a frozen rank now: to write its stacks it must be resumed, after which nothing shows that it was."""
        self._frozen = self._find_frozen()

    def find_stuck(self) -> Outcome | None:
        """The rank that the others wait for, judged by its stacks: the heartbeats of all ranks have stopped."""
        for beat in sorted(read_heartbeats(self._folder), key=lambda beat: beat.at):
            path = stack_file(self._folder, beat.rank)
            place = find_busy_place(path.read_text(errors="replace"), on_gpu=self._on_gpu) if path.exists() else ""
            if place:
                text = f"{self._describe_silence(beat, time.monotonic())}, in {place}"
                return Outcome("stuck", text, beat.rank, self._node)
        return None

    def _find_dead(self) -> Outcome | None:
        """Ranks that died without recording an outcome."""
        outcomes = read_outcomes(self._folder)
        dead = [beat for beat in read_heartbeats(self._folder) if beat.rank not in outcomes and is_dead(beat.pid)]
        outcomes = read_outcomes(self._folder)  # again: an outcome may have been recorded between the two checks
        dead = [beat for beat in dead if beat.rank not in outcomes]
        if not dead:
            return None
        dead.sort(key=lambda beat: self._describe_death(beat.rank).endswith(ABORTED))
        ranks = ", ".join(str(beat.rank) for beat in dead)
        cause = self._describe_death(dead[0].rank)
        text = f"rank {ranks} on node {self._node} was killed after step {dead[0].step}{cause}"
        kind = "lost" if cause.endswith(ABORTED) else "killed"  # NCCL aborts a rank that has lost another
        return Outcome(kind, text, dead[0].rank, self._node)

    def _describe_death(self, rank: int) -> str:
        """Such as ": Fatal Python error: Segmentation fault", if the fault handler recorded one."""
        path = stack_file(self._folder, rank)
        first_line = path.read_text(errors="replace").partition("\n")[0] if path.exists() else ""
        return f": {first_line}" if first_line.startswith("Fatal") else " (kill -9, or out of memory)"

    def _find_frozen(self) -> Outcome | None:
        """A rank that is suspended, or was until its stacks were requested."""
        if self._frozen:
            return self._frozen
        for beat in read_heartbeats(self._folder):
            if process_state(beat.pid) in ("T", "t"):
                where = f"rank {beat.rank} on node {self._node}"
                text = f"{where} is stopped (SIGSTOP or a debugger) after step {beat.step}"
                return Outcome("frozen", text, beat.rank, self._node)
        return None

    def _find_hung(self) -> Outcome | None:
        """The rank whose heartbeat is overdue; of several, the one that has been silent longest."""
        now = time.monotonic()
        beats = read_heartbeats(self._folder)
        if len(beats) < self.num_procs and now - self._started_at > self._start_timeout_s:
            text = f"a rank on node {self._node} did not start within {self._start_timeout_s:.0f} s"
            return Outcome("hang", text, node=self._node)
        late = [beat for beat in beats if now > self._deadline(beat)]
        outcomes = read_outcomes(self._folder)
        late = [beat for beat in late if beat.rank not in outcomes]
        if not late:
            return None
        worst = min(late, key=lambda beat: beat.at)
        return self._find_frozen() or Outcome("hang", self._describe_silence(worst, now), worst.rank, self._node)

    def _deadline(self, beat: Heartbeat) -> float:
        """When the next heartbeat is due. Where the launcher was suspended, the rank may have been as well."""
        return max(beat.deadline, self.resumed_at + beat.deadline - beat.at)

    def _describe_silence(self, beat: Heartbeat, now: float) -> str:
        return (
            f"rank {beat.rank} on node {self._node} has made no progress for {now - beat.at:.0f} s, "
            f"after step {beat.step}"
        )

    def _find_failed(self) -> Outcome | None:
        """A rank that has failed while others wait for it, once the others have had time to report what they know."""
        failures = [outcome for outcome in self.outcomes() if outcome.kind not in (DONE, STOPPED)]
        if not failures:
            return None
        self._failed_at = self._failed_at or time.monotonic()
        return find_cause(failures) if time.monotonic() - self._failed_at > SECONDS_FOR_OUTCOMES else None
