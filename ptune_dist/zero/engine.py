"""The DeepSpeed seam: a model and its prompt in, training steps out.

Floor 4. DeepSpeed shards the base, casts, scales the loss, reduces gradients and calls our optimizer; nothing above
this file knows that it exists.
"""

import copy
from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from pydantic import ValidationError

from ptune_dist.base.layers import layers_of
from ptune_dist.base.recompute import Recomputer, read_settings
from ptune_dist.config.deepspeed_json import zero_stage
from ptune_dist.data.batches import Batch, Plan, Unit, plan_micro_batches
from ptune_dist.data.encode import Examples
from ptune_dist.distributed.world import World
from ptune_dist.errors import UserError
from ptune_dist.model.context_cache import ContextCache
from ptune_dist.model.contexts import ContextReader
from ptune_dist.model.prompted_model import Contexts, PromptedModel
from ptune_dist.optim.optimizer import Member, PromptOptimizer, build_torch_optimizer
from ptune_dist.zero.gathers import watch_gathers
from ptune_dist.zero.resident import keep_resident


class Engine:
    """A PromptedModel under DeepSpeed: a base and the members of its bank."""

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, optimizer: PromptOptimizer, world: World, stage: int,
        recomputer: Recomputer | None, cache: ContextCache | None,
    ):  # fmt: skip
        self._engine, self._optimizer, self.world, self.stage = engine, optimizer, world, stage
        self.model: PromptedModel = engine.module
        self.recomputer, self.gathers = recomputer, watch_gathers()
        self.members = list(optimizer.members)
        self.contexts = ContextReader(self._without_gradient, self.model, world, cache=cache, is_sharded=stage == 3)

    def accumulate(self, batch: Batch, *, scales: Sequence[float], is_last: bool) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns each member's summed negative log-likelihood [K].

        `scales` are, for each member, 1 / supervised tokens of its whole step, over all ranks. DeepSpeed averages
        gradients over ranks, so the loss is multiplied by their number. Collective: every rank must call.
        """
        batch = self.contexts.hold(batch)
        self._engine.set_gradient_accumulation_boundary(is_last)
        losses = self._engine(batch)
        reader = torch.tensor([member for _, member in batch.readers], device=losses.device)
        total = losses.new_zeros(len(self.members)).index_add(0, reader, losses)
        # Weights first: one member's sum that is not a number leaves the others' gradients as they are.
        self._engine.backward((total * total.new_tensor(scales)).sum() * self.world.size)
        return total.detach()

    def step(self, learning_rates: dict[str, float]) -> dict[str, str]:
        """Move the members that are named, each by its own learning rate; what went wrong, by member. Collective."""
        for name, member in self._optimizer.members.items():
            member.moves, member.fault = name in learning_rates, None
            for group in member.torch_optimizer.param_groups if member.moves else ():
                group["lr"] = learning_rates[name]
        self._engine.step()
        return {name: member.fault for name, member in self._optimizer.members.items() if member.fault}

    def grad_norm(self, member: str) -> float:
        """The norm of a member's gradient in the last step, before clipping."""
        return self._optimizer.members[member].grad_norm

    def row_losses(self, batch: Batch) -> torch.Tensor:
        """Negative log-likelihood per reader [S], without gradient. Collective: every rank must call."""
        return self._without_gradient(self.contexts.hold(batch))

    def _without_gradient(self, work: Batch | Contexts) -> Any:
        was_training = self._engine.training
        self._engine.eval()
        with torch.no_grad():
            found = self._engine(work)
        self._engine.train(was_training)
        return found

    def prompt_tensors(self, member: str) -> dict[str, torch.Tensor]:
        """A member's trainable tensors, whole, float32, on the CPU."""
        found = self._optimizer.members[member]
        return {name: p.detach().cpu().clone() for name, p in zip(found.names, found.whole, strict=True)}

    def load_prompts(self, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        """Set members' trainable tensors, in DeepSpeed's masters and in what the model reads. Collective."""
        masters = self._masters()
        for number, (name, member) in enumerate(self._optimizer.members.items()):
            parameters = list(self.model.trainable(number).values())
            gathered = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=self.stage == 3)
            with torch.no_grad(), gathered:
                for key, whole, parameter in zip(member.names, member.whole, parameters, strict=True):
                    whole.copy_(tensors[name][key])
                    parameter.data.copy_(whole)
            assert masters or (self.stage == 0 and parameters[0].dtype == torch.float32), "no masters are found"
            if masters:
                self._optimizer.write_back(member, masters[number])

    def _masters(self) -> list[list[torch.Tensor]]:
        """This rank's float32 master weights of each member; none where the model's own are the masters."""
        inner = self._engine.optimizer
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(inner, name):
                flat = getattr(inner, name)
                assert len(flat) == len(self.members), "DeepSpeed has one flat tensor for each member"
                return [[part] for part in flat]
        return [list(group) for group in inner.fp32_groups] if hasattr(inner, "fp32_groups") else []

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """The torch optimizers' tensors by `MEMBER/TENSOR.KEY`, whole, on the CPU."""
        return {
            f"{name}/{key}": tensor for name, member in self._optimizer.members.items()
            for key, tensor in member.state().items()
        }  # fmt: skip

    def load_optimizer_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set what `optimizer_state` gave, at any world size and stage."""
        for name, member in self._optimizer.members.items():
            own = {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
            member.load_state(own)

    def loss_scale_state(self) -> dict[str, float]:
        """The numbers of fp16's dynamic loss scale, for an exact resume; empty in other precisions."""
        scaler = self._loss_scaler()
        return {k: v for k, v in vars(scaler).items() if k in LOSS_SCALE_KEYS} if scaler else {}

    def load_loss_scale_state(self, state: dict[str, float]) -> None:
        scaler = self._loss_scaler()
        if scaler is not None:
            vars(scaler).update({k: v for k, v in state.items() if k in vars(scaler)})

    def _loss_scaler(self) -> Any:
        """Where DeepSpeed keeps it: ZeRO in `loss_scaler`, stage 0 in `loss_scale_config`."""
        if not self._engine.fp16_enabled():
            return None
        inner = self._engine.optimizer
        return getattr(inner, "loss_scaler", None) or getattr(inner, "loss_scale_config", None)

    def plan(self, units: Sequence[Unit], examples: Examples, micro_batch_tokens: int) -> Plan:
        """Micro-batches of every rank, by the positions that this base and placement need."""
        model, is_cached = self.model, self.contexts.cache is not None
        return plan_micro_batches(
            units, lambda some: model.count_positions(some, examples), world_size=self.world.size,
            micro_batch_tokens=micro_batch_tokens,
            work=(lambda some: model.count_positions(some, examples, with_contexts=False)) if is_cached else None,
        )  # fmt: skip

    @property
    def skipped_steps(self) -> int:
        """Steps that fp16 overflow skipped."""
        return self._engine.skipped_steps


# Where DeepSpeed's own checks look, by the name of the check.
SECTION_OF = {
    "DeepSpeedZeroConfig": ["zero_optimization"],
    "DeepSpeedFP16Config": ["fp16"],
    "DeepSpeedBF16Config": ["bf16"],
}
LOSS_SCALE_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def check_with_deepspeed(content: dict[str, Any], source: Any) -> None:
    """Raise UserError for what DeepSpeed itself refuses in its JSON; `source` is the config's `deepspeed`."""
    file = source if isinstance(source, str) else "deepspeed"
    try:
        DeepSpeedConfig(copy.deepcopy(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([*SECTION_OF.get(error.title, []), *map(str, first["loc"])])
        raise UserError(f"{file}: DeepSpeed refuses {where}: {first['msg']}, got {first['input']!r}") from None
    except (AssertionError, ValueError, TypeError, DeepSpeedConfigError) as error:
        raise UserError(f"{file}: DeepSpeed refuses it: {error}") from None


def build_engine(
    configs: dict[str, Any], base, prompts: dict[str, torch.nn.Module], content: dict[str, Any], world: World, *,
    family: str, cache: ContextCache | None = None,
) -> Engine:  # fmt: skip
    """Put base and prompts under DeepSpeed as its filled JSON asks; `configs` are the members' own. Collective.

    Raises UserError.
    """
    stage, first = zero_stage(content), next(iter(configs.values()))
    model = PromptedModel(base, list(prompts.values()), family, first.prompt.placement)
    named = {name: model.trainable(number) for number, name in enumerate(prompts)}
    members = {name: build_member(configs[name].train, tensors, world.device) for name, tensors in named.items()}
    for tensors in named.values():
        for parameter in tensors.values():  # DeepSpeed casts no parameter of a model that has sharded ones
            parameter.data = parameter.data.to(getattr(torch, first.model.dtype))
    optimizer = PromptOptimizer(
        members, {name: tensors.values() for name, tensors in named.items()}, stage=stage, world_size=world.size,
        device=world.device,
    )  # fmt: skip
    layers = layers_of(base)
    settings = read_settings(content, len(layers), "deepspeed")
    recomputer = Recomputer(settings, layers) if settings else None
    if stage == 3:
        # One gather per layer instead of one per linear.
        deepspeed.utils.set_z3_leaf_modules(model, list({type(layer) for layer in layers}))
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=content)
    except NotImplementedError as error:  # combinations of precisions that DeepSpeed has no optimizer for
        raise UserError(f"deepspeed: DeepSpeed cannot do this: {error}") from None
    optimizer.is_ready = True
    if stage == 3:
        keep_resident(engine.optimizer, model, layers, content)
    return Engine(engine, optimizer, world, stage, recomputer, cache)


def build_member(train, named: dict[str, torch.nn.Parameter], device: torch.device) -> Member:
    """A member's whole tensors and the optimizer that config section `train` asks for."""
    return Member(
        {name: torch.nn.Parameter(p.to(device)) for name, p in named.items()},
        lambda parameters: build_torch_optimizer(train, parameters),
        train.max_grad_norm,
    )
