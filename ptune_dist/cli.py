"""The command `ptune-dist`. Floor 7: parse, hand over, turn errors into one line and an exit status.

torch is imported only by the commands that compute, after the config has been read, so a mistake shows at once.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from ptune_dist.config import Config, load_config
from ptune_dist.errors import RunFault, UserError
from ptune_dist.run_dir import read_run_config, write_json

USER_MISTAKE, FAULT, INTERRUPTED = 2, 1, 130
SECONDS_FOR_RANK_0 = 2.0
CHUNK_ROWS = 256  # rows of one rank that `generate` answers before it writes them


class Parser(argparse.ArgumentParser):
    """Says a wrong argument in one line, as every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        parsed = parse(arguments)
        return parsed.run(parsed) or 0
    except UserError as error:
        say_error(error)
        return USER_MISTAKE
    except RunFault as error:
        say_error(error)
        return FAULT
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        leave_process_group()


def say_error(error: Exception) -> None:
    """One line, on rank 0 only: every rank has the same error."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    else:
        time.sleep(SECONDS_FOR_RANK_0)  # torchrun ends all ranks when the first has ended


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The parsed command line; overrides may stand anywhere after the command. Raises UserError."""
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    wrong = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(parsed, "overrides")]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed


def leave_process_group() -> None:
    """End the process group where one was begun, so that no backend complains at exit."""
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def build_parser() -> Parser:
    parser = Parser(prog="ptune-dist", description="Train soft prompts against large frozen language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, run, text: str, *positional: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        for argument in positional:
            command.add_argument("run_dir" if argument == "RUN" else argument.lower(), metavar=argument)
        if name not in ("env", "bench"):
            command.add_argument(
                "overrides", nargs="*", default=[], metavar="key.path=value", help="wins over the file"
            )
        return command

    add("train", run_train, "train a prompt, or go on with a run", "CONFIG")
    add("validate", run_validate, "show what a config will do, without training", "CONFIG")
    add("evaluate", run_evaluate, "judge a run's prompt on data.validation", "RUN")
    add_generate_arguments(add("generate", run_generate, "answer inputs with a run's prompt", "RUN"))
    export = add("export", run_export, "take a run's prompt elsewhere", "RUN")
    export.add_argument("--to", choices=["peft", "prompt-embeds"], required=True)
    export.add_argument("--out", type=Path, required=True, metavar="DIR")
    add_input_arguments(export, "for prompt-embeds: ", required=False)
    bench = add("bench", run_bench, "run a matrix of benchmarks", "MATRIX")
    bench.add_argument("--out", metavar="DIR")
    add("env", run_env, "print versions and hardware for a bug report")
    return parser


def add_input_arguments(command: argparse.ArgumentParser, prefix: str, *, required: bool) -> None:
    group = command.add_mutually_exclusive_group(required=required)
    group.add_argument("--input", metavar="TEXT", help=prefix + "the value of the template's one column")
    group.add_argument("--input-file", metavar="F", help=prefix + "rows with the template's columns")


def add_generate_arguments(command: argparse.ArgumentParser) -> None:
    add_input_arguments(command, "", required=True)
    command.add_argument("--output", type=Path, metavar="F", help="JSON lines; standard output where left out")
    count, share, above_0 = bounded(int, low=1), bounded(float, above=0, high=1), bounded(float, above=0)
    command.add_argument("--max-new-tokens", type=count, metavar="N", help="evaluate.max_new_tokens where left out")
    command.add_argument("--temperature", type=above_0, metavar="T", help="sample; greedy where left out")
    command.add_argument("--top-p", type=share, metavar="P", help="sample among the likeliest tokens of total P")
    command.add_argument("--top-k", type=count, metavar="K", help="sample among the K likeliest tokens")
    command.add_argument("--seed", type=bounded(int, low=0, high=2**32 - 1), default=0, metavar="S")


def bounded(kind: type, *, low: float = -math.inf, above: float = -math.inf, high: float = math.inf):
    """An argparse type: a number of this kind, at least `low`, more than `above`, at most `high`."""

    def parse_number(text: str) -> float:
        number = kind(text)
        if not (low <= number <= high and number > above):
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return number

    parse_number.__name__ = kind.__name__
    return parse_number


def run_train(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.overrides)
    from ptune_dist.train import train

    return train(config)


def run_validate(parsed: argparse.Namespace) -> None:
    config = load_config(parsed.config, parsed.overrides)
    from ptune_dist.validate import validate

    validate(config)


def run_evaluate(parsed: argparse.Namespace) -> None:
    run_dir = Path(parsed.run_dir)
    config = read_run_config(run_dir, parsed.overrides)
    from ptune_dist.data.build import build_split
    from ptune_dist.distributed import init_distributed
    from ptune_dist.evaluate import build_judge
    from ptune_dist.job import build_tokenizer, build_trained_job, together

    world = init_distributed()

    def build():
        tokenizer = build_tokenizer(config)
        split = build_split(config.data, tokenizer, which="validation", max_examples=config.evaluate.max_examples)
        if split is None:
            raise UserError(f"{run_dir}/config.yaml: data.validation is missing: give data.validation=FILE")
        return build_judge(config, split, tokenizer)

    judge = together(world, build)
    metrics, samples = judge(build_trained_job(config, run_dir, world).engine)
    if world.is_main:
        content = {"data": config.data.validation, "num_examples": len(judge.split.examples), **metrics}
        write_json(run_dir / "evaluation.json", content | {"samples": samples})
        print(json.dumps(content, indent=2))


def run_generate(parsed: argparse.Namespace) -> None:
    run_dir = Path(parsed.run_dir)
    config = read_run_config(run_dir, parsed.overrides)
    from ptune_dist.data.build import build_inputs
    from ptune_dist.distributed import init_distributed
    from ptune_dist.generate import generate_texts
    from ptune_dist.job import build_tokenizer, build_trained_job, together

    world = init_distributed()
    rows = together(world, lambda: read_input_rows(config, parsed))
    inputs = together(world, lambda: build_inputs(config.data, rows, build_tokenizer(config)))
    job = build_trained_job(config, run_dir, world)
    chunk = CHUNK_ROWS * world.size
    output = together(world, lambda: open_output(parsed.output) if world.is_main else None)
    for first in range(0, len(inputs), chunk):
        answers = dict(
            generate_texts(
                job.engine, job.tokenizer, inputs[first : first + chunk], sampling=sampling_of(parsed),
                max_new_tokens=parsed.max_new_tokens or config.evaluate.max_new_tokens,
                micro_batch_tokens=config.train.micro_batch_tokens, seed=parsed.seed + first,
            )
        )  # fmt: skip
        for i in sorted(answers) if output else ():
            row = rows.dataset[first + i] | {"generated": answers[i]}
            print(json.dumps(row, ensure_ascii=False, default=str), file=output, flush=True)


def open_output(path: Path | None):
    try:
        return open(path, "w", encoding="utf-8") if path else sys.stdout
    except OSError as error:
        raise UserError(f"--output: {path}: {error.strerror}") from None


def sampling_of(parsed: argparse.Namespace) -> dict[str, Any] | None:
    """transformers' names for the sampling flags; None where no flag asks for sampling."""
    flags = {"temperature": parsed.temperature, "top_p": parsed.top_p, "top_k": parsed.top_k}
    given = {name: value for name, value in flags.items() if value is not None}
    return {"do_sample": True, **given} if given else None


def read_input_rows(config: Config, parsed: argparse.Namespace):
    """The rows of `--input-file`, or the one row that `--input` makes for a template of one column."""
    import datasets

    from ptune_dist.data.build import build_templates
    from ptune_dist.data.sources import Rows, load_rows

    if parsed.input_file:
        return load_rows(parsed.input_file, key="--input-file", default_split="test")
    template, _ = build_templates(config.data)
    if len(template.columns) != 1:
        columns = ", ".join(template.columns) or "none"
        raise UserError(f"--input: data.template takes {columns}: give rows with --input-file")
    row = {template.columns[0]: parsed.input}
    return Rows("--input", datasets.Dataset.from_list([row]), "rows")


def run_export(parsed: argparse.Namespace) -> None:
    run_dir = Path(parsed.run_dir)
    config = read_run_config(run_dir, parsed.overrides)
    import torch

    from ptune_dist.base.load import load_base
    from ptune_dist.data.build import build_inputs
    from ptune_dist.export import export_peft, export_prompt_embeds
    from ptune_dist.job import build_tokenizer
    from ptune_dist.prompts.store import load_prompt

    tensors, facts = load_prompt(run_dir / "prompt")
    if parsed.to == "peft":
        export_peft(tensors, facts, parsed.out)
    else:
        given = parsed.input is not None or parsed.input_file
        dtype = getattr(torch, config.model.dtype)
        rows = read_input_rows(config, parsed) if given else None
        inputs = build_inputs(config.data, rows, build_tokenizer(config)) if given else []
        base = load_base(config.model.path, dtype=dtype, random_init=config.model.random_init, seed=config.seed)
        export_prompt_embeds(tensors, base.get_input_embeddings(), inputs, dtype, parsed.out)
    print(f"exported: {parsed.out}")


def run_bench(parsed: argparse.Namespace) -> int:
    from ptune_dist.bench.harness import run_matrix

    return run_matrix(parsed.matrix, parsed.out)


def run_env(_: argparse.Namespace) -> None:
    for line in describe_environment():
        print(line)


def describe_environment() -> Iterator[str]:
    """Versions and hardware, a line each."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from ptune_dist import __version__

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
