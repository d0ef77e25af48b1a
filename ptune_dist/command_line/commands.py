"""What each command of `ptune-dist` does with its parsed arguments.

torch is imported only by the commands that compute, after the config has been read, so a mistake shows at once.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ptune_dist import __version__
from ptune_dist.cluster.rank_files import node_folder
from ptune_dist.common.imports import without_garbage_collection
from ptune_dist.errors import UserError

if TYPE_CHECKING:
    from ptune_dist.config.schema import Config

ALL_MEMBERS = "all"  # the value of `generate --member` that stands for every member of a sweep
DEFAULT_SHOTS = 4


def say_start(command: str, what: str | Path, stream: TextIO | None = None) -> None:
    """One line within the first second, from rank 0: importing torch takes several. On stdout where left out."""
    if os.environ.get("RANK", "0") == "0":
        print(f"ptune-dist {__version__}: {command} {what}, importing torch ...", file=stream, flush=True)


def run_init(parsed: argparse.Namespace) -> None:
    from ptune_dist.config.shipped import write_first_config

    print(f"config: {write_first_config(parsed.task, parsed.out)}")


def run_launcher_files(parsed: argparse.Namespace) -> None:
    from ptune_dist.config.shipped import write_launcher_files

    for file in write_launcher_files(parsed.folder):
        print(file)


def run_train(parsed: argparse.Namespace) -> int:
    from ptune_dist.config.load import load_config
    from ptune_dist.run.watch import report_outcome

    def run() -> int:
        load_config(parsed.config, parsed.overrides)  # most mistakes show before torch is imported
        warn_of_idle_hosts()
        say_start("train", parsed.config)
        with without_garbage_collection():
            from ptune_dist.loop import train
            from ptune_dist.run.resolve import resolve

        return train(load_config(parsed.config, parsed.overrides, resolve=resolve))

    return report_outcome(run)


def warn_of_idle_hosts() -> None:
    """One line where a job of several hosts trains on one of them, from rank 0 and not under our launcher."""
    from ptune_dist.cluster.allocation import describe_idle_hosts

    if node_folder() is None and os.environ.get("RANK", "0") == "0":
        found = describe_idle_hosts(os.environ, lambda path: Path(path).read_text())
        if found:
            print(f"warning: {found}", file=sys.stderr, flush=True)


def run_check(parsed: argparse.Namespace) -> int:
    from ptune_dist.config.load import load_config
    from ptune_dist.run.watch import report_outcome

    def run() -> int:
        load_config(parsed.config, parsed.overrides)
        say_start("check", parsed.config)
        with without_garbage_collection():
            from ptune_dist.cluster.node_check import check_and_show

        return check_and_show()

    return report_outcome(run)


def run_validate(parsed: argparse.Namespace) -> None:
    from ptune_dist.config.load import load_config

    load_config(parsed.config, parsed.overrides)
    say_start("validate", parsed.config)
    with without_garbage_collection():
        from ptune_dist.evaluation.validate import validate
        from ptune_dist.run.resolve import resolve

    validate(load_config(parsed.config, parsed.overrides, resolve=resolve))


def run_evaluate(parsed: argparse.Namespace) -> None:
    if parsed.shots is not None and not parsed.baselines:
        raise UserError("--shots: examples are for --baselines: give both")
    run_dir, config = read_trained_run(parsed)
    with without_garbage_collection():
        from ptune_dist.commands import choose_labels, compare_baselines, evaluate_run

    if parsed.labels is not None:
        config = choose_labels(config)
    if parsed.baselines:
        compare_baselines(config, run_dir, DEFAULT_SHOTS if parsed.shots is None else parsed.shots, parsed.output)
    else:
        evaluate_run(config, run_dir, parsed.output)


def read_trained_run(parsed: argparse.Namespace) -> "tuple[Path, Config]":
    """The folder of the prompt that is meant, a run's own or a member's, and its config. Raises UserError."""
    from ptune_dist.run.folder import find_member_dir, read_run_config

    run_dir = find_member_dir(Path(parsed.run_dir), parsed.member)
    read_run_config(run_dir, parsed.overrides)  # most mistakes show before torch is imported
    say_start(parsed.run.__name__.removeprefix("run_"), run_dir, sys.stderr)  # stdout is for results
    with without_garbage_collection():
        from ptune_dist.run.resolve import resolve

    return run_dir, read_run_config(run_dir, parsed.overrides, resolve=resolve)


def run_generate(parsed: argparse.Namespace) -> None:
    if parsed.interactive and (parsed.output or parsed.member_column or parsed.member == ALL_MEMBERS):
        raise UserError("--interactive: a chat is with one prompt, in a terminal: leave the other options out")
    if parsed.interactive and parsed.labels is not None:
        raise UserError("--labels: a chat (--interactive) has free text for answers: give --input or --input-file")
    is_of_several = parsed.member == ALL_MEMBERS or parsed.member_column is not None
    run_dir, config = read_sweep(parsed) if is_of_several else read_trained_run(parsed)
    with without_garbage_collection():
        from ptune_dist.commands import GenerateRequest, generate_for_run

    request = GenerateRequest(
        parsed.input,
        parsed.input_file,
        parsed.output,
        parsed.max_new_tokens,
        sampling_of(parsed),
        parsed.seed,
        chooses_label=parsed.labels is not None,
        task=parsed.task,
    )
    if parsed.interactive:
        from ptune_dist.answering.interactive import chat_with_run

        chat_with_run(config, run_dir, request)
    elif is_of_several:
        from ptune_dist.answering.members import generate_for_members

        generate_for_members(config, run_dir, request, parsed.member_column)
    else:
        generate_for_run(config, run_dir, request)


def read_sweep(parsed: argparse.Namespace) -> "tuple[Path, Config]":
    """The folder of a sweep whose members are to answer, and its config. Raises UserError."""
    from ptune_dist.run.folder import read_run_config

    option = "--member" if parsed.member_column is None else "--member-column"
    if parsed.member not in (None, ALL_MEMBERS) or (parsed.member and parsed.member_column):
        raise UserError("--member-column: each row names its member: leave --member out")
    run_dir = Path(parsed.run_dir)
    if not read_run_config(run_dir, parsed.overrides).sweep:
        raise UserError(f"{option}: {run_dir} is not a sweep: omit it")
    say_start("generate", run_dir, sys.stderr)
    with without_garbage_collection():
        from ptune_dist.run.resolve import resolve

    return run_dir, read_run_config(run_dir, parsed.overrides, resolve=resolve)


def sampling_of(parsed: argparse.Namespace) -> dict[str, Any] | None:
    """transformers' names for the sampling flags; None where no flag asks for sampling."""
    flags = {"temperature": parsed.temperature, "top_p": parsed.top_p, "top_k": parsed.top_k}
    given = {name: value for name, value in flags.items() if value is not None}
    return {"do_sample": True, **given} if given else None


def run_export(parsed: argparse.Namespace) -> None:
    if parsed.more_runs and parsed.member:
        raise UserError("--member: with several runs, give the members' folders: RUN/members/NAME")
    runs = [read_trained_run(parsed)]
    for folder in parsed.more_runs:
        runs.append(read_trained_run(argparse.Namespace(**vars(parsed) | {"run_dir": folder})))
    with without_garbage_collection():
        from ptune_dist.commands import export_runs
        from ptune_dist.export.runs import ExportRequest

    request = ExportRequest(
        parsed.to,
        parsed.out,
        parsed.input,
        parsed.input_file,
        parsed.task,
        names=tuple(parsed.names.split(",")) if parsed.names else (),
        uses_reserved=parsed.reserved,
        by_name=parsed.by_name,
    )
    for line in export_runs([(config, run_dir) for run_dir, config in runs], request):
        print(line)
    print(f"exported: {parsed.out}")


def run_compare(parsed: argparse.Namespace) -> None:
    from ptune_dist.reports.compare import compare_runs

    compare_runs(parsed.runs, parsed.out)


def run_import_base(parsed: argparse.Namespace) -> None:
    say_start("import-base", parsed.source)
    with without_garbage_collection():
        from ptune_dist.base.import_base import import_base

    model = import_base(parsed.source, parsed.out, parsed.dtype)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"base: {parsed.out} ({type(model).__name__}, {millions:,.1f}M parameters, {model.dtype})")


def run_bench(parsed: argparse.Namespace) -> int:
    from ptune_dist.bench.harness import run_matrix

    return run_matrix(parsed.matrix, parsed.out, resumes=parsed.resume)


def run_env(_: argparse.Namespace) -> None:
    for line in describe_environment():
        print(line)


def describe_environment() -> Iterator[str]:
    """Versions and hardware, a line each."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    yield f"ptune_dist {__version__}"
    yield f"python {platform.python_version()} on {platform.platform()}"
    for name in ("torch", "deepspeed", "transformers", "datasets", "safetensors", "peft", "bitsandbytes", "accelerate"):
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"{name} is not installed"
    yield f"CPU cores {len(os.sched_getaffinity(0))}"
    yield f"CUDA {torch.version.cuda or 'none in this torch'}"
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        yield f"GPU {i} {facts.name} {facts.total_memory / 2**30:.0f} GiB"
    for name in ("RANK", "WORLD_SIZE", "SLURM_JOB_ID", "NCCL_SOCKET_IFNAME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"):
        if name in os.environ:
            yield f"{name}={os.environ[name]}"
