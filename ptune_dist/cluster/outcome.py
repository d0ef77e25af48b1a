"""How a rank, a node or a job ends, and which of several outcomes caused the others.

No torch: launchers and ranks share it.
"""

from dataclasses import dataclass

DONE = "done"
STOPPED = "stopped"
# Among several outcomes, the kind that is listed first explains the others.
KINDS = (
    "mistake",  # the user's, or an unfit node: nothing was started
    "fault",  # a known fault that would recur (loss is not a number, disk full)
    "killed",  # ended without reporting an outcome
    "frozen",  # stopped by a signal or a debugger
    "unreachable",  # a node that no longer answers
    "error",  # an exception
    "stuck",  # no progress, in something other than waiting for other ranks
    "hang",  # no progress
    "lost",  # lost the connection to another rank
    "ended",  # ended by the launcher because of a failure elsewhere
    STOPPED,  # on request, after saving
    DONE,
)
RESTARTABLE = ("killed", "frozen", "error", "stuck", "hang", "lost", "ended")
EXIT_STATUSES = {DONE: 0, STOPPED: 75, "mistake": 2}  # every other kind is 1


@dataclass(frozen=True)
class Outcome:
    """How a rank, a node or a job ended; `rank` and `node` name the one to blame, if there is one."""

    kind: str
    reason: str = ""
    rank: int | None = None
    node: str = ""

    @property
    def exit_status(self) -> int:
        return EXIT_STATUSES.get(self.kind, 1)


STOPPED_EARLY = Outcome(STOPPED, "asked to stop before the first step")


def find_cause(outcomes: list[Outcome]) -> Outcome:
    """The outcome that explains the others; among equals, the earliest."""
    return min(outcomes, key=lambda outcome: KINDS.index(outcome.kind))
