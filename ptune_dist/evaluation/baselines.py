"""A trained prompt beside what it has to beat: the base with the template, with a written prompt, and with examples.

All answer the same validation rows. One base is loaded: it is read without virtual tokens, then with the prompt at its
start, and then with the trained one.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ptune_dist.config.prompt_text import JINJA, Around
from ptune_dist.config.schema import Config
from ptune_dist.config.sweep import ONLY_MEMBER
from ptune_dist.data.build import Split, build_split
from ptune_dist.data.encode import Encoding
from ptune_dist.data.framing import tokenize
from ptune_dist.data.shots import Shot, draw_shots, write_shots, write_turns
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.distributed.world import World, from_main, together
from ptune_dist.errors import UserError
from ptune_dist.evaluation.bare_base import can_read_without_prompt, join_contexts_of, without_prompt
from ptune_dist.evaluation.evaluator import Evaluator, MemberAnswers, build_evaluator
from ptune_dist.evaluation.predictions import find_intervals
from ptune_dist.evaluation.sources import choose_sources
from ptune_dist.evaluation.splits import check_inputs
from ptune_dist.model.value_head import TargetScale
from ptune_dist.prompts.build import find_method, source_files
from ptune_dist.prompts.start import find_prompt_file
from ptune_dist.prompts.store import load_prompt
from ptune_dist.run.job import Job, build_job
from ptune_dist.run.reading import Reading, find_most_positions
from ptune_dist.run.stored_prompt import check_base, check_prompt

NAMES = {
    "template": "base, template alone",
    "hard_prompt": "base, hard prompt",
    "shots": "base, {} in the prompt",
    "untrained": "prompt, untrained",
    "trained": "prompt, trained",
}
NO_TEXT = "the run has neither prompt.text nor prompt.init_text"
NO_BASE = "the base alone does not answer: its head is new and trained with the prompt"
BLOCKS = "rows of plain text have no template"


@dataclass
class Plan:
    """What is evaluated, by key of NAMES, and what is not, with the reason. notes: lines for the user."""

    evaluators: dict[str, Evaluator] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    num_shots: int = 0


def evaluate_baselines(reading: Reading, run_dir: Path, num_shots: int, world: World) -> dict[str, Any]:
    """The metrics of each baseline and of the trained prompt, with intervals, as JSON; of rank 0 only.

    Collective; raises UserError.
    """
    config = reading.config
    tensors, facts = from_main(world, lambda: load_prompt(run_dir / "prompt"))
    together(world, lambda: check_prompt(reading, facts, run_dir))
    train = together(world, lambda: read_training_rows(reading, run_dir))
    plan = together(world, lambda: plan_baselines(reading, run_dir, train, num_shots))
    rows = TrainingRows({ONLY_MEMBER: train}, batch_size=config.train.batch_size, seeds={ONLY_MEMBER: config.seed})
    scales = {ONLY_MEMBER: TargetScale(**facts["target_scale"])} if facts.get("target_scale") else None
    with_start = "untrained" in plan.evaluators or find_method(config.prompt).changes_base
    job = build_job(reading, world, with_start=with_start, scales=scales, rows=rows)
    check_base(config, facts, job.fingerprint, run_dir)
    found: dict[str, MemberAnswers] = {}
    for key in ("template", "hard_prompt", "shots"):
        if key in plan.evaluators:
            read_by_base(job, key, plan, found)
    if "untrained" in plan.evaluators:
        say_next("untrained", plan, job)
        plan.notes += choose_sources(job, rows, world)
        found["untrained"] = read_by_prompt(job, plan.evaluators["untrained"])
    job.engine.load_prompts({ONLY_MEMBER: tensors})
    say_next("trained", plan, job)
    found["trained"] = read_by_prompt(job, plan.evaluators["trained"])
    return together(world, lambda: describe(config, plan, found) if world.is_main else {})


def read_training_rows(reading: Reading, run_dir: Path) -> Split:
    """The rows that the run was trained on. Raises UserError."""
    config = reading.config
    split = build_split(config.data, reading.encoding(config), which="train", folder=run_dir)
    assert split is not None, "data.train is required"
    return split


def plan_baselines(reading: Reading, run_dir: Path, train: Split, num_shots: int) -> Plan:
    """What can be evaluated. Raises UserError."""
    config = reading.config
    own = reading.encoding(config)
    build = Builder(reading, run_dir)
    plan = Plan()
    trained = build(own)
    check_inputs(trained.split.examples, config.prompt)
    plan.evaluators["trained"] = trained
    why = why_no_start(config)
    if why:
        plan.left_out["untrained"] = why
    else:
        plan.evaluators["untrained"] = trained
    if reading.family.trains_head or reading.objective.target == "number":
        plan.left_out |= dict.fromkeys(("template", "hard_prompt", "shots"), NO_BASE)
    elif trained.split.rows.kind == "text":
        plan.left_out |= dict.fromkeys(("template", "hard_prompt", "shots"), BLOCKS)
    elif find_method(config.prompt).changes_base and config.prompt.init != "base":
        reason = f"{config.prompt.method} started from other tensors than the base's"
        plan.left_out |= dict.fromkeys(("template", "hard_prompt", "shots"), reason)
    else:
        plan_base(build, own, plan)
        if num_shots:
            plan_shots(build, own, train, num_shots, plan)
    return plan


def why_no_start(config: Config) -> str:
    """Why the untrained prompt cannot be read, if it cannot."""
    if find_method(config.prompt).changes_base and config.prompt.init == "base":
        return f"{config.prompt.method} starts as the base itself"
    gone = [file for file in source_files(config.prompt) if not find_prompt_file(file).is_file()]
    return f"what it started from is gone: {gone[0]}" if gone else ""


@dataclass
class Builder:
    """Makes evaluators of a run's validation rows that are written in other ways."""

    reading: Reading
    run_dir: Path

    def __call__(self, encoding: Encoding) -> Evaluator:
        """Raises UserError."""
        config = self.reading.config
        split = build_split(
            config.data, encoding, which="validation", max_examples=config.evaluate.max_examples, folder=self.run_dir
        )
        if split is None:
            raise UserError(f"{self.run_dir}/config.yaml: data.validation is missing: give data.validation=FILE")
        return build_evaluator(config, split, self.reading, encoding)


def plan_base(build: Builder, own: Encoding, plan: Plan) -> None:
    """The base with the template alone, and with the written prompt. Raises UserError."""
    config = build.reading.config
    bare = write_around(own, config, Around())
    plan.evaluators["template"] = plan.evaluators["trained"] if bare == own else build(bare)
    _, _, around = hard_prompt(config)
    if around == Around():
        plan.left_out["hard_prompt"] = NO_TEXT
    else:
        plan.evaluators["hard_prompt"] = build(lengthen(write_around(own, config, around), own, build.reading))


def plan_shots(build: Builder, own: Encoding, train: Split, count: int, plan: Plan) -> None:
    """The base with as many examples as fit, after the task. Raises UserError."""
    config = build.reading.config
    if config.data.messages is not None:
        plan.left_out["shots"] = "a conversation is asked as it stands"
        return
    task, frame, _ = hard_prompt(config)
    framed = write_around(own, config, frame)
    drawn = draw_shots(config.data, train, framed, count, config.seed)
    most = find_most_positions(build.reading)
    bare = write_around(own, config, Around())
    longest = int(plan.evaluators["template"].split.examples.lengths.max())
    needed = []
    for number in range(len(drawn), 0, -1):
        encoding = with_shots(framed, drawn[:number], task)
        needed.append(longest + count_added(encoding, bare))
        if most is None or needed[-1] <= most:
            plan.num_shots = number
            plan.evaluators["shots"] = build(lengthen(encoding, own, build.reading))
            break
    if most is not None and plan.num_shots < len(drawn):
        used = f"{count_examples(plan.num_shots)} used" if plan.num_shots else "none is used"
        need = f"{count_examples(len(drawn))} and the longest row need {needed[0]:,} tokens"
        plan.notes.append(f"--shots: {need}, the base has {most:,}: {used}")
    if not plan.num_shots:
        plan.left_out["shots"] = "no example fits the base's length"


def hard_prompt(config: Config) -> tuple[str, Around, Around]:
    """The task, what stands around the template of each example, and all texts of the hard prompt."""
    prompt = config.prompt
    if prompt.text is not None:
        return *prompt.text.split_task(), prompt.text.around()
    text = (prompt.init_text or "").strip()
    if not text:
        return "", Around(), Around()
    source = f"{{% raw %}}{text}{{% endraw %}}" if JINJA.search(text) else text
    return text, Around(), Around(before=(("prompt.init_text", source),))


def write_around(own: Encoding, config: Config, around: Around) -> Encoding:
    """The run's encoding with other texts around the template; of conversations, with another system prompt."""
    if config.data.messages is None:
        return replace(own, around=around)
    assert own.chat is not None
    return replace(own, chat=replace(own.chat, text="\n".join(text for _, text in around.before + around.after)))


def with_shots(framed: Encoding, shots: list[Shot], task: str) -> Encoding:
    """An encoding whose rows stand after examples."""
    if framed.chat is not None:
        return replace(framed, chat=replace(framed.chat, earlier=write_turns(shots, task)))
    return replace(framed, lead=write_shots(shots, task, on_new_line=framed.framing.starts_target))


def count_added(encoding: Encoding, other: Encoding) -> int:
    """How many tokens the texts around every row have more than those of another encoding."""
    return max(0, count_around(encoding) - count_around(other))


def count_around(encoding: Encoding) -> int:
    """Tokens of the texts around a row, without those of its columns."""
    texts = [encoding.lead, encoding.around.head(), encoding.around.tail()]
    if encoding.chat is not None:
        texts += [encoding.chat.opening if encoding.chat.wraps else encoding.chat.text]
    return sum(map(len, tokenize(encoding.tokenizer, texts)))


def lengthen(encoding: Encoding, own: Encoding, reading: Reading) -> Encoding:
    """The encoding with room for the texts around rows, so that no row is cut that was not, where the base has it."""
    most = find_most_positions(reading)
    length = own.max_length + count_added(encoding, own)
    return replace(encoding, max_length=length if most is None else min(length, most))


def read_by_base(job: Job, key: str, plan: Plan, found: dict[str, MemberAnswers]) -> None:
    """What the base alone answers. Collective."""
    evaluator = plan.evaluators[key]
    model = job.engine.model
    say_next(key, plan, job)
    if model.prompt(0).changes_base:  # it has started as the base, and is not trained yet
        found[key] = read_by_prompt(job, evaluator)
    elif can_read_without_prompt(model, evaluator):
        with without_prompt(model, 0):
            found[key] = read_by_prompt(job, join_contexts_of(evaluator))
    else:
        plan.left_out[key] = "a row's input is empty, and the base alone answers nothing to it"


def say_next(key: str, plan: Plan, job: Job) -> None:
    """One line of progress, from rank 0."""
    if job.engine.world.is_main:
        print(f"evaluating: {name_of(key, plan.num_shots)}", file=sys.stderr, flush=True)


def name_of(key: str, num_shots: int) -> str:
    return NAMES[key].format(count_examples(num_shots))


def read_by_prompt(job: Job, evaluator: Evaluator) -> MemberAnswers:
    """What the job's prompt answers. Collective."""
    (answers,) = evaluator.read(job.engine, job.engine.members).values()
    return answers


def describe(config: Config, plan: Plan, found: dict[str, MemberAnswers]) -> dict[str, Any]:
    """What `--output` holds."""
    rows = {}
    for key, answers in found.items():
        evaluator = plan.evaluators[key]
        examples = evaluator.split.examples
        rows[key] = {
            "name": name_of(key, plan.num_shots),
            "num_rows": len(examples),
            "num_truncated": int(examples.num_truncated),
            "metrics": evaluator.compute(answers),
            "intervals_95": find_intervals(evaluator, answers),
            "first_input": evaluator.show_input(0) if evaluator.split.rows.kind != "text" else None,
        }
    signatures = plan.evaluators["trained"].signatures
    return {
        "baselines": rows,
        "left_out": plan.left_out,
        "notes": plan.notes,
        "data": config.data.validation,
        "num_shots": plan.num_shots,
        "seed": config.seed,
    } | ({"signatures": signatures} if signatures else {})


def render_baselines(content: dict[str, Any]) -> Iterator[str]:
    """The lines of the table for a terminal, and what was left out."""
    rows = content["baselines"]
    names = list(dict.fromkeys(name for row in rows.values() for name in row["metrics"]))
    table = [["", *names, "rows"]]
    for row in rows.values():
        cells = [show_metric(row["metrics"].get(name), row["intervals_95"].get(name)) for name in names]
        table.append([row["name"], *cells, f"{row['num_rows']:,}"])
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    yield "[ ]: 95% intervals by the bootstrap over rows"
    left_out = content["left_out"]
    for reason in dict.fromkeys(left_out.values()):
        keys = [NAMES[key].format("examples") for key in left_out if left_out[key] == reason]
        yield f"left out: {'; '.join(keys)}: {reason}"
    yield from content["notes"]


def count_examples(number: int) -> str:
    return f"{number} example{'' if number == 1 else 's'}"


def show_metric(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    bounds = f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
    return f"{value:.4f}{bounds}"
