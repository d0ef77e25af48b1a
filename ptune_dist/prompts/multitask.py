"""Multitask prompt tuning (Wang et al. 2023, arXiv:2303.02861): a prompt for all tasks times a matrix for each.

Parameters are those of PEFT's class. PEFT starts the matrices near zero, where a prompt is nearly nothing; here they
start near one, so that each task starts at the shared prompt and `prompt.init` means what it means elsewhere.

Shapes: T tasks, P virtual tokens, D width, R ranks.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ptune_dist.errors import UserError
from ptune_dist.prompts.method import BaseFacts, Contribution, Method, Options, PeftAdapter, TrainingDefaults
from ptune_dist.prompts.start import NOTHING, Start

NAMES = ("shared_prompt", "task_cols", "task_rows")
PEFT_NAMES = ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")
SPREAD = 0.02  # the standard deviation of PEFT's start


class MultitaskOptions(Options):
    """The options of `multitask_prompt_tuning`; its tasks are `data.tasks`."""

    num_ranks: int = Field(default=1, gt=0)
    """The rank of each task's matrix, as in PEFT."""

    source_tasks: Literal["same", "average", "exact", "shared"] | None = None
    """With `init: file`, what is taken of the source's tasks: `same`: each, to train further; `average`: their mean;
    `exact`: those of `source_task`; `shared`: only the shared prompt. Left out, `same` where the source has the same
    tasks, else `average`."""

    source_task: str | int | None = None
    """With `source_tasks: exact`: the task's name, or its number, from 0, where an adapter has no names."""


class MultitaskPromptTuning(Method):
    """A shared prompt [P, D], and for each task columns [P, R] and rows [R, D]."""

    options_type = MultitaskOptions
    has_tasks = True
    default_training = TrainingDefaults(0.3, "Wang et al. 2023, on T5")
    default_training_of = {"encoder": TrainingDefaults(0.01, "on encoders as `prompt_tuning`")}

    def __init__(self, shared: torch.Tensor, cols: torch.Tensor, rows: torch.Tensor):
        super().__init__()
        self.num_virtual_tokens = len(shared)
        self.num_tasks = len(cols)
        for name, tensor in zip(NAMES, (shared, cols, rows), strict=True):
            self.register_parameter(name, nn.Parameter(tensor.detach().float().clone()))

    @classmethod
    def build(
        cls, options: MultitaskOptions, num_virtual_tokens: int, base: BaseFacts, start: Start
    ) -> "MultitaskPromptTuning":
        check_source_options(options, start.kind)
        cols, rows = draw_factors(max(1, len(start.tasks)), num_virtual_tokens, base.width, options.num_ranks, start)
        if start.kind == "file" and start.holds("task_cols", "prefix_task_cols"):
            return cls(*read_source(options, (num_virtual_tokens, base.width), start, (cols, rows)))
        if options.source_tasks is not None and start.kind == "file":
            raise UserError(f"prompt.source_tasks is given but {start.file} is of another method: leave it out")
        return cls(start.vectors(num_virtual_tokens, base.width), cols, rows)

    def forward(self) -> Contribution:
        assert self.num_tasks == 1, "a prompt of several tasks contributes something of its own to each"
        return self.contributions()[0]

    def contributions(self) -> list[Contribution]:
        return [Contribution(vectors=vectors) for vectors in self._fold()]

    def _fold(self) -> torch.Tensor:
        """[T, P, D]."""
        shared, cols, rows = (self.get_parameter(name) for name in NAMES)
        return shared * (cols @ rows)

    @torch.no_grad()
    def plain(self) -> dict[str, torch.Tensor]:
        """Of one task [P, D], of several [T, P, D]."""
        folded = self._fold()
        return {"virtual_tokens": folded[0] if self.num_tasks == 1 else folded}

    @classmethod
    def to_peft(cls, plain: dict[str, torch.Tensor]) -> PeftAdapter:
        _, cols, rows = (plain[name] for name in NAMES)
        settings = {
            "peft_type": "MULTITASK_PROMPT_TUNING",
            "prompt_tuning_init": "RANDOM",
            "num_ranks": rows.shape[1],
            "num_tasks": len(cols),
        }
        more = {name: plain[own] for name, own in zip(PEFT_NAMES[1:], NAMES[1:], strict=True)}
        return PeftAdapter(plain[NAMES[0]], settings, more)


def check_source_options(options: MultitaskOptions, start: str) -> None:
    """Raise ValueError where what is to be taken of a source does not fit the start, or itself."""
    if options.source_tasks is not None and start not in ("file", NOTHING):
        raise ValueError(f"prompt.source_tasks is given but prompt.init is {start}: set prompt.init=file")
    if (options.source_task is not None) != (options.source_tasks == "exact"):
        raise ValueError("prompt.source_task names the task of prompt.source_tasks=exact: give both or none")


def draw_factors(
    num_tasks: int, num_virtual_tokens: int, width: int, num_ranks: int, start: Start
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns [T, P, R] and rows [T, R, D] whose products are ones with PEFT's noise."""
    generator = torch.Generator().manual_seed(start.seed)
    cols = 1 + SPREAD * torch.randn(num_tasks, num_virtual_tokens, num_ranks, generator=generator)
    rows = 1 + SPREAD * torch.randn(num_tasks, num_ranks, width, generator=generator)
    return cols, rows / num_ranks


def read_source(
    options: MultitaskOptions, shape: tuple[int, int], start: Start, drawn: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shared prompt, columns and rows from the source that `start` names. Raises UserError.

    `drawn`: the columns and rows of tasks that take none of the source's.
    """
    source = start.read()
    names = NAMES if NAMES[1] in source.tensors else PEFT_NAMES
    missing = [name for name in names if name not in source.tensors]
    if missing:
        raise UserError(f"prompt.init_file: {source.file} holds no {missing[0]}")
    shared, cols, rows = (source.tensors[name].float() for name in names)
    if source.settings.get("num_transformer_submodules") == 2:  # PEFT's rows for a decoder, which nothing reads
        shared, cols = shared[: len(shared) // 2], cols[:, : cols.shape[1] // 2]
    if tuple(shared.shape) != shape:
        raise UserError(
            f"prompt.init_file: {source.file} holds {tuple(shared.shape)}, this prompt is (num_virtual_tokens, width) "
            f"= {shape}"
        )
    known = source.facts.get("tasks") or []
    taken = options.source_tasks or ("same" if can_be_same(start.tasks, known, len(cols)) else "average")
    if taken == "shared":
        return shared, *drawn
    if rows.shape[1] != options.num_ranks:
        raise UserError(
            f"prompt.init_file: {source.file} has tasks of rank {rows.shape[1]}: set prompt.num_ranks={rows.shape[1]}"
        )
    if taken == "same":
        order = match_tasks(start.tasks, known, len(cols), str(source.file))
        return shared, cols[order], rows[order]
    if taken == "average":
        chosen = slice(None)
    else:
        number = find_task(options.source_task, known, len(cols), str(source.file))
        chosen = slice(number, number + 1)
    num_tasks = len(drawn[0])
    means = [part[chosen].mean(dim=0, keepdim=True).expand(num_tasks, -1, -1) for part in (cols, rows)]
    return shared, means[0], means[1]


def can_be_same(tasks: list[str], known: list[str], num_known: int) -> bool:
    """Whether a source's tasks are these: by their names, or where it has no names by their number."""
    return sorted(tasks) == sorted(known) if known else max(1, len(tasks)) == num_known


def match_tasks(tasks: list[str], known: list[str], num_known: int, file: str) -> list[int]:
    """The number of each task in a source. Raises UserError."""
    if not can_be_same(tasks, known, num_known):
        found = ", ".join(known) or str(num_known)
        raise UserError(f"prompt.source_tasks: same, but the tasks of {file} are {found}: set average, exact or shared")
    return [known.index(task) for task in tasks] if known else list(range(num_known))


def find_task(asked: str | int | None, known: list[str], num_known: int, file: str) -> int:
    """The number of a source's task. Raises UserError."""
    if str(asked) in known:
        return known.index(str(asked))
    if str(asked).isdecimal() and int(str(asked)) < num_known and not known:
        return int(str(asked))
    raise UserError(f"prompt.source_task: {asked} is none of {', '.join(known) or f'0 to {num_known - 1}'} in {file}")


def select_task(
    tensors: dict[str, torch.Tensor], facts: dict, task: str | None
) -> tuple[dict[str, torch.Tensor], dict]:
    """A stored prompt as that of prompt tuning for one of its tasks; itself without one. Raises UserError."""
    tasks = facts.get("tasks") or []
    is_multitask = NAMES[1] in tensors
    if task is None:
        return tensors, facts
    if not is_multitask or task not in tasks:
        known = f"none of {', '.join(tasks)}" if is_multitask and tasks else "given but the prompt has no tasks"
        raise UserError(f"--task: {task} is {known}")
    own = {name: tensor for name, tensor in tensors.items() if name not in NAMES}
    vectors = own["virtual_tokens"]
    own["virtual_tokens"] = vectors[tasks.index(task)] if vectors.dim() == 3 else vectors
    return own, facts | {"method": "prompt_tuning", "options": {}, "tasks": None}
