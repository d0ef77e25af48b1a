"""Evaluate a prompt on held-out rows: loss, perplexity, exact match, accuracy by likelihood.

Floor 5. Rows are shared among the ranks and each is counted once, whatever the world size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ptune_dist.config.schema import Config
from ptune_dist.data.batches import collate
from ptune_dist.data.build import Split, build_label_candidates
from ptune_dist.data.encode import Examples
from ptune_dist.distributed.world import gather_from_ranks
from ptune_dist.errors import UserError
from ptune_dist.evaluation.generate import generate_texts, pad_id
from ptune_dist.run.reading import Reading
from ptune_dist.zero.engine import Engine

Evaluation = tuple[dict[str, float], list[dict[str, str]]]  # metrics, and answers to some rows


@dataclass
class Evaluator:
    """All that evaluation needs besides the prompt; built once, used at every evaluation."""

    split: Split
    tokenizer: PreTrainedTokenizerBase
    metrics: list[str]
    micro_batch_tokens: int
    max_new_tokens: int
    num_samples: int
    candidates: tuple[list[Examples], list[int]] | None = None
    labels: list[str] | None = None  # an encoder's, whose targets are their numbers

    def __call__(
        self, engine: Engine, members: Sequence[str], between_batches: Callable[[], None] = lambda: None
    ) -> dict[str, Evaluation]:
        """Each member's metrics, `loss` per supervised token always among them, and some rows' answers. Collective.

        `between_batches` is called on every rank after each batch, and may communicate or raise.
        """
        numbers = [engine.members.index(name) for name in members]
        losses = self._losses(engine, self.split.examples, numbers, between_batches)
        accuracies = self._accuracies(engine, numbers, between_batches) if "accuracy" in self.metrics else None
        found = {}
        for place, (name, number) in enumerate(zip(members, numbers, strict=True)):
            loss = sum(losses[place]) / int(self.split.examples.num_targets.sum())
            metrics = {"loss": loss}
            if "perplexity" in self.metrics:
                metrics["perplexity"] = math.exp(loss) if loss < 700 else math.inf
            if accuracies:
                metrics["accuracy"] = accuracies[place]
            answers = self._answers(engine, number, between_batches)
            if "exact_match" in self.metrics:
                right = [answer.strip() == self._wanted(i).strip() for i, answer in answers.items()]
                metrics["exact_match"] = sum(right) / len(right)
            found[name] = metrics, self._samples(answers)
        return found

    def _samples(self, answers: dict[int, str]) -> list[dict[str, str]]:
        return [
            {"input": self._input(i).strip(), "wanted": self._wanted(i).strip(), "answer": answers[i].strip()}
            for i in sorted(answers)[: self.num_samples]
        ]

    def _answers(self, engine: Engine, member: int, between_batches: Callable[[], None]) -> dict[int, str]:
        """Generated answers: of every row where they are judged, of a few where they are only shown."""
        if self.split.rows.kind == "text":
            return {}
        examples = self.split.examples
        count = len(examples) if "exact_match" in self.metrics else min(self.num_samples, len(examples))
        inputs = [(examples.context_ids(i).tolist(), examples.rest_ids(i).tolist()) for i in range(count)]
        return dict(
            generate_texts(
                engine, self.tokenizer, inputs, max_new_tokens=self.max_new_tokens,
                micro_batch_tokens=self.micro_batch_tokens, member=member, between_batches=between_batches,
            )
        )  # fmt: skip

    def _accuracies(self, engine: Engine, members: list[int], between_batches: Callable[[], None]) -> list[float]:
        """For each member the share of rows whose right label is the likeliest of all."""
        examples, right = self.candidates
        # [labels, members, rows]
        losses = [self._losses(engine, label, members, between_batches) for label in examples]
        return (
            (torch.tensor(losses, dtype=torch.float64).argmin(dim=0) == torch.tensor(right))
            .double()
            .mean(dim=1)
            .tolist()
        )

    def _losses(
        self, engine: Engine, examples: Examples, members: list[int], between_batches: Callable[[], None]
    ) -> list[list[float]]:
        """Summed negative log-likelihood of every example's target, for each member, on every rank."""
        plan = engine.plan([(i, tuple(members)) for i in range(len(examples))], examples, self.micro_batch_tokens)
        mine: list[tuple[tuple[int, int], float]] = []
        for shares in plan:
            units = shares[engine.world.rank]
            batch = collate(examples, shares, engine.world.rank, pad_id(self.tokenizer))
            losses = engine.row_losses(batch).double().tolist()
            readers = [(example, member) for example, some in units for member in some]
            mine += zip(readers, losses[: len(readers)], strict=True)
            between_batches()
        everyone = dict(pair for pairs in gather_from_ranks(mine, engine.world) for pair in pairs)
        return [[everyone[i, member] for i in range(len(examples))] for member in members]

    def _input(self, index: int) -> str:
        return self.tokenizer.decode(self.split.examples.input_ids(index), skip_special_tokens=True)

    def _wanted(self, index: int) -> str:
        ids = self.split.examples.target_ids(index)
        return self.labels[ids[0]] if self.labels else self.tokenizer.decode(ids, skip_special_tokens=True)


def build_evaluator(config: Config, split: Split, reading: Reading) -> Evaluator:
    """The evaluator that config section `evaluate` asks for, over a split. Raises UserError."""
    matched = sorted({"exact_match", "accuracy"} & set(config.evaluate.metrics))
    if matched and split.rows.kind == "text":
        raise UserError(f"evaluate.metrics: {split.rows.name} is plain text without targets for {matched[0]}")
    candidates = None
    encoding = reading.encoding(config)
    if "accuracy" in config.evaluate.metrics:
        candidates = build_label_candidates(config.data, split, encoding)
    return Evaluator(
        split, reading.tokenizer, list(config.evaluate.metrics), micro_batch_tokens=config.train.micro_batch_tokens,
        max_new_tokens=config.evaluate.max_new_tokens, num_samples=config.evaluate.num_samples,
        candidates=candidates, labels=config.data.labels if reading.family.trains_head else None,
    )  # fmt: skip
