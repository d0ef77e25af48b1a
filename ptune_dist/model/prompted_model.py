"""A frozen base and the prompts that are trained over it: what all families share.

Each token is computed once: virtual tokens that depend on no row once for all rows, a context once for all members and
without gradient, logits at targets only. A reader is one member reading one row.

Shapes: S readers, B rows, T tokens, P virtual tokens, D width, U supervised positions, K members, H hidden size.
"""

from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ptune_dist.base.trained import trained_parameters
from ptune_dist.data.batches import Batch, Unit, pad_rows
from ptune_dist.data.encode import TokenPair
from ptune_dist.data.examples import Examples
from ptune_dist.distributed.world import to_device
from ptune_dist.model.decode import Decoder
from ptune_dist.model.entry import join_lists, join_tensors
from ptune_dist.model.head import HeadAtTargets
from ptune_dist.model.late_entry import LateEntry
from ptune_dist.model.members import vectors_of
from ptune_dist.model.passes import LossOf, Supervised
from ptune_dist.model.value_head import TargetScale, ValueHeads
from ptune_dist.objectives.objective import Objective
from ptune_dist.prompts.method import Contribution, Method, OwnTargets
from ptune_dist.prompts.start import BASE


class PromptedModel(LateEntry):
    """A base and the prompts over it, with virtual tokens where `placement` puts them. Families subclass it."""

    has_language_head = True
    uses_segments = False  # all texts of a pass are one row without padding
    scores_trees = False  # one pass scores all labels of its rows; else labels follow one by one after `read_inputs`
    needs_empty_contexts = False  # something is computed of a context even where it has no tokens

    head: HeadAtTargets | None
    value_heads: ValueHeads | None

    def __init__(
        self,
        base: PreTrainedModel,
        prompts: list[Method],
        objective: Objective,
        placement: str = "prefix",
        target_scales: list[TargetScale] | None = None,
    ):
        """`target_scales`: of each member, where the objective's targets are numbers."""
        super().__init__(base, prompts, placement)
        self.objective = objective
        self.target_scales = target_scales or [TargetScale()] * len(prompts)
        self.head = HeadAtTargets(base) if self.has_language_head else None
        self.value_heads = None
        self.adapted_attentions: list[nn.Module] = []  # of all layers, where a member has adapter tokens
        if self.predicts_numbers and self.has_language_head:
            self.value_heads = ValueHeads(base, len(prompts))

    @property
    def predicts_numbers(self) -> bool:
        return self.objective.target == "number"

    @property
    def writes_text(self) -> bool:
        """Whether answers are generated token by token; else they are labels or numbers."""
        return self.has_language_head and not self.predicts_numbers

    def place(self, device: torch.device) -> None:
        """Move what is trained to the device; the base is there already, or sharded."""
        self._device = device
        self.prompts.to(device)
        if self.value_heads is not None:
            self.value_heads.to(device)

    def train(self, mode: bool = True) -> "PromptedModel":
        """The prompts follow `mode`; the base never leaves eval mode."""
        super().train(mode)
        self.base.eval()
        return self

    def read_base(self) -> None:
        """Note what passes need to know of the base's settings; called again where they have changed."""

    def trainable(self, member: int = 0) -> dict[str, nn.Parameter]:
        """What is trained and stored of a member, by name: its prompt's parameters and those of a trained head."""
        found = dict(self.prompt(member).named_parameters())
        kind = BASE if self.prompt(member).trains_base else "head."
        found |= {f"{kind}{name}": p for name, p in trained_parameters(self.base).items()}
        if self.value_heads is not None:
            found |= {f"value_head.{name}": p for name, p in self.value_heads[member].named_parameters()}
        return found

    # ------------------------------------------------------------- what a family provides

    def count_positions(self, units: list[Unit], examples: Examples, *, with_contexts: bool = True) -> int:
        """Positions that a micro-batch of these units makes a rank hold at once, padding included."""
        raise NotImplementedError

    def prepare(self, batch: Batch) -> Any:
        """A plan of the pass, for `batch.prepared`; None: there is nothing to plan ahead. May run in any thread."""
        return None

    def supervise(self, batch: Batch) -> Supervised:
        """The pass that a batch asks for, as it was prepared or, where it was not, planned now."""
        raise NotImplementedError

    def generate(self, inputs: list[TokenPair], number: int, options: dict[str, Any]) -> torch.Tensor:
        """New token ids [B, T] of inputs, each (context, rest); `options` are those of the base's own `generate`.

        `number`: of the contribution, see `number_of`; so below.
        """
        raise NotImplementedError

    def open_decoder(self, number: int) -> Decoder | None:
        """What answers rows that come and go; None where whole batches are answered by `generate`."""
        return None

    def open_bank_decoder(self) -> Decoder | None:
        """As `open_decoder`, of rows that are read with different prompts, each with the number of its reader."""
        return None

    def count_before_answer(self, num_virtual: int, num_tokens: int) -> int:
        """Positions that stand before the first token of an answer, of those whose number may be limited."""
        raise NotImplementedError

    def name_labels(self, texts: list[np.ndarray], number: int) -> list[str]:
        """The likeliest label of each text, of a base with a classification head."""
        raise NotImplementedError

    # ------------------------------------------------------------- losses and values

    def losses(self, batch: Batch, *, for_validation: bool = False) -> torch.Tensor:
        """The summed loss of each reader's targets, [S] in float32."""
        loss_of = self.objective.validation_losses if for_validation else self.objective.losses
        parts = self.parts(batch)
        found = []
        for part in parts:
            losses, reader = self._losses(part.batch, loss_of, with_own=not for_validation)
            found.append(self.sum_by(losses, reader, len(part.batch.readers)))
        return join_tensors(found, parts)

    def _losses(self, batch: Batch, loss_of: LossOf, *, with_own: bool = False) -> tuple[torch.Tensor, np.ndarray]:
        """Losses [U], and the number of each one's reader; `with_own`: with those of the prompts' own targets."""
        if self.predicts_numbers:
            return self._number_losses(batch, loss_of)
        asked = self.supervise(batch)
        assert self.head is not None, "families without a language head compute their own losses"
        if not with_own or not any(self.own_targets(member) for member in range(len(self.prompts))):
            return self.head.losses(asked, loss_of), asked.reader
        asked, weights = self._supervise_prompts(asked, batch)
        return self.head.losses(asked, loss_of) * weights, asked.reader

    def own_targets(self, member: int) -> OwnTargets | None:
        """What training predicts of a member's prompt itself, for each row that is read with it."""
        return None if self.predicts_numbers else self.prompt(member).own_targets

    def _supervise_prompts(self, asked: Supervised, batch: Batch) -> tuple[Supervised, torch.Tensor]:
        """The pass with the prompts' own targets too, as those of each member's first reader, and weights [U].

        A prompt is read once for all its readers with targets, so its targets weigh as many times as there are any.
        Virtual tokens stand before all texts: in one row of segments those of members one after another, else in each
        reader's own row.
        """
        rows, places, tokens, readers, weights = [asked.rows], [asked.places], [asked.targets], [asked.reader], []
        weights.append(torch.ones(len(asked.reader), device=asked.rows.device))
        first_place = 0
        for member in sorted({member for _, member in batch.readers}):
            own = self.own_targets(member)
            mine = [i for i, (_, reader) in enumerate(batch.readers) if reader == member]
            if own is not None:
                count = sum(1 for i in mine if len(batch.targets[batch.readers[i][0]]))
                row = 0 if self.uses_segments else mine[0]
                rows.append(self.to_tensor(np.full(len(own.places), row)))
                places.append(self.to_tensor(first_place + np.array(own.places)))
                tokens.append(self.to_tensor(np.array(own.tokens)))
                readers.append(np.full(len(own.places), mine[0]))
                weights.append(to_device(torch.tensor(own.weights) * count, self.device))
            if self.uses_segments:
                numbers = range(self.number_of(member), self.number_of(member) + self.prompt(member).num_tasks)
                used = {number for _, number in self.by_contribution(batch).readers}
                first_place += sum(self.num_vectors[number] for number in numbers if number in used)
        found = replace(
            asked,
            rows=torch.cat(rows),
            places=torch.cat(places),
            targets=torch.cat(tokens),
            reader=np.concatenate(readers),
        )
        return found, torch.cat(weights)

    def outputs(self, batch: Batch) -> torch.Tensor:
        """What the base check compares of a pass, [U]: the validation losses of single targets, or logits."""
        (part,) = self.parts(batch)
        return self._losses(part.batch, self.objective.validation_losses)[0]

    def plain_outputs(self, batch: Batch, virtual: np.ndarray) -> torch.Tensor:
        """`outputs` as the base's own forward gives them of token ids, each row alone.

        The tokens `virtual` [P] stand where the virtual tokens stand in our pass.
        """
        raise NotImplementedError

    def label_losses(self, batch: Batch) -> list[np.ndarray]:
        """Each reader's summed losses of the labels of its row's tree, in one pass without gradient."""
        parts = self.parts(batch)
        return join_lists([self._label_losses(part.batch) for part in parts], parts)

    def _label_losses(self, batch: Batch) -> list[np.ndarray]:
        raise NotImplementedError

    def read_inputs(self, batch: Batch) -> Batch:
        """The batch with what its readers' inputs leave, so that targets after them cost only themselves."""
        return batch

    def _number_losses(self, batch: Batch, loss_of: LossOf) -> tuple[torch.Tensor, np.ndarray]:
        predicted, reader = self._predict(batch)
        wanted = []
        for row, member in pick(batch.readers, reader):
            number = batch.numbers[row] if batch.numbers else None
            assert number is not None, "every row of a regression has a number"
            wanted.append(self.target_scales[member].standardize(number))
        return loss_of(predicted, to_device(torch.tensor(wanted, dtype=torch.float32), predicted.device)), reader

    def values(self, batch: Batch) -> list[float]:
        """Each reader's predicted number, in the original unit of the targets."""
        parts = self.parts(batch)
        return join_lists([self._values(part.batch) for part in parts], parts)

    def _values(self, batch: Batch) -> list[float]:
        numbers, reader = self._predict(batch)
        members = [member for _, member in pick(batch.readers, reader)]
        scaled = zip(members, numbers.tolist(), strict=True)
        return [self.target_scales[member].restore(number) for member, number in scaled]

    def _predict(self, batch: Batch) -> tuple[torch.Tensor, np.ndarray]:
        """Standardized numbers [U] in float32 and each one's reader."""
        asked = self.supervise(batch)
        assert self.head is not None and self.value_heads is not None
        members = self.to_tensor(np.array([member for _, member in pick(batch.readers, asked.reader)], np.int64))
        return self.value_heads.predict(self.head.hidden(asked), members), asked.reader

    # ------------------------------------------------------------- parts of passes

    def generate_with_base(self, **inputs: Any) -> torch.Tensor:
        """Token ids [B, T] from the base's own `generate`."""
        # transformers gives `generate` to the classes that can generate; the type of `base` is that of all models.
        return cast(Any, self.base).generate(**inputs)

    def embed_tokens(self, tokens: np.ndarray | torch.Tensor, embeddings: nn.Module | None = None) -> torch.Tensor:
        """[len(tokens), D] of token ids on the host, or on the model's device."""
        ids = tokens if isinstance(tokens, torch.Tensor) else self.to_tensor(tokens)
        return (embeddings or self.base.get_input_embeddings())(ids[None])[0]

    def embed(
        self,
        texts: list[np.ndarray],
        members: list[int],
        contributions: list[Contribution] | None = None,
        embeddings: nn.Module | None = None,
        below: list[torch.Tensor] | None = None,
        num_input: list[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[virtual tokens, text] for each text: vectors [S, P + T, D] and their mask, padded right.

        `members`: the number of the contribution that each text is read with. `below`: what stands for each text,
        [T, H], where layers below have read it. `num_input`: of each text, its tokens that are input; left out: all.
        """
        contributions = contributions or self.contributions()
        tokens = self.embed_tokens(np.concatenate(texts), embeddings) if below is None else torch.cat(below)
        virtual = [vectors_of(contribution, tokens) for contribution in contributions]
        parts = tokens.split([len(text) for text in texts])
        own = self.vectors_for(members, below, num_input or [len(text) for text in texts])
        before = [
            vectors_of(own[reader], tokens) if reader in own else virtual[member]
            for reader, member in enumerate(members)
        ]
        rows = [torch.cat(pair) for pair in zip(before, parts, strict=True)]
        mask = pad_rows([np.ones(len(row)) for row in rows], 0)[0]
        # Zero: under ZeRO-3 every rank needs the same backward pass, whichever members its rows are for.
        unread = sum(vectors[:0].sum() for vectors in virtual)
        return pad_sequence(rows, batch_first=True) + unread, self.to_tensor(mask)

    def supervise_rows(self, batch: Batch, starts: list[int], **inputs: Any) -> Supervised:
        """Targets whose first is predicted at position `starts` of each reader's own row."""
        targets = [batch.targets[row] for row, _ in batch.readers]
        reader = np.repeat(np.arange(len(targets)), [len(target) for target in targets])
        places = [start + np.arange(len(target)) for start, target in zip(starts, targets, strict=True)]
        return Supervised(
            rows=self.to_tensor(reader),
            places=self.to_tensor(np.concatenate(places)),
            targets=self.to_tensor(np.concatenate(targets)),
            reader=reader,
            inputs=inputs,
        )

    def sum_by(self, values: torch.Tensor, groups: np.ndarray, num_groups: int) -> torch.Tensor:
        """Sums [num_groups] of values [N], whose groups [N] are whole numbers: the same bits in every run.

        `index_add` adds in any order on CUDA.
        """
        if (groups[1:] < groups[:-1]).any():
            order = np.argsort(groups, kind="stable")
            values = values[self.to_tensor(order)]
        lengths = self.to_tensor(np.bincount(groups, minlength=num_groups))
        return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)  # safe: it would wait for the GPU

    def to_tensor(self, array: np.ndarray) -> torch.Tensor:
        """Whole numbers on the model's device."""
        return to_device(torch.from_numpy(np.asarray(array, np.int64)), self.device)


def pick(readers: list[tuple[int, int]], numbers: np.ndarray) -> list[tuple[int, int]]:
    """(row, member) of the readers of these numbers."""
    return [readers[number] for number in numbers]
