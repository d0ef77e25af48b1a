"""Joining the nodes that train a run, unless this node's own folder holds more of the run than they have."""

from collections.abc import Callable
from pathlib import Path

from ptune_dist.errors import RunFault, UserError
from ptune_dist.nodes.agreement import Joined
from ptune_dist.nodes.group import NodeGroup
from ptune_dist.run.checkpoint import load_newest_checkpoint

Enter = Callable[[NodeGroup], Joined]


def enter_first(group: NodeGroup, enter: Enter, run_dir: Path, sync_every: int) -> Joined:
    """Enter as a node that has just been started.

    Raises UserError where the others are at an earlier step than this node's folder, which nobody has changed then. A
    node may be ahead by one exchange: it was lost after it had saved, and before the others had its sums.
    """
    own_step = find_own_step(run_dir)  # before it enters: nodes that share the folder save later ones
    joined = enter(group)
    if joined.step is None or own_step < joined.step + sync_every:
        return joined
    group.leave()
    raise UserError(
        f"output_dir: {run_dir} holds a checkpoint of step {own_step}, and the nodes that train now are at step "
        f"{joined.step - 1}: stop them and start this node first, so that they take its state, or give this node an "
        "empty output_dir"
    )


def find_own_step(run_dir: Path) -> int:
    """The step of the newest undamaged checkpoint, 0 where there is none."""
    try:
        found = load_newest_checkpoint(run_dir / "checkpoints", lambda _: None)
    except RunFault:  # all are damaged
        return 0
    return found.step if found else 0
