"""Evaluate prompts on held-out rows: what the metrics need is computed once, then every metric.

Rows are shared among the ranks and each is counted once, at any world size. Every rank computes the metrics, from the
same gathered numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from ptune_dist.config.schema import Config
from ptune_dist.data.build import Split, build_label_candidates
from ptune_dist.data.candidates import Candidates
from ptune_dist.data.encode import Encoding
from ptune_dist.data.examples import longest_answer
from ptune_dist.data.framing import decode
from ptune_dist.data.references import build_references, longest_reference
from ptune_dist.errors import UserError
from ptune_dist.evaluation.answer_plan import DEFAULT_NEW_TOKENS, Decoding
from ptune_dist.evaluation.generate import generate_of_tasks, pad_id
from ptune_dist.evaluation.scoring import Scorer
from ptune_dist.metrics import METRICS
from ptune_dist.metrics.metric import Metric, Need, References, RowLoss
from ptune_dist.objectives.objective import Objective
from ptune_dist.run.reading import Reading
from ptune_dist.zero.engine import Engine


@dataclass
class MemberAnswers:
    """What a prompt answers to all rows.

    given: for each need of the metrics, one entry for each row. texts: generated, of the first rows at least.
    label_losses: [rows, labels].
    """

    given: dict[Need, Sequence[Any]]
    texts: list[str]
    label_losses: np.ndarray | None = None


class Evaluation(NamedTuple):
    """Of one prompt: its metrics, some rows with its answers, and what it answers to all rows."""

    metrics: dict[str, float]
    samples: list[dict[str, str]]
    answers: MemberAnswers


@dataclass
class Evaluator:
    """Everything that an evaluation needs besides the prompt; built once, used at every evaluation.

    references: for each need of the metrics, one entry for each row. Where labels are scored, `labels` are their names,
    `candidates` the rows with their labels, and `right` the number of each row's own. tasks: the names of the rows'
    tasks, where they have some: metrics are computed for the rows of each one too.
    """

    split: Split
    tokenizer: PreTrainedTokenizerBase
    metrics: list[Metric]
    references: dict[Need, References]
    decoding: Decoding
    num_samples: int
    candidates: Candidates | None = None
    right: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)

    def __call__(
        self, engine: Engine, members: Sequence[str], between_batches: Callable[[], None] = lambda: None
    ) -> dict[str, Evaluation]:
        """Each member's metrics, the loss always among them, and some rows' answers. Collective.

        `between_batches` is called on every rank after each batch, and may communicate or raise.
        """
        found = self.read(engine, members, between_batches)
        return {
            name: Evaluation(self.compute(answers), self.samples(answers), answers) for name, answers in found.items()
        }

    def read(
        self, engine: Engine, members: Sequence[str], between_batches: Callable[[], None] = lambda: None
    ) -> dict[str, MemberAnswers]:
        """What each member answers to all rows. Collective."""
        numbers = [engine.members.index(name) for name in members]
        budget = self.decoding.micro_batch_tokens
        scorer = Scorer(engine, numbers, budget, pad_id(self.tokenizer), between_batches)
        of_labels = None
        if self.candidates is None:
            losses = scorer.losses(self.split.examples)
        else:
            of_labels = scorer.label_losses(self.candidates, len(self.split.examples))
            losses = of_labels[:, np.arange(len(self.right)), self.right].tolist()  # the right label is the target
        values = scorer.values(self.split.examples) if self._is_needed("values") else None
        found = {}
        for place, name in enumerate(members):
            texts = self._answers(engine, numbers[place], between_batches)
            answers = MemberAnswers({"losses": list(map(RowLoss, losses[place], self._num_tokens))}, texts)
            if of_labels is not None:
                answers.label_losses = of_labels[place]
                answers.given["label_losses"] = [self.labels[number] for number in of_labels[place].argmin(axis=1)]
            if values is not None:
                answers.given["values"] = values[place]
            if self._is_needed("answers"):
                answers.given["answers"] = texts
            found[name] = answers
        return found

    @property
    def signatures(self) -> dict[str, str]:
        """How exactly metrics are computed, of those that have something to say about it."""
        return {m.name: m.signature(self.references[m.needs]) for m in self.metrics if m.signature is not None}

    @property
    def _num_tokens(self) -> list[int]:
        """The tokens of each row's target."""
        return self.split.examples.num_targets.tolist()

    def _is_needed(self, need: Need) -> bool:
        return any(metric.needs == need for metric in self.metrics)

    def compute(self, answers: MemberAnswers) -> dict[str, float]:
        """The metrics of all rows, and of those of each task."""
        given = answers.given
        found = self._compute_of(given, range(len(self.split.examples)))
        of_rows = self.split.examples.tasks
        for number, task in enumerate(self.tasks):
            chosen = [] if of_rows is None else np.flatnonzero(of_rows == number).tolist()
            if chosen:
                found |= {f"{name}/{task}": value for name, value in self._compute_of(given, chosen).items()}
        return found

    def _compute_of(self, given: dict[Need, Sequence[Any]], rows: Sequence[int]) -> dict[str, float]:
        """The metrics of some rows."""
        found = {}
        for metric in self.metrics:
            references = self.references.get(metric.needs, ())
            chosen = [given[metric.needs][i] for i in rows]
            found[metric.name] = float(metric.compute(chosen, [references[i] for i in rows] if references else ()))
        return found

    def samples(self, answers: MemberAnswers) -> list[dict[str, str]]:
        """The first rows with their answers."""
        samples = []
        for i, answer in enumerate(answers.texts[: self.num_samples]):
            if self.split.rows.kind == "text":
                shown = self.show_halves(i)
            else:
                shown = [self.show_input(i).strip(), self.references["answers"][i][0]]
            samples.append({"input": shown[0], "wanted": shown[1], "answer": answer})
        return samples

    def _halves(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A block of plain text: some first tokens, and as many of those that follow as an answer may have."""
        block = self.split.examples.target_ids(index)
        count = min(len(block) // 2, self.decoding.max_new_tokens)
        return block[:count], block[count : count + self.decoding.max_new_tokens]

    def show_halves(self, index: int) -> list[str]:
        """`_halves` as texts."""
        return [decode(self.tokenizer, ids).strip() for ids in self._halves(index)]

    def show_input(self, index: int) -> str:
        """The text of a row's input; special tokens that its template has are shown, those around it are not."""
        text = decode(self.tokenizer, self.split.examples.input_ids(index), skip_special_tokens=False)
        tokenizer = self.tokenizer
        for token in (tokenizer.bos_token, tokenizer.cls_token):
            text = text.removeprefix(str(token or ""))
        for token in (tokenizer.eos_token, tokenizer.sep_token):
            text = text.removesuffix(str(token or ""))
        return text

    def _answers(self, engine: Engine, member: int, between_batches: Callable[[], None]) -> list[str]:
        """Generated answers of the first rows: of all where a metric needs them, else of those that are shown."""
        examples = self.split.examples
        count = len(examples) if self._is_needed("answers") else min(self.num_samples, len(examples))
        if self.split.rows.kind == "text":
            inputs = [([], self._halves(i)[0].tolist()) for i in range(count)]
        else:
            inputs = [(examples.context_ids(i).tolist(), examples.rest_ids(i).tolist()) for i in range(count)]
        tasks = None if examples.tasks is None else examples.tasks[:count]
        answers = dict(
            generate_of_tasks(
                engine, self.tokenizer, inputs, self.decoding, tasks, member=member, between_batches=between_batches
            )
        )
        return [answers[i] for i in range(count)]


def build_evaluator(config: Config, split: Split, reading: Reading, encoding: Encoding | None = None) -> Evaluator:
    """The evaluator that config section `evaluate` asks for, over a split. Raises UserError.

    encoding: how the split's rows are written, where it is not as the config says.
    """
    metrics = [METRICS[name] for name in dict.fromkeys(["loss", *config.evaluate.metrics])]
    for metric in metrics:
        metric.check_available()
        check_objective_fits(metric, reading.objective, config.train.objective)
        if split.rows.kind == "text" and metric.needs != "losses":
            raise UserError(f"evaluate.metrics: {split.rows.name} is plain text without targets for {metric.name}")
    references: dict[Need, References] = {}
    candidates = None
    right: list[int] = []
    labels = config.data.labels or []
    if any(metric.needs == "label_losses" for metric in metrics):
        # Half of a micro-batch: an input that is as long as all of it leaves no room anyway.
        most_tokens = config.train.most_positions // 2
        encoding = encoding or reading.encoding(config)
        candidates, right = build_label_candidates(config.data, split, encoding, most_tokens)
        references["label_losses"] = [[labels[number]] for number in right]
    if split.examples.numbers is not None:
        references["values"] = [[number] for number in split.examples.numbers.tolist()]
    if split.rows.kind != "text":
        references["answers"] = build_references(config.data, split.rows)
    return Evaluator(
        split,
        reading.tokenizer,
        metrics,
        references,
        Decoding(choose_new_tokens(config, split, metrics, references, reading), config.train.most_positions),
        num_samples=config.evaluate.num_samples,
        candidates=candidates,
        right=right,
        labels=labels,
        tasks=list(config.data.tasks or []),
    )


def choose_new_tokens(
    config: Config, split: Split, metrics: list[Metric], references: dict[Need, References], reading: Reading
) -> int:
    """The most tokens of an answer: as configured, or the longest target where a metric compares answers with it."""
    if config.evaluate.max_new_tokens is not None:
        return config.evaluate.max_new_tokens
    if not any(metric.needs == "answers" for metric in metrics):
        return DEFAULT_NEW_TOKENS
    return longest_wanted(config, split, references, reading) or DEFAULT_NEW_TOKENS


def longest_wanted(config: Config, split: Split, references: dict[Need, References], reading: Reading) -> int | None:
    """Tokens of the longest answer that a row asks for; None where none is a text."""
    longest = longest_answer(split.examples)
    if longest is not None and config.data.references is not None:
        longest = max(longest, longest_reference(references["answers"], reading.tokenizer))
    return longest


def check_objective_fits(metric: Metric, objective: Objective, name: str) -> None:
    """Raise UserError for a metric of texts where the objective predicts numbers, and the other way round."""
    predicts_numbers = objective.target == "number"
    if metric.name != "loss" and (metric.needs == "values") != predicts_numbers:
        what = "numbers" if metric.needs == "values" else "texts or labels"
        raise UserError(f"evaluate.metrics: {metric.name} is for {what}, which train.objective={name} does not predict")
