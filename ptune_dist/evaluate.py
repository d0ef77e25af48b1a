"""Judge a prompt on held-out rows: loss, perplexity, exact match, accuracy by likelihood.

Floor 5. Rows are shared among the ranks and each is counted once, whatever the world size.
"""

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ptune_dist.data.build import Split, build_label_candidates
from ptune_dist.data.encode import Examples
from ptune_dist.distributed import gather_from_ranks
from ptune_dist.engine import Engine
from ptune_dist.errors import UserError
from ptune_dist.generate import generate_texts, pad_id


@dataclass
class Judge:
    """All that evaluation needs besides the prompt; built once, used at every evaluation."""

    split: Split
    tokenizer: PreTrainedTokenizerBase
    metrics: list[str]
    micro_batch_tokens: int
    max_new_tokens: int
    num_samples: int
    candidates: tuple[list[Examples], list[int]] | None = None
    labels: list[str] | None = None  # an encoder's, whose targets are their numbers

    def __call__(self, engine: Engine) -> tuple[dict[str, float], list[dict[str, str]]]:
        """Metrics, `loss` per supervised token always among them, and some rows' answers. Collective."""
        losses = example_losses(engine, self.split.examples, self.tokenizer, self.micro_batch_tokens)
        loss = sum(losses) / int(self.split.examples.num_targets.sum())
        found = {"loss": loss}
        if "perplexity" in self.metrics:
            found["perplexity"] = math.exp(loss) if loss < 700 else math.inf
        if "accuracy" in self.metrics:
            found["accuracy"] = self._accuracy(engine)
        answers = self._answers(engine)
        if "exact_match" in self.metrics:
            right = [answer.strip() == self._wanted(i).strip() for i, answer in answers.items()]
            found["exact_match"] = sum(right) / len(right)
        samples = [
            {"input": self._input(i).strip(), "wanted": self._wanted(i).strip(), "answer": answers[i].strip()}
            for i in sorted(answers)[: self.num_samples]
        ]
        return found, samples

    def _answers(self, engine: Engine) -> dict[int, str]:
        """Generated answers: of every row where they are judged, of a few where they are only shown."""
        if self.split.rows.kind == "text":
            return {}
        examples = self.split.examples
        count = len(examples) if "exact_match" in self.metrics else min(self.num_samples, len(examples))
        inputs = [examples.input_ids(i).tolist() for i in range(count)]
        return dict(
            generate_texts(
                engine, self.tokenizer, inputs, max_new_tokens=self.max_new_tokens,
                micro_batch_tokens=self.micro_batch_tokens,
            )
        )  # fmt: skip

    def _accuracy(self, engine: Engine) -> float:
        """Share of rows whose right label is the likeliest of all."""
        examples, right = self.candidates
        losses = [example_losses(engine, label, self.tokenizer, self.micro_batch_tokens) for label in examples]
        chosen = torch.tensor(losses, dtype=torch.float64).argmin(dim=0)
        return (chosen == torch.tensor(right)).double().mean().item()

    def _input(self, index: int) -> str:
        return self.tokenizer.decode(self.split.examples.input_ids(index), skip_special_tokens=True)

    def _wanted(self, index: int) -> str:
        ids = self.split.examples.target_ids(index)
        return self.labels[ids[0]] if self.labels else self.tokenizer.decode(ids, skip_special_tokens=True)


def build_judge(config, split: Split, tokenizer: PreTrainedTokenizerBase, family: str) -> Judge:
    """The judge that config section `evaluate` asks for, over a split. Raises UserError."""
    matched = sorted({"exact_match", "accuracy"} & set(config.evaluate.metrics))
    if matched and split.rows.kind == "text":
        raise UserError(f"evaluate.metrics: {split.rows.name} is plain text without targets for {matched[0]}")
    with_labels = "accuracy" in config.evaluate.metrics
    return Judge(
        split, tokenizer, list(config.evaluate.metrics), micro_batch_tokens=config.train.micro_batch_tokens,
        max_new_tokens=config.evaluate.max_new_tokens, num_samples=config.evaluate.num_samples,
        candidates=build_label_candidates(config.data, split, tokenizer, family) if with_labels else None,
        labels=config.data.labels if family == "encoder" else None,
    )  # fmt: skip


def example_losses(
    engine: Engine, examples: Examples, tokenizer: PreTrainedTokenizerBase, micro_batch_tokens: int
) -> list[float]:
    """Summed negative log-likelihood of every example's target, on every rank. Collective."""
    world = engine.world
    mine: list[tuple[int, float]] = []
    for groups in engine.plan(range(len(examples)), examples, micro_batch_tokens):
        indices = groups[world.rank]
        losses = engine.row_losses(engine.collate(examples, indices, pad_id(tokenizer)))
        mine += zip(indices, losses.double().tolist()[: len(indices)], strict=True)
    everyone = dict(pair for pairs in gather_from_ranks(mine, world) for pair in pairs)
    return [everyone[i] for i in range(len(examples))]
