"""In place of torchrun and its ranks: one rank that does nothing until it is asked to stop, or the run is to finish.

PTUNE_TEST_FOLDER names a folder in which it shows that it is there (NODE), and finds whether to finish (`finish`).
"""

import os
import time
from pathlib import Path

from ptune_dist.cluster.outcome import DONE, STOPPED, Outcome
from ptune_dist.cluster.rank_files import HeartbeatFile, is_stop_requested, mark_begun, node_folder, write_outcome
from ptune_dist.run.status import end_status


def train() -> Outcome:
    own = node_folder()
    shared = Path(os.environ["PTUNE_TEST_FOLDER"])
    node = os.environ["PTUNE_NODE_NAME"]
    assert own is not None, "the launcher has made it"
    heartbeat = HeartbeatFile(own, 0)
    mark_begun(own, 0)
    print(f"{node} trains among {os.environ.get('PTUNE_EXPECTED_NODES')}", flush=True)
    while not (shared / "finish").exists():
        heartbeat.write(1, 60.0)
        (shared / node).touch()
        if is_stop_requested(own):
            return Outcome(STOPPED, "stopped on request", 0, node)
        time.sleep(0.1)
    end_status(shared / "run", Outcome(DONE))
    return Outcome(DONE, "", 0, node)


folder = node_folder()
assert folder is not None, "the launcher has made it"
write_outcome(folder, train())
