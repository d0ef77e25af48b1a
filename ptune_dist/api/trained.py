"""A trained prompt in a Python process: it answers, scores, and goes onto a model that the user already holds."""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptune_dist.api.configs import Overrides, to_words
from ptune_dist.api.inputs import check_options, list_inputs
from ptune_dist.api.session import process_group
from ptune_dist.config.schema import Config
from ptune_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

    from ptune_dist.api.attach import Attached
    from ptune_dist.data.sources import Rows
    from ptune_dist.distributed.world import World
    from ptune_dist.run.job import Job
    from ptune_dist.run.reading import Reading

Row = Mapping[str, Any]  # a row's columns, as in a data file
IN_PLACE = "rows"  # the name of rows without a file, in messages


def load(run: str | Path, *, member: str | None = None, overrides: Overrides = ()) -> "TrainedPrompt":
    """The trained prompt of a run's folder; of a sweep that of `member`, or of the best-ranked one.

    The base is read when an answer or a score is first asked for, and is whole on this process's GPU, or on the CPU.
    overrides: as for `load_config`, such as `{"model.path": "/elsewhere/gpt2"}`. Raises UserError.
    """
    from ptune_dist.run.folder import find_member_dir, read_run_config
    from ptune_dist.run.resolve import resolve

    run_dir = find_member_dir(Path(run), member)
    words = to_words(overrides)
    return TrainedPrompt(run_dir, read_run_config(run_dir, words, resolve=resolve), words)


class TrainedPrompt:
    """A prompt and how its run renders and reads rows. Made by `ptune_dist.load`.

    folder: of the run, or of the member of a sweep. config: the run's. facts: what is stored beside the prompt
    (`prompt/prompt.json`). overrides: those of the run's config that `config` has, as on the command line.
    """

    def __init__(self, folder: Path, config: Config, overrides: Sequence[str] = ()):
        from ptune_dist.prompts.store import load_prompt
        from ptune_dist.run.reading import build_reading

        self.folder = folder
        self._overrides = list(overrides)
        self._tensors, self.facts = load_prompt(folder / "prompt")
        # One process holds the base whole, so that nothing of it depends on a process group between two calls.
        self._job: Job | None = None
        self._reading: Reading = build_reading(config.model_copy(update={"deepspeed": None}))

    def __repr__(self) -> str:
        prompt = self.config.prompt
        return f"TrainedPrompt({str(self.folder)!r}, {prompt.method}, {self.config.model.path})"

    @property
    def config(self) -> Config:
        return self._reading.config

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self._reading.tokenizer

    def _open(self, world: "World") -> "Job":
        """The base with the prompt, which is built once."""
        from ptune_dist.run.stored_prompt import build_trained_job

        if self._job is None:
            self._job = build_trained_job(self._reading, self.folder, world)
        return self._job

    def generate(
        self,
        inputs: str | Row | Sequence[str | Row],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
        task: str | None = None,
    ) -> list[str]:
        """The answers to an input or to several, in their order, as `ptune-dist generate` gives them.

        An input is a row (a dict with the template's columns), or a text: the value of the template's one column, or a
        user's turn of chat data. Answers are greedy unless a sampling option is given. They have no whitespace at
        either end, and by default as many tokens as the longest target that was trained on. An answer does not depend
        on the other inputs. task: of a prompt of several tasks, where rows do not name theirs. Raises UserError.
        """
        from ptune_dist.commands import GenerateRequest, build_decoding, find_tasks, prepare_texts

        options = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        check_options({"max_new_tokens": max_new_tokens, **options, "seed": seed})
        given = {name: value for name, value in options.items() if value is not None}
        request = GenerateRequest(
            None, None, None, max_new_tokens, {"do_sample": True, **given} if given else None, seed, task=task
        )
        with process_group() as world, self._rows(inputs) as rows:
            answer = prepare_texts(self._reading, rows, find_tasks(self.config, rows, task))
            job = self._open(world)
            decoding = build_decoding(job, self.folder, request)
            return [found["generated"] for _, some in answer(job, decoding) for found in some]

    def score(self, rows: Row | Sequence[Row]) -> list[dict[str, Any]]:
        """How well the prompt predicts the target of a row, or of each of several.

        Of each row: `loss` (the mean negative log-likelihood of its target's tokens, or what the run's objective is),
        `num_tokens` and `gold`; where the run has data.labels, also the likeliest `label`, `gold_label` and
        `probabilities`; of a prompt that predicts numbers, `predicted`. Rows have the columns of `data.template` and
        `data.target`. Raises UserError.
        """
        from ptune_dist.commands import build_run_evaluator
        from ptune_dist.evaluation.predictions import list_predictions

        several = list_inputs(rows)
        if not several:
            return []
        with process_group() as world, self._file_of(several) as file:
            evaluator = build_run_evaluator(self._scoring_of(file), self.folder)
            engine = self._open(world).engine
            (answers,) = evaluator.read(engine, engine.members).values()
            return list_predictions(evaluator, answers)

    def _scoring_of(self, file: Path) -> "Reading":
        """The run's reading with the rows of a file for validation, and nothing to generate."""
        config = self.config
        names = ["accuracy"] if config.data.labels else ["mae"] if self._reading.objective.target == "number" else []
        data = config.data.model_copy(update={"validation": str(file), "cache_dir": None, "on_error": "stop"})
        asked = {"metrics": ["loss", *names], "num_samples": 0, "max_examples": 0}
        evaluate = config.evaluate.model_copy(update=asked)
        return dataclasses.replace(self._reading, config=config.model_copy(update={"data": data, "evaluate": evaluate}))

    def encode(self, inputs: str | Row | Sequence[str | Row]) -> "BatchEncoding":
        """Token ids of inputs as the run reads them, without virtual tokens: `input_ids` and `attention_mask` [B, T].

        They are for a model that the prompt is attached to: `model.generate(**prompt.encode(rows).to(model.device))`.
        Causal bases have padding on the left, others on the right. Raises UserError.
        """
        from ptune_dist.api.attach import pad_ids
        from ptune_dist.commands import build_run_inputs

        with self._rows(inputs) as rows:
            found = build_run_inputs(self._reading, rows)
        side = "left" if self._reading.family.name == "causal" else "right"
        return pad_ids([[*context, *rest] for context, rest in found], self.tokenizer, side)

    def attach(self, model: "PreTrainedModel", *, task: str | None = None) -> "Attached":
        """Put the prompt onto a model of transformers, in place: its `forward` and `generate` then read it first.

        The model may be of any dtype and on any device. Its weights stay as they are, unless the run's method has
        trained some of them. `detach()` of what is returned, or the end of a `with` block, restores the model.
        task: of a prompt of several tasks.

        Raises UserError for a model of another architecture than the run's base, and for prompts that stand elsewhere
        than before a text.
        """
        from ptune_dist.api.attach import attach
        from ptune_dist.prompts.multitask import select_task

        tensors, facts = select_task(self._tensors, self.facts, task)
        return attach(model, tensors, facts)

    def export(self, to: str, out: str | Path, *options: str) -> Path:
        """Write the prompt for other software into a folder, which is returned.

        to: "peft", "prompt-embeds" or another value of `ptune-dist export --to`. options: more words of that command,
        such as "--task", "nli". The overrides of `load` apply. Raises UserError.
        """
        from ptune_dist.command_line.arguments import parse

        parsed = parse(["export", str(self.folder), "--to", to, "--out", str(out), *options, *self._overrides])
        parsed.run(parsed)
        return Path(out)

    @contextlib.contextmanager
    def _rows(self, inputs: str | Row | Sequence[str | Row]) -> "Iterator[Rows]":
        """Inputs as rows of a file, so that they are read as the command reads them."""
        from ptune_dist.commands import read_input_rows

        data = self.config.data
        prompt = self.config.prompt
        several = list_inputs(inputs)
        if not several:
            raise UserError("inputs: there are none")
        rows: list[Row] = []
        for item in several:
            if isinstance(item, str):
                item = read_input_rows(data, prompt, item, None).read(0, 1)[0]
            rows.append(item)
        with self._file_of(rows) as file:
            yield read_input_rows(data, prompt, None, str(file))

    @contextlib.contextmanager
    def _file_of(self, rows: Sequence[Row]) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            file.write_text("".join(lines), encoding="utf-8")
            try:
                yield file
            except UserError as error:
                raise UserError(str(error).replace(str(file), IN_PLACE)) from None
