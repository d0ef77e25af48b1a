"""The section `data`: every key with its type, default and meaning."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ptune_dist.common.files import text_suffix
from ptune_dist.config.fields import (
    Label,
    NotNegative,
    OptionalFolder,
    Positive,
    Real,
    Section,
    Sources,
    read_held_out,
    refuse_twice,
)
from ptune_dist.config.sections import CsvConfig, TaskFiles


def list_sources(value: Any) -> list[str]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


class DataConfig(Section):
    """The examples, and how a row becomes an input and a target."""

    train: Sources
    """The training rows: a .jsonl (.ndjson), .json, .csv, .tsv, .txt or .parquet file, a folder saved by `datasets`, or
    a dataset on the hub (`NAME`, `NAME@CONFIG`, `NAME:SPLIT`). Several of them as a list, or files as `parts/*.jsonl`,
    are read one after another."""

    validation: Annotated[Sources | int | float | None, BeforeValidator(read_held_out)] = None
    """The validation rows, in the same forms. Or a number such as `500`, or a share such as `0.1`: so many of the
    training rows are drawn, kept out of training, and named in the run's split.json."""

    revision: str | None = None
    """A commit, tag or branch of the dataset on the hub: a commit pins it. The hub's `main` where left out."""

    split_seed: Annotated[NotNegative, Field(lt=2**32)] = 0
    """Which of the training rows are drawn for validation. `seed` does not change them."""

    max_examples: Positive | None = None
    """Only the first so many rows of `train` are read, before validation rows are drawn from them."""

    csv: CsvConfig = CsvConfig()
    """How .csv and .tsv files are written."""

    template: str | None = None
    """The input: jinja2 over the columns of a row. Needed unless the data is a .txt file."""

    target: str | None = None
    """The expected output: jinja2 over the columns of a row. The loss is computed only here."""

    references: str | None = None
    """A column with the acceptable answers of a row, a text or a list of texts, for the metrics that compare generated
    answers: the best one counts. `answers.text` is what `text` holds inside column `answers`. The target where left
    out. Where `target` prints all of the column, as in `{{ answers }}`, each epoch trains on one of them, drawn by
    `seed`, and the validation loss is that of the first."""

    chat: bool = False
    """Write input and target as a user's and an assistant's turn, by the chat template of the base's tokenizer: for
    bases that are trained on chats."""

    messages: str | None = None
    """The column that holds a conversation, in place of `template` and `target`: a list of messages with `role` and
    `content`, written by the base's chat template. Every turn of the assistant is learned, and nothing else."""

    system: str | None = None
    """The system prompt of chats that have none of their own."""

    tools: str | None = None
    """The column that holds the tools a conversation may use, as the base's chat template takes them."""

    on_error: Literal["stop", "skip"] = "stop"
    """What a row does that cannot be used: without a value, with an empty target or one that does not fit. `skip`: it
    is counted and named in the run's skipped_rows.jsonl."""

    labels: Annotated[list[Label], AfterValidator(refuse_twice)] | None = None
    """The values that the target's one column can take: for accuracy by likelihood, for `init: labels`, and as the
    classes of an encoder base."""

    task: str | None = None
    """The column that names a row's task, where the rows are of several tasks: metrics are computed for each one too,
    and `multitask_prompt_tuning` learns a prompt for each."""

    tasks: Annotated[list[Label], AfterValidator(refuse_twice)] | dict[Label, TaskFiles] | None = None
    """The tasks: the values of column `data.task`. Or, for rows that are in a file of their own for each task, each
    task's name with its `train` and `validation`; templates then find the name in column `task`."""

    optional_columns: list[str] = []
    """Columns that a row may lack: missing or null, they are empty text. A column that the template tests
    (`{% if input %}`) need not be listed."""

    max_length: Positive | None = None
    """The most tokens of one example, input and target together, without virtual tokens. A longer input is cut; a
    target never is. Where left out: 512, or what the base's learned positions leave room for."""

    truncation_side: Literal["left", "right"] = "left"
    """The end of the input that is cut."""

    append_eos: bool = True
    """Whether the target ends with the tokenizer's end-of-sequence token."""

    cache_dir: OptionalFolder = "auto"
    """The folder in which token ids of large data are kept for all ranks and for restarts. `auto`: below the user's
    cache folder. `off` or `null`: every rank reads all rows at every start."""

    cache_gib: Annotated[Real, Field(gt=0)] = 64.0
    """The most that `cache_dir` keeps. What was not used for the longest time is removed first."""

    @model_validator(mode="before")
    @classmethod
    def fill_from_tasks(cls, raw: Any) -> Any:
        """`train` and `validation` of the first task that has them, where each task has files of its own."""
        tasks = raw.get("tasks") if isinstance(raw, dict) else None
        if not isinstance(tasks, dict):
            return raw
        filled = dict(raw)
        for key in ("train", "validation"):
            found = [files[key] for files in tasks.values() if isinstance(files, dict) and files.get(key)]
            if found and filled.get(key) not in (None, found[0]):
                raise ValueError(f"data.{key} is given, but data.tasks names the files of each task: leave it out")
            if found:
                filled[key] = found[0]
        return filled

    @model_validator(mode="after")
    def check_chat(self) -> "DataConfig":
        if self.messages is not None:
            for key in ("template", "target", "labels"):
                if getattr(self, key) is not None:
                    raise ValueError(f"data.{key} and data.messages are both given: leave one out")
        if self.chat and self.messages is not None:
            raise ValueError("data.chat is for data.template, and data.messages is given: leave one out")
        if self.chat and self.is_plain_text:
            raise ValueError("data.chat needs an input and a target, and a .txt file has none")
        if self.system is not None and not self.is_chat:
            raise ValueError("data.system needs data.chat or data.messages")
        if self.tools is not None and self.messages is None:
            raise ValueError("data.tools needs data.messages")
        return self

    @property
    def is_chat(self) -> bool:
        """Whether the base's chat template writes the rows."""
        return self.chat or self.messages is not None

    @property
    def holds_out(self) -> bool:
        """Whether the validation rows are drawn from the training rows."""
        return isinstance(self.validation, (int, float))

    @property
    def train_sources(self) -> list[str]:
        return list_sources(self.train)

    @property
    def validation_sources(self) -> list[str]:
        """Where validation rows are read, if they have sources of their own."""
        return [] if self.holds_out else list_sources(self.validation)

    @property
    def is_plain_text(self) -> bool:
        """Whether the training rows have no input and no target."""
        return any(text_suffix(Path(source)) == ".txt" for source in self.train_sources)

    @model_validator(mode="after")
    def check_tasks(self) -> "DataConfig":
        if self.tasks is not None and not self.tasks:
            raise ValueError("data.tasks is empty: name the tasks, or leave it out")
        if self.task is not None and not self.tasks:
            raise ValueError("data.task needs data.tasks, the values that the column can take")
        if self.tasks and self.task is None and not isinstance(self.tasks, dict):
            raise ValueError("data.tasks needs data.task, the column that names a row's task")
        return self
