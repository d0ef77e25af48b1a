"""The engine: a base and the prompts over it in, training steps out.

DeepSpeed shards the base and gathers it for each pass; the prompts are outside DeepSpeed, in `optim.prompt_state`.
Nothing above this file knows that DeepSpeed exists.
"""

import copy
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError

from ptune_dist.base.layers import layers_of
from ptune_dist.base.recompute import Recomputer, read_settings
from ptune_dist.base.trained import set_apart
from ptune_dist.config.deepspeed_json import show_source, zero_stage
from ptune_dist.config.schema import Config, TrainConfig
from ptune_dist.data.batches import Batch, Plan, Unit, plan_micro_batches
from ptune_dist.data.blocks import cut_into_blocks
from ptune_dist.data.examples import Examples
from ptune_dist.distributed.world import World
from ptune_dist.errors import UserError
from ptune_dist.model.context_cache import ContextCache
from ptune_dist.model.contexts import ContextReader
from ptune_dist.model.flops import UnitFlops
from ptune_dist.model.passes import Contexts
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.model.trained_starts import start_trained
from ptune_dist.optim.loss_scale import build_loss_scale
from ptune_dist.optim.optimizer import build_torch_optimizer
from ptune_dist.optim.prompt_state import Measured, Member, PromptState
from ptune_dist.zero.passes import Passes, ShardedPasses, WholePasses
from ptune_dist.zero.setup import quiet_deepspeed
from ptune_dist.zero.unused_sections import describe_unused

T = TypeVar("T")
# On a CPU, tensors of more positions leave its caches, and glibc returns those above 32 MiB to the kernel each time: a
# pass of 13,500 positions took 1.1 to 1.3 times as long as its parts of 3,400 (bases of width 512 and 256). A step of a
# sweep of 8 prefixes over a base of width 512 took 10.44 s with at most 4,096, 10.26 s with 2,048, 10.42 s with 1,024.
MOST_POSITIONS_ON_CPU = 2048


class Engine:
    """A base, the prompts over it and their training state."""

    def __init__(
        self,
        model: PromptedModel,
        passes: Passes,
        prompts: PromptState,
        world: World,
        stage: int,
        recomputer: Recomputer | None = None,
        cache: ContextCache | None = None,
    ):
        self.model = model
        self.prompts = prompts
        self.world = world
        self.stage = stage  # of ZeRO, as DeepSpeed's JSON asks for it
        self.recomputer = recomputer
        self.gathers = passes.gathers
        self.members = list(prompts.members)
        self.is_sharded = passes.is_sharded
        self._passes = passes
        self._flops = UnitFlops(model)
        self.contexts = ContextReader(self._read_contexts, model, world, cache=cache, is_sharded=passes.is_sharded)

    def prepare(self, batch: Batch) -> Batch:
        """The batch with what can be planned of its pass ahead of it. Called in any thread."""
        batch = self.contexts.plan(batch)
        return replace(batch, prepared=self.model.prepare(batch))

    def accumulate(self, batch: Batch, *, scales: torch.Tensor) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns each member's summed loss [K].

        `scales` [K] are 1 / the divisor of each member's whole step, over all ranks. Gradients are summed over ranks by
        `measure`. Collective: every rank must call.
        """
        # One pass for contexts and losses: where they took turns, ZeRO-3 would never see the same pass twice in a row.
        losses = self._passes.run(lambda: self.model.losses(self.contexts.hold(batch)))
        members = np.array([member for _, member in batch.readers])
        total = self.model.sum_by(losses, members, len(self.members))
        # Weights first: one member's sum that is not a number leaves the others' gradients as they are.
        self._passes.backward(self.prompts.scale((total * scales).sum()))
        return total.detach()

    def drop_gradients(self) -> None:
        """Forget what `accumulate` has summed since the last step, and memory that passes have left unused."""
        self.prompts.clear_gradients()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure(self, names: Sequence[str], totals: torch.Tensor) -> Measured:
        """Sum members' gradients and all losses [K] over the ranks; the numbers that decide how to step. Collective."""
        return self.prompts.measure(names, totals)

    def take_sums(self, names: Sequence[str], totals: torch.Tensor) -> torch.Tensor:
        """This rank's gradients of the members that are named, which are cleared, and then all losses [K]."""
        return torch.cat([self.prompts.take_sums(names), totals])

    def count_sums(self, names: Sequence[str]) -> int:
        """How many numbers `take_sums` gives."""
        return len(self.members) + sum(p.numel() for name in names for p in self.prompts.members[name].parameters)

    def measure_sums(self, names: Sequence[str], sums: torch.Tensor) -> Measured:
        """`measure`, where the sums over all ranks are given, in the form of `take_sums`."""
        return self.prompts.measure_sums(names, sums)

    def step(self, learning_rates: dict[str, float], norms: dict[str, float]) -> dict[str, str]:
        """Move the members that are named, each by its own learning rate; what went wrong, by member.

        `norms` are those of `measure`. Every rank must call.
        """
        return self.prompts.move(learning_rates, norms)

    def grad_norm(self, member: str) -> float:
        """The norm of a member's gradient in its last step, before clipping."""
        return self.prompts.members[member].grad_norm

    def row_losses(self, batch: Batch) -> torch.Tensor:
        """The validation loss of each reader [S], without gradient. Collective: every rank must call."""
        return self.without_gradient(lambda: self.model.losses(self._hold_unread(batch), for_validation=True))

    def row_label_losses(self, batch: Batch) -> list[np.ndarray]:
        """The validation losses of each reader's labels, without gradient. Collective: every rank must call."""
        return self.without_gradient(lambda: self.model.label_losses(self.contexts.hold(batch)))

    def read_inputs(self, batch: Batch) -> Batch:
        """The batch with what its inputs leave, for targets that follow. Collective: every rank must call."""
        return self.without_gradient(lambda: self.model.read_inputs(self.contexts.hold(batch)))

    def row_values(self, batch: Batch) -> list[float]:
        """Each reader's predicted number, in the unit of the data. Collective: every rank must call."""
        return self.without_gradient(lambda: self.model.values(self.contexts.hold(batch)))

    def _hold_unread(self, batch: Batch) -> Batch:
        """With its contexts, unless its inputs are read already."""
        return batch if batch.read is not None else self.contexts.hold(batch)

    def _read_contexts(self, contexts: Contexts) -> list[tuple[torch.Tensor, ...]]:
        return self.without_gradient(lambda: self.model.read_contexts(contexts))

    def _read_start(self, contexts: Contexts) -> tuple[torch.Tensor, ...]:
        return self.without_gradient(lambda: self.model.read_start(contexts))

    def read_starts(self) -> None:
        """Give every prompt that starts from what the base computes of a text those numbers.

        They are rank 0's on every rank. Collective: every rank must call.
        """
        known: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for prompt in self.model.members():
            tokens = list(prompt.start_tokens)
            if not tokens:
                continue
            key = (prompt.reads_layer, *tokens)
            if key not in known:
                ids = [np.array(tokens, np.int32)]
                contexts = Contexts(ids, pad_id=tokens[0], start_layer=prompt.reads_layer, lengths=[0])
                known[key] = [part.float().contiguous() for part in self._read_start(contexts)]
                if self.world.size > 1:
                    for part in known[key]:
                        dist.broadcast(part, 0)
            try:
                prompt.begin_from(*known[key])
            except ValueError as error:
                raise UserError(str(error)) from None
        self.model.read_prompts()

    def without_gradient(self, work: Callable[[], T]) -> T:
        """What `work` computes of the base, with the prompts in eval mode. Collective: every rank must call."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            found = self._passes.run(work)
        self.model.train(was_training)
        return found

    def prompt_tensors(self, member: str) -> dict[str, torch.Tensor]:
        """A member's trainable tensors, whole, float32, on the CPU."""
        return self.prompts.members[member].tensors()

    def load_prompts(self, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        """Set every member's trainable tensors."""
        for prompt, (name, member) in zip(self.model.members(), self.prompts.members.items(), strict=True):
            member.load_tensors(prompt.take(tensors[name]))
        self.model.read_prompts()

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """The torch optimizers' tensors by `MEMBER/TENSOR.KEY`, whole, on the CPU."""
        return self.prompts.optimizer_state()

    def load_optimizer_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set what `optimizer_state` gave, at any world size and stage."""
        self.prompts.load_optimizer_state(tensors)

    def loss_scale_state(self) -> dict[str, float]:
        """The numbers of fp16's loss scale, for an exact resume; empty in other precisions."""
        return self.prompts.loss_scale.state() if self.prompts.loss_scale else {}

    def load_loss_scale_state(self, state: dict[str, float]) -> None:
        """Set what `loss_scale_state` gave; ignored where this precision has no loss scale."""
        if self.prompts.loss_scale:
            self.prompts.loss_scale.load_state(state)

    def divisor(self, member: str, num_targets: np.ndarray) -> float:
        """What a member's summed loss is divided by; `num_targets` are those of a whole step's examples."""
        own = self.model.own_targets(self.members.index(member))
        return self.model.objective.divisor(num_targets + (len(own.tokens) if own else 0))

    def plan(self, units: Sequence[Unit], examples: Examples, micro_batch_tokens: int) -> Plan:
        """Micro-batches of every rank, by the positions that this base and placement need."""
        return plan_micro_batches(
            units,
            functools.partial(self.model.count_positions, examples=examples),
            world_size=self.world.size,
            micro_batch_tokens=self.cap_positions(micro_batch_tokens),
            work=self._work(examples),
            flops=functools.partial(self._flops, examples=examples),
            members_share=self._shares_rows,
        )

    def cut(self, units: Sequence[Unit], examples: Examples, num_blocks: int) -> list[list[Unit]]:
        """A step's units in so many blocks of similar work, the same whatever ranks there are."""
        count = functools.partial(self.model.count_positions, examples=examples)
        return cut_into_blocks(units, count, num_blocks, work=self._work(examples), members_share=self._shares_rows)

    def plan_block(self, units: Sequence[Unit], examples: Examples, micro_batch_tokens: int) -> list[list[Unit]]:
        """The micro-batches of a block, which one rank computes."""
        if not units:
            return []
        plan = plan_micro_batches(
            units,
            functools.partial(self.model.count_positions, examples=examples),
            world_size=1,
            micro_batch_tokens=self.cap_positions(micro_batch_tokens),
            members_share=self._shares_rows,
        )
        return [shares[0] for shares in plan]

    def cap_positions(self, micro_batch_tokens: int) -> int:
        """The most positions of a micro-batch here."""
        if self.world.device.type == "cpu" and not self._members_share_work:
            return min(micro_batch_tokens, MOST_POSITIONS_ON_CPU)
        return micro_batch_tokens

    def _work(self, examples: Examples) -> Callable[[list[Unit]], int] | None:
        """The positions that units take where their contexts are held already; None where none are kept."""
        if self.contexts.cache is None:
            return None
        return functools.partial(self.model.count_positions, examples=examples, with_contexts=False)

    @property
    def _shares_rows(self) -> bool:
        """Whether members that read a row in one micro-batch share work, now or by the cache."""
        return self.contexts.cache is not None or self._members_share_work

    @property
    def _members_share_work(self) -> bool:
        """Whether members that read a row in one pass share work: its context, or what the layers below leave.

        Then a row is read by all of its members together, and ranks have even work only in large passes. Gathers of
        ZeRO-3 do not count: the layers' work on thousands of positions takes far longer on a CPU.
        """
        return self.model.has_contexts or bool(self.model.late_starts)

    @property
    def skipped_steps(self) -> int:
        """Steps that fp16 overflow skipped."""
        return self.prompts.skipped_steps


WRONG_TYPE = (AttributeError, TypeError, LookupError)
ALWAYS_SET = {"gradient_clipping", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
# Where DeepSpeed's own checks look, by the name of the check.
SECTION_OF = {
    "DeepSpeedZeroConfig": ["zero_optimization"],
    "DeepSpeedFP16Config": ["fp16"],
    "DeepSpeedBF16Config": ["bf16"],
}


def check_with_deepspeed(content: dict[str, Any], source: Any) -> None:
    """Raise UserError for what DeepSpeed itself refuses in its JSON; `source` is the config's `deepspeed`.

    An error that DeepSpeed raises without any section of the user's is ours, and is raised as it is.
    """
    quiet_deepspeed()
    file = show_source(source)
    try:
        DeepSpeedConfig(copy.deepcopy(content))
    except Exception as error:  # of any kind: DeepSpeed takes the types of many values for granted
        section = find_refused(content)
        if section is None:
            raise
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            where = ".".join([*SECTION_OF.get(error.title, []), *map(str, first["loc"])])
            raise UserError(f"{file}: DeepSpeed refuses {where}: {first['msg']}, got {first['input']!r}") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, WRONG_TYPE):  # its message is about Python
            reason = f"a value in it has a type that DeepSpeed does not take: {json.dumps(content[section])[:200]}"
        raise UserError(f"{file}: DeepSpeed refuses {section}: {reason}") from None


def find_refused(content: dict[str, Any]) -> str | None:
    """The first section that DeepSpeed refuses; None where it refuses even what this package always sets."""
    taken: dict[str, Any] = {}
    for key in sorted(content, key=lambda name: name not in ALWAYS_SET):
        taken[key] = content[key]
        if not ALWAYS_SET <= taken.keys():
            continue
        try:
            DeepSpeedConfig(copy.deepcopy(taken))
        except Exception:  # of any kind, as above
            return None if key in ALWAYS_SET else key
    return None


def build_engine(
    model: PromptedModel,
    configs: dict[str, Config],
    content: dict[str, Any],
    world: World,
    *,
    cache: ContextCache | None = None,
) -> Engine:
    """An engine over a model whose base is sharded already where DeepSpeed's filled JSON asks for stage 3.

    `configs` are the members' own, in the order of the model's prompts. Collective. Raises UserError.
    """
    first = next(iter(configs.values()))
    set_apart(model.base, world.device, getattr(torch, first.model.dtype))
    model.place(world.device)
    start_trained(model)
    members = {
        name: build_member(configs[name].train, model.trainable(number), dict(model.prompt(number).named_buffers()))
        for number, name in enumerate(configs)
    }
    layers = layers_of(model.base)
    settings = read_settings(content, len(layers), "deepspeed")
    recomputer = Recomputer(settings, layers) if settings else None
    note = describe_unused(content)
    if note and world.is_main:
        print(note, flush=True)
    stage = zero_stage(content)
    passes = ShardedPasses(model.base, layers, content) if stage == 3 else WholePasses()
    state = PromptState(members, world, build_loss_scale(content))
    return Engine(model, passes, state, world, stage, recomputer, cache)


def build_member(train: TrainConfig, named: dict[str, torch.nn.Parameter], fixed: dict[str, torch.Tensor]) -> Member:
    """A member with the optimizer that config section `train` asks for; `fixed` as in `Member`."""
    return Member(named, build_torch_optimizer(train, list(named.values())), train.max_grad_norm, fixed)
