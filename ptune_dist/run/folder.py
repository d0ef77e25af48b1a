"""A run is one output directory: what is in it, whether it is finished, whether a config may resume it."""

import errno
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptune_dist.common import locks
from ptune_dist.common.files import (
    OTHERS,
    explain,
    fault_on_failed_write,
    make_folder,
    replace_file,
    try_again,
)
from ptune_dist.config.load import Resolve, load_config, render_config
from ptune_dist.config.schema import Config
from ptune_dist.config.sweep import member_config
from ptune_dist.errors import RunFault, UserError
from ptune_dist.run.ownership import CHECKPOINT, MARK, check_own_files

# What may change when a run is resumed: its length, how it is watched and distributed, but not what is learned.
MAY_CHANGE = (
    "output_dir",
    "evaluate",
    "checkpoint",
    "model.check",
    "deepspeed",
    "train.max_steps",
    "train.epochs",
    "train.log_every",
    "train.average_last",
    "train.report_to",
    "train.micro_batch_tokens",
    "train.resume",
    "train.hang_timeout_s",
    "train.nodes",
    "train.min_nodes",
    "train.max_nodes",
    "train.num_blocks",
    "train.stall_timeout_s",
    "train.context_cache_gib",
    "train.context_cache_gpu_gib",
    "train.context_cache_dir",
    "data.cache_dir",
    "data.cache_gib",
)
# None until the method or the base has decided, in the ranks: the launcher compares configs before that.
LEFT_TO_FILE = ("prompt.num_frozen", "prompt.lower_layers")  # None: as the prompt in `prompt.init_file` has it
LEFT_OPEN = ("prompt.init", "data.max_length", "train.learning_rate", "train.warmup_steps", *LEFT_TO_FILE)
LATE_S = 60.0  # in which a client of a network disk asks the server again: NFS keeps what it knows for so long
WAIT_S = 0.2
ALWAYS_THERE = ("config.yaml", "metrics.jsonl")
PARTS = ("", "checkpoints", "prompt", "tensorboard")  # folders of a run that are written into as it trains
# Errors that are the user's to repair; others, of a full disk say, are faults.
MISTAKES = {
    *OTHERS,
    *(errno.EROFS, errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
}


def read_run_config(run_dir: Path, overrides: Sequence[str] = (), *, resolve: Resolve | None = None) -> Config:
    """The config of a run, with overrides; `resolve` as for `load_config`. Raises UserError."""
    file = run_dir / "config.yaml"
    try:
        is_run = wait_to_see(file)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise UserError(f"{run_dir}: {error.strerror}") from None
    if not is_run:
        if not run_dir.exists():
            raise UserError(f"{run_dir}: there is no such folder: give the output_dir of a run")
        if run_dir.is_file():
            raise UserError(f"{run_dir}: a file: give the folder of a run, the output_dir of its config")
        raise UserError(f"{run_dir}: not a run: it has no config.yaml")
    return load_config(file, list(overrides), resolve=resolve)


def wait_to_see(file: Path) -> bool:
    """Whether a file is there. Ranks other than the first wait for it: another node may see it later than the first."""
    give_up_at = time.monotonic() + LATE_S
    while not file.is_file():
        if os.environ.get("RANK", "0") == "0" or time.monotonic() > give_up_at:
            return False
        time.sleep(WAIT_S)
    return True


def find_member_dir(run_dir: Path, member: str | None) -> Path:
    """The directory of a sweep's member, by default the best one's; the run's own without a sweep. Raises UserError."""
    config = read_run_config(run_dir)
    if not config.sweep:
        if member:
            raise UserError(f"--member: {run_dir} is not a sweep: omit it")
        return run_dir
    name = member if member is not None else find_best_member(run_dir)
    return run_dir / "members" / Path(member_config(config, name).output_dir).name


def find_best_member(run_dir: Path) -> str:
    """The best-ranked member of a finished sweep, whose name is printed. Raises UserError."""
    summary = read_summary(run_dir)
    if summary is None:
        raise UserError(f"{run_dir}: an unfinished sweep has no best member: name one with --member")
    try:
        member = str(summary["ranking"][0]["member"])
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{run_dir}/summary.json is not the summary of a sweep: name a member with --member") from None
    print(f"member: {member}", file=sys.stderr)
    return member


def check_run_dir(config: Config) -> None:
    """Raise UserError if the directory cannot be written, or holds what this config may not replace."""
    run_dir = Path(config.output_dir)
    file = run_dir / "config.yaml"
    try:
        existing = next(folder for folder in (run_dir, *run_dir.absolute().parents) if os.path.lexists(folder))
        if not existing.is_dir():
            raise FileExistsError(errno.EEXIST, f"{existing} is a file", str(existing))
        if not os.access(existing, os.W_OK | os.X_OK) and not is_finished(config):
            number = errno.EROFS if os.statvfs(existing).f_flag & os.ST_RDONLY else errno.EACCES
            reason = explain(OSError(number, os.strerror(number)), existing)
            raise UserError(f"output_dir: {run_dir}: cannot write in {existing}: {reason}")
        if os.environ.get("RANK", "0") == "0":  # others may see the files of a run later than the first
            check_own_files(run_dir)
        if not file.exists() or not has_begun(run_dir):
            return
    except OSError as error:
        raise UserError(f"output_dir: {run_dir}: {explain(error)}") from None
    if config.train.resume == "never" and not (config.train.nodes == "replicas" and is_trained_by_replicas(run_dir)):
        raise UserError(f"output_dir: {run_dir} holds a run and train.resume is never: choose another output_dir")
    before = load_config(file)
    key = first_difference(before.model_dump(), config.model_dump())
    if key:
        old = read_key(before.model_dump(), key)
        new = read_key(config.model_dump(), key)
        raise UserError(f"{file}: this run was started with {key} {old!r}, not {new!r}: choose another output_dir")


def has_begun(run_dir: Path) -> bool:
    """Whether the directory has anything that depends on its config: a checkpoint, a prompt or a summary."""
    return any((run_dir / name).exists() for name in ("checkpoints", "prompt", "summary.json"))


def lock_run_dir(config: Config) -> locks.Lock:
    """Create the run's directory, and lock it until the returned lock is closed. For one rank. Raises UserError.

    Nodes that train as replicas hold the lock together.
    """
    run_dir = Path(config.output_dir)
    lock = None
    take = locks.try_shared_lock if config.train.nodes == "replicas" else locks.try_lock
    try:
        make_folder(run_dir)
        lock = take(run_dir / ".lock", lambda line: print(f"warning: output_dir: {line}", flush=True))
        if lock is not None:
            probe_parts(run_dir)
    except OSError as error:
        if lock is not None:
            lock.close()
        kind = UserError if error.errno in MISTAKES else RunFault
        place = error.filename or run_dir
        raise kind(f"output_dir: {run_dir}: cannot write {place}: {explain(error, place)}") from None
    if lock is None:
        raise UserError(f"output_dir: {run_dir}: {describe_holder(run_dir)}")
    lock.sign()
    return lock


def describe_holder(run_dir: Path) -> str:
    """Who trains in a folder that is locked, and what to do: a job on two hosts may have been started as two jobs."""
    holder = locks.find_holder(run_dir / ".lock")
    where = f", process {holder[1]} on host {holder[0]}" if holder else ""
    text = f"another process is training here{where}: wait for it or end it"
    here = socket.gethostname()
    if holder and holder[0] != here:
        text += (
            f"; if {holder[0]} and {here} are nodes of one job, set PTUNE_NUM_NODES, PTUNE_NODE_RANK and "
            "PTUNE_HEAD_ADDRESS on each"
        )
    return text


def probe_parts(run_dir: Path) -> None:
    """Make and remove a file in each folder of a run, so that hours later no checkpoint fails. Raises OSError."""
    for name in PARTS:
        folder = run_dir / name
        if not os.path.lexists(folder):
            continue
        probe = folder / f".probe-{secrets.token_hex(8)}"
        try:
            probe.touch(exist_ok=False)
            probe.unlink()
        except OSError as error:
            error.filename = str(folder)
            raise


def check_in_place(run_dir: Path) -> None:
    """Raise RunFault where the folder of a run has been removed or renamed while it trains, lest a new one is begun."""
    with fault_on_failed_write(run_dir):
        if not any((run_dir / name).exists() for name in ALWAYS_THERE):
            raise RunFault(
                f"{run_dir} was removed or renamed while a run was writing to it: put it back, or start again"
            )


def is_locked(run_dir: Path, *, for_replicas: bool = False) -> bool:
    """Whether a process is training in the directory; for replicas, one that is not a replica."""
    is_held = locks.is_locked_alone if for_replicas else locks.is_locked
    return is_held(run_dir / ".lock")


def is_trained_by_replicas(run_dir: Path) -> bool:
    """Whether nodes that another one may join train in the directory."""
    return is_locked(run_dir) and not is_locked(run_dir, for_replicas=True)


def write_run_configs(config: Config, members: dict[str, Config]) -> None:
    """Write the resolved config, and each member's into its own directory. For one rank. Raises RunFault."""
    configs = [config]
    if config.sweep:
        configs += members.values()
    for own in configs:
        file = Path(own.output_dir) / "config.yaml"
        with fault_on_failed_write(file):
            make_folder(file.parent)
            replace_file(file, (MARK + render_config(own)).encode())


def first_difference(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str | None:
    """The first dotted key whose values differ although it may not change."""
    for name in now:
        key = prefix + name
        if key == "sweep" and json.dumps(before.get(name)) != json.dumps(now[name]):
            return key  # as a whole: its own keys are dotted, and their order determines the members' names
        if key in MAY_CHANGE or before.get(name) == now[name]:
            continue
        if key in LEFT_OPEN and now[name] is None:
            continue
        if key in LEFT_TO_FILE and before.get(name) is None:  # loading the prompt compares it
            continue
        if name not in before:  # an option that the method did not have when the run began
            continue
        if isinstance(now[name], dict) and isinstance(before.get(name), dict):
            found = first_difference(before[name], now[name], f"{key}.")
            if found:
                return found
        else:
            return key
    return None


def read_key(content: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        content = content[part]
    return content


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """The summary of a finished run, else None: also where the file is damaged, so that the run writes it again."""
    try:
        found = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def tells_the_end(found: dict[str, Any]) -> bool:
    """Whether a summary holds what tells that a run is finished."""
    if not all(isinstance(found.get(key), int) for key in ("steps", "evaluations_since_best")):
        return False
    ranking = found.get("ranking", [{"ended": None}])
    return isinstance(ranking, list) and all(isinstance(line, dict) and "ended" in line for line in ranking)


def is_finished(config: Config) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do, else None."""
    summary = read_summary(Path(config.output_dir))
    if not summary or not tells_the_end(summary):
        return None
    is_stopped_early = 0 < config.evaluate.patience <= summary["evaluations_since_best"]
    if "ranking" in summary:
        is_stopped_early = all(line["ended"] for line in summary["ranking"])
    return summary if is_stopped_early or summary["steps"] >= config.train.max_steps else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Raises UserError where they cannot be seen, lest the run starts over."""
    try:
        names = try_again(lambda: os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{folder}: {explain(error, folder)}: its checkpoints cannot be seen") from None
    return sorted(folder / name for name in names if CHECKPOINT.fullmatch(name))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Raises RunFault if the file cannot be written."""
    with fault_on_failed_write(path):
        replace_file(path, (json.dumps(content, indent=2) + "\n").encode())
