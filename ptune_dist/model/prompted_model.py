"""A frozen base and the prompts that are trained over it: what all families share.

Each token is computed once: virtual tokens that depend on no row once for all rows, a context once for all members and
without gradient, logits at targets only. A reader is one member reading one row.

Shapes: S readers, B rows, T tokens, P virtual tokens, D width, U supervised positions, K members, H hidden size.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ptune_dist.base.layer_parts import LayerParts
from ptune_dist.base.layers import hidden_size
from ptune_dist.base.trained import trained_parameters
from ptune_dist.config.schema import PLACEMENTS_WITH_CONTEXTS
from ptune_dist.data.batches import Batch, Unit, pad_rows
from ptune_dist.data.encode import TokenPair
from ptune_dist.data.examples import Examples
from ptune_dist.distributed.world import to_device
from ptune_dist.errors import UserError
from ptune_dist.model.attention import KeysValues
from ptune_dist.model.decode import Decoder
from ptune_dist.model.entry import Below, Lower, Part, hold_above, join_lists, join_tensors, split_by_start
from ptune_dist.model.head import HeadAtTargets
from ptune_dist.model.layout import text_of
from ptune_dist.model.value_head import TargetScale, ValueHeads
from ptune_dist.objectives.objective import Objective
from ptune_dist.prompts.method import Contribution, Method, OwnTargets
from ptune_dist.prompts.start import BASE

LossOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # an objective's losses or validation_losses


@dataclass(frozen=True)
class Contexts:
    """Contexts to compute, all of which begin with the tokens of `lead`, whose keys/values are known.

    With a `start_layer` they are whole rows, of which only the layers below it read more than the first `lengths`; then
    `lead` are keys/values that those layers read before each row.
    """

    tokens: list[np.ndarray]
    pad_id: int
    lead: KeysValues | None = None
    start_layer: int = 0
    lengths: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Supervised:
    """The supervised positions of a pass and the base's inputs for it.

    rows, places [U]: where the outputs are wanted. targets [U]: token ids. reader [U]: whose each one is. layers:
    within what the base runs, where only some of its layers compute.
    """

    rows: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    reader: np.ndarray
    inputs: dict[str, Any]
    layers: Callable[[], AbstractContextManager[Any]] = nullcontext


class PromptedModel(nn.Module):
    """A base and the prompts over it, with virtual tokens where `placement` puts them. Families subclass it."""

    has_language_head = True
    uses_segments = False  # all texts of a pass are one row without padding
    scores_trees = False  # one pass scores all labels of its rows; else labels follow one by one after `read_inputs`
    needs_empty_contexts = False  # something is computed of a context even where it has no tokens

    base: PreTrainedModel
    prompts: nn.ModuleList  # of Method, one for each member
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
        super().__init__()
        self.base = base
        self._device = torch.device("cpu")  # of what has no prompt; see `place`
        self.prompts = nn.ModuleList(prompts)
        for prompt in prompts:
            prompt.attach(base)
        self.objective = objective
        self.placement = placement
        contributions = contributions_in_eval(prompts)
        self.num_vectors = [contribution.num_vectors for contribution in contributions]
        self.num_prefix = [contribution.num_prefix for contribution in contributions]
        self.start_layers = [contribution.start_layer for contribution in contributions]
        self._layer_parts: LayerParts | None = None
        self._lowers: list[Lower] | None = None
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

    @property
    def device(self) -> torch.device:
        own = next(self.prompts.parameters(), None)
        return self._device if own is None else own.device

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

    def prompt(self, member: int) -> Method:
        """The prompt of a member."""
        return cast(Method, self.prompts[member])  # torch's ModuleList has no type for its items

    def members(self) -> Iterator[Method]:
        """The prompts of all members, in order."""
        return map(self.prompt, range(len(self.prompts)))

    def number_of(self, member: int, task: int = 0) -> int:
        """The number of what a member contributes to rows of a task, among the contributions of all members.

        Raises IndexError for a task that it does not have; a prompt without tasks contributes the same to all rows.
        """
        num_tasks = [prompt.num_tasks for prompt in self.members()]
        own = task if num_tasks[member] > 1 else 0
        if not 0 <= own < num_tasks[member]:
            raise IndexError(f"task {task} of {num_tasks[member]}")
        return sum(num_tasks[:member]) + own

    def by_contribution(self, batch: Batch) -> Batch:
        """The batch with numbers of contributions in place of its readers' members."""
        num_tasks = [prompt.num_tasks for prompt in self.members()]
        if max(num_tasks) == 1:
            return batch
        assert batch.tasks is not None, "rows have tasks where a prompt does"
        pairs = {(member, batch.tasks[row]) for row, member in batch.readers}
        numbers = {pair: self.number_of(*pair) for pair in pairs}
        readers = [(row, numbers[member, batch.tasks[row]]) for row, member in batch.readers]
        return replace(batch, readers=readers, tasks=None)

    def count_tasks(self, units: list[Unit], examples: Examples) -> dict[int, int]:
        """Of each member with tasks, how many of them are those of its examples."""
        with_tasks = {member for member, prompt in enumerate(self.members()) if prompt.num_tasks > 1}
        if not with_tasks:
            return {}
        assert examples.tasks is not None, "rows have tasks where a prompt does"
        read = {(member, int(examples.tasks[example])) for example, some in units for member in some}
        return {member: sum(1 for reader, _ in read if reader == member) for member in with_tasks}

    def read_base(self) -> None:
        """Note what passes need to know of the base's settings; called again where they have changed."""

    def begin_step(self, step: int) -> None:
        """Called before the passes of optimizer step `step`."""
        for prompt in self.members():
            prompt.begin_step(step)

    def trainable(self, member: int = 0) -> dict[str, nn.Parameter]:
        """What is trained and stored of a member, by name: its prompt's parameters and those of a trained head."""
        found = dict(self.prompt(member).named_parameters())
        kind = BASE if self.prompt(member).trains_base else "head."
        found |= {f"{kind}{name}": p for name, p in trained_parameters(self.base).items()}
        if self.value_heads is not None:
            found |= {f"value_head.{name}": p for name, p in self.value_heads[member].named_parameters()}
        return found

    @torch.no_grad()
    def start_base(self) -> None:
        """Set the trained tensors of the base to what `prompt.init_file` held. Raises UserError."""
        for member, prompt in enumerate(self.members()):
            if prompt.base_start is None:
                continue
            own = self.trainable(member)
            for name in own.keys() | prompt.base_start.keys():
                pair = [found.get(name) for found in (own, prompt.base_start)]
                shapes = [None if tensor is None else tuple(tensor.shape) for tensor in pair]
                if shapes[0] != shapes[1]:
                    raise UserError(f"prompt.init_file: {name} has shape {shapes[0]} in this run and {shapes[1]} there")
            for name, parameter in own.items():
                parameter.copy_(prompt.base_start[name])

    # ------------------------------------------------------------- prompts that enter at a later layer

    @property
    def late_starts(self) -> list[int]:
        """The layers, but for the first, at which members' prompts enter."""
        return sorted(set(self.start_layers) - {0})

    def read_prompts(self) -> None:
        """What is known of the prompts' fixed numbers is forgotten: they have changed."""
        self._lowers = None

    @property
    def lowers(self) -> list[Lower]:
        """Of each contribution, how the layers below it read rows."""
        if self._lowers is None:
            dtype = self.no_hidden(0).dtype
            contributions = contributions_in_eval(list(self.members()))
            self._lowers = [Lower.of(contribution, dtype) for contribution in contributions]
        return self._lowers

    @property
    def distinct_lowers(self) -> list[Lower]:
        """Those of the members whose prompts enter late, each once, in the same order on every rank."""
        if not self.late_starts:
            return []
        late = {lower.key: lower for lower, start in zip(self.lowers, self.start_layers, strict=True) if start}
        return [late[key] for key in sorted(late)]

    def below_of(self, batch: Batch, numbers: list[int] | None = None) -> list[torch.Tensor] | None:
        """What the layers below have left of each reader's text, [T - C, H] each; None where there are none.

        `numbers`: of the readers' contributions, where these are known already.
        """
        numbers = numbers or [self.number_of(member) for _, member in batch.readers]
        if not self.start_layers[numbers[0]]:
            return None
        assert batch.below is not None, "the layers below have read the rows"
        pairs = zip(batch.readers, numbers, strict=True)
        return [batch.below[self.lowers[number].key][row].hidden for (row, _), number in pairs]

    def start_of(self, batch: Batch) -> int:
        """The layer at which the prompts of a batch's readers enter; it is one for all in a part of a batch."""
        return self.start_layers[self.number_of(batch.readers[0][1])]

    def lower_of(self, member: int) -> Lower:
        return self.lowers[self.number_of(member)]

    def parts(self, batch: Batch) -> list[Part]:
        """The batch by the layers at which prompts enter."""
        starts = [self.start_layers[self.number_of(member)] for member in range(len(self.prompts))]
        return split_by_start(batch, starts, self._idle_below, with_contexts=self.has_contexts)

    def _idle_below(self, member: int) -> dict[Any, list[Below]]:
        return {self.lower_of(member).key: [Below(self.no_hidden(2))]}

    def read_below(self, batch: Batch) -> Batch:
        """A batch whose readers are of one member, with what the layers below its prompt leave of the rows now."""
        lower = self.lower_of(batch.readers[0][1])
        if not lower.start:
            return batch
        texts, lengths = zip(*[self.row_below(batch, row) for row in range(len(batch.rests))], strict=True)
        work = Contexts(list(texts), batch.pad_id, lower.before, start_layer=lower.start, lengths=list(lengths))
        batch = replace(batch, below={lower.key: [Below.of(tensors) for tensors in self.read_contexts(work)]})
        return hold_above(batch, lower.start) if self.has_contexts else batch

    @property
    def has_contexts(self) -> bool:
        """Whether virtual tokens stand after contexts."""
        return self.placement in PLACEMENTS_WITH_CONTEXTS

    def no_hidden(self, count: int) -> torch.Tensor:
        """Hidden states [count, H] that stand for nothing."""
        dtype = cast(nn.Embedding, self.base.get_input_embeddings()).weight.dtype
        return torch.zeros(count, hidden_size(self.base), dtype=dtype, device=self.device)

    def only_at(self, counts: list[int], start: int) -> list[int]:
        """Counts of the contributions that enter at layer `start`, and 0 for the others."""
        return [n if layer == start else 0 for n, layer in zip(counts, self.start_layers, strict=True)]

    @property
    def layer_parts(self) -> LayerParts:
        """The base's layers, to run some of them. The first use makes a pass: it is collective."""
        if self._layer_parts is None:
            self._layer_parts = LayerParts(self.base)
        if not self._layer_parts.is_known:
            with torch.no_grad():
                self._layer_parts.learn(lambda: self.run_layers(self.no_vectors(1, 1)))
        return self._layer_parts

    def no_vectors(self, *shape: int) -> torch.Tensor:
        """Input embeddings [*shape, D] in place of those that no layer reads."""
        like = cast(nn.Embedding, self.base.get_input_embeddings())
        return torch.zeros(1, dtype=like.weight.dtype, device=self.device).expand(*shape, like.embedding_dim)

    def enter(self, start: int, hidden: torch.Tensor) -> Callable[[], AbstractContextManager[None]]:
        """For `Supervised.layers`: the pass begins with layer `start`, from hidden states [B, T, H]."""
        return functools.partial(self.layer_parts.above, start, hidden)

    def enter_rows(self, asked: Supervised, start: int) -> Supervised:
        """A pass over padded rows with its vectors as the input of layer `start`."""
        hidden = asked.inputs["inputs_embeds"]
        inputs = asked.inputs | {"inputs_embeds": self.no_vectors(*hidden.shape[:2])}
        return replace(asked, inputs=inputs, layers=self.enter(start, hidden))

    def row_below(self, batch: Batch, row: int) -> tuple[np.ndarray, int]:
        """The tokens that the layers below a prompt read of a row, and how many of them are its context."""
        context = batch.contexts[row]
        return np.concatenate([context, text_of(batch, row)]), len(context)

    # ------------------------------------------------------------- what a family provides

    def run_layers(self, vectors: torch.Tensor) -> None:
        """All layers of the base's first stack over input embeddings [B, T, D]."""
        raise NotImplementedError

    def count_positions(self, units: list[Unit], examples: Examples, *, with_contexts: bool = True) -> int:
        """Positions that a micro-batch of these units makes a rank hold at once, padding included."""
        raise NotImplementedError

    def read_contexts(self, work: Contexts) -> list[tuple[torch.Tensor, ...]]:
        """What later positions need of each context, without its lead; without gradient.

        Keys and values [L, C, G, Dh], or the output of a seq2seq base's encoder [C, D].
        """
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

    def contributions(self, start: int | None = None) -> list[Contribution]:
        """What the members add to a pass: for each member and each of its tasks, in this order.

        With `start`, nothing of members whose prompts enter at another layer.
        """
        found: list[Contribution] = []
        for member, prompt in enumerate(self.members()):
            is_in = start is None or self.start_layers[self.number_of(member)] == start
            found += prompt.contributions() if is_in else [Contribution()] * prompt.num_tasks
        return found

    def member_of(self, number: int) -> int:
        """The member whose prompt makes a contribution."""
        return [member for member, prompt in enumerate(self.members()) for _ in range(prompt.num_tasks)][number]

    def prompt_of(self, number: int) -> Method:
        """The prompt that makes a contribution."""
        return self.prompt(self.member_of(number))

    def num_virtual(self, number: int) -> int:
        """The positions of a contribution."""
        return self.prompt_of(number).num_virtual_tokens

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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[virtual tokens, text] for each text: vectors [S, P + T, D] and their mask, padded right.

        `members`: the number of the contribution that each text is read with. `below`: what stands for each text,
        [T, H], where layers below have read it.
        """
        contributions = contributions or self.contributions()
        tokens = self.embed_tokens(np.concatenate(texts), embeddings) if below is None else torch.cat(below)
        virtual = [vectors_of(contribution, tokens) for contribution in contributions]
        parts = tokens.split([len(text) for text in texts])
        rows = [torch.cat([virtual[member], part]) for member, part in zip(members, parts, strict=True)]
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


def contributions_in_eval(prompts: Sequence[Method]) -> list[Contribution]:
    """What the prompts contribute, without gradient and without their random numbers."""
    found: list[Contribution] = []
    for prompt in prompts:
        was_training = prompt.training
        with torch.no_grad():
            found += prompt.eval().contributions()
        prompt.train(was_training)
    return found


def vectors_of(contribution: Contribution, like: torch.Tensor) -> torch.Tensor:
    """A contribution's virtual tokens [P, D] in the dtype of the tokens `like` [T, D]; none are [0, D]."""
    return like[:0] if contribution.vectors is None else contribution.vectors.to(like.dtype)


def keys_values_of(contribution: Contribution) -> KeysValues | None:
    """A contribution's keys and values of every layer."""
    if contribution.keys is None or contribution.values is None:
        return None
    return KeysValues(contribution.keys, contribution.values)


def pick(readers: list[tuple[int, int]], numbers: np.ndarray) -> list[tuple[int, int]]:
    """(row, member) of the readers of these numbers."""
    return [readers[number] for number in numbers]
