"""A short run on a disk with faults, beside the same run on a sound one."""

import json
from pathlib import Path

from ptune_dist.run.checkpoint import list_checkpoints, load_checkpoint
from ptune_dist.run.metrics_log import read_metrics
from tests.commands import Commands, Finished, Forker
from tests.conftest import TINY, write_config
from tests.processes import ROOT, free_port, process_env

NUM_STEPS = 6
SECTIONS = {
    "data": {"validation": str(TINY / "data" / "validation.jsonl")},
    "train": {"max_steps": NUM_STEPS},
    "checkpoint": {"every": 2, "keep": 9},
    "evaluate": {"every": 3, "max_examples": 8, "num_samples": 0},
}
AS_OTHER = str(ROOT / "tests" / "disks" / "as_other.py")


class Disk:
    """Runs commands with variables of their own. `forker` may have preloaded faults."""

    def __init__(self, folder: Path, forker: Forker):
        self._commands = Commands(folder, forker)
        self._forker = forker

    def start(self, *argv: object, module: str = "ptune_dist", **env: object):
        self._commands.number += 1
        path = self._commands.folder / str(self._commands.number)
        variables = {name: str(value) for name, value in env.items()}
        return self._forker.start(module, [str(word) for word in argv], path, process_env(variables))

    def finish(self, started) -> Finished:
        return self._commands.finish(started)

    def run(self, *argv: object, **env: object) -> Finished:
        return self.finish(self.start(*argv, **env))

    def run_without_rights(self, *argv: object, umask: str = "022") -> Finished:
        """As a user to whom the files of other user ids are closed, as they are not to root."""
        return self.finish(self.start(umask, *argv, module=AS_OTHER))

    def run_ranks(self, *argv: object, **env: object) -> list[Finished]:
        """Two ranks of one node."""
        shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        started = [self.start(*argv, RANK=rank, LOCAL_RANK=rank, **shared, **env) for rank in range(2)]
        codes = self._forker.ask(wait_all=[each.pid for each in started])
        return [
            Finished(code, each.out.read_text(), each.err.read_text())
            for code, each in zip(codes, started, strict=True)
        ]


def write_run_config(folder: Path, output_dir: Path | None = None, **sections) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write_config(folder / "c.json", **{"output_dir": str(output_dir or folder / "run"), **SECTIONS, **sections})


def result_of(run: Path) -> tuple[list[tuple[int, float]], bytes]:
    """What a run leaves: its losses and its prompt. Its checkpoints must be whole."""
    for path in list_checkpoints(run / "checkpoints"):
        load_checkpoint(path)
    losses = [(line["step"], line["loss"]) for line in read_metrics(run)]
    return losses, (run / "prompt" / "prompt.safetensors").read_bytes()


def steps_of(run: Path) -> list[int]:
    return [load_checkpoint(path).step for path in list_checkpoints(run / "checkpoints")]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def only_error(finished: Finished, code: int, *parts: str) -> str:
    """The one line of a command that ended badly, which contains all `parts`."""
    assert finished.code == code, finished.err
    lines = [line for line in finished.err.splitlines() if not line.startswith(("ptune-dist ", "warning: "))]
    assert len(lines) == 1 and lines[0].startswith("error: "), finished.err
    missing = [part for part in parts if part not in lines[0]]
    assert not missing, (missing, lines[0])
    return lines[0]


def status_of(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())
