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

from ptune_dist.base.gathers import watch_gathers
from ptune_dist.base.layers import layers_of
from ptune_dist.base.recompute import Recomputer, read_settings
from ptune_dist.data.batches import Batch, Plan, collate, plan_micro_batches
from ptune_dist.data.encode import Examples
from ptune_dist.deepspeed_json import zero_stage
from ptune_dist.distributed import World
from ptune_dist.errors import UserError
from ptune_dist.optimizer import Member, PromptOptimizer, build_torch_optimizer
from ptune_dist.segments import PromptedModel

MEMBER = "prompt"  # the one member of a bank of K = 1


class Engine:
    """A PromptedModel under DeepSpeed."""

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, optimizer: PromptOptimizer, world: World, stage: int,
        recomputer: Recomputer | None,
    ):  # fmt: skip
        self._engine, self._optimizer, self.world, self.stage = engine, optimizer, world, stage
        self.model: PromptedModel = engine.module
        self.recomputer, self.gathers = recomputer, watch_gathers()

    def accumulate(self, batch: Batch, *, scale: float, is_last: bool) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its summed negative log-likelihood (a scalar).

        `scale` is 1 / supervised tokens of the whole step, over all ranks. DeepSpeed averages gradients over ranks, so
        the loss is multiplied by their number. Collective: every rank must call.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        total = self._engine(batch).sum()
        self._engine.backward(total * (scale * self.world.size))
        return total.detach()

    def step(self, learning_rate: float) -> float:
        """Move the prompt; returns the gradient's norm before clipping. Collective. Raises FloatingPointError."""
        for group in self._optimizer.members[MEMBER].torch_optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return self._optimizer.members[MEMBER].grad_norm

    def row_losses(self, batch: Batch) -> torch.Tensor:
        """Negative log-likelihood per row [B], without gradient. Collective: every rank must call."""
        was_training = self._engine.training
        self._engine.eval()
        with torch.no_grad():
            losses = self._engine(batch)
        self._engine.train(was_training)
        return losses

    @property
    def prompt_tensors(self) -> dict[str, torch.Tensor]:
        """The prompt's trainable tensors, whole, float32, on the CPU."""
        member = self._optimizer.members[MEMBER]
        return {name: p.detach().cpu().clone() for name, p in zip(member.names, member.whole, strict=True)}

    def load_prompt(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set the prompt's trainable tensors, in DeepSpeed's masters and in what the model reads. Collective."""
        member = self._optimizer.members[MEMBER]
        parameters = list(self.model.trainable().values())
        with torch.no_grad(), deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=self.stage == 3):
            for name, whole, parameter in zip(member.names, member.whole, parameters, strict=True):
                whole.copy_(tensors[name])
                parameter.data.copy_(whole)
        masters = self._masters()
        assert masters or (self.stage == 0 and parameters[0].dtype == torch.float32), (
            "DeepSpeed's masters are not found"
        )
        if masters:
            self._optimizer.write_back(member, masters)

    def _masters(self) -> list[torch.Tensor]:
        """This rank's float32 master weights of the one member; none where the model's own are the masters."""
        inner = self._engine.optimizer
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(inner, name):
                return [getattr(inner, name)[0]]
        return list(inner.fp32_groups[0]) if hasattr(inner, "fp32_groups") else []

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """The torch optimizer's tensors by `TENSOR.KEY`, whole, on the CPU."""
        member = self._optimizer.members[MEMBER]
        return {
            f"{name}.{key}": torch.as_tensor(value).detach().cpu().clone()
            for name, p in zip(member.names, member.whole, strict=True)
            for key, value in member.torch_optimizer.state[p].items()
            if value is not None
        }

    def load_optimizer_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set what `optimizer_state` gave, at any world size and stage."""
        member = self._optimizer.members[MEMBER]
        content = member.torch_optimizer.state_dict()
        content["state"] = {
            i: {key.removeprefix(f"{name}."): t.clone() for key, t in tensors.items() if key.startswith(f"{name}.")}
            for i, name in enumerate(member.names)
        }
        member.torch_optimizer.load_state_dict(content)

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

    @property
    def num_virtual_tokens(self) -> int:
        return self.model.prompt.num_virtual_tokens

    def collate(self, examples: Examples, indices: Sequence[int], pad_id: int) -> Batch:
        """The tensors of a micro-batch as this base reads them, on this rank's device."""
        return collate(examples, indices, pad_id, apart=self.model.family != "causal").to(self.world.device)

    def plan(self, indices: Sequence[int], examples: Examples, micro_batch_tokens: int) -> Plan:
        """Micro-batches of every rank, by what this base pads."""
        return plan_micro_batches(
            indices, examples.lengths if self.model.family == "causal" else examples.widths,
            world_size=self.world.size, micro_batch_tokens=micro_batch_tokens, extra_tokens=self.num_virtual_tokens,
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


def build_engine(config, base, prompt, content: dict[str, Any], world: World, *, family: str) -> Engine:
    """Put base and prompt under DeepSpeed as its filled JSON asks. Collective. Raises UserError."""
    stage = zero_stage(content)
    model = PromptedModel(base, prompt, family)
    named = model.trainable()
    member = Member(
        {name: torch.nn.Parameter(p.to(world.device)) for name, p in named.items()},
        lambda parameters: build_torch_optimizer(config.train, parameters),
        config.train.max_grad_norm,
    )
    for parameter in named.values():  # DeepSpeed casts no parameter of a model that has sharded ones
        parameter.data = parameter.data.to(getattr(torch, config.model.dtype))
    optimizer = PromptOptimizer(
        {MEMBER: member}, {MEMBER: named.values()}, stage=stage, world_size=world.size, device=world.device
    )
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
        # DeepSpeed gathers what it keeps whole anew after every step, tensor by tensor, since a step may have changed
        # it. A frozen tensor is the same; it comes back with its layer.
        kept = engine.optimizer.persistent_parameters
        kept[:] = [parameter for parameter in kept if parameter.requires_grad]
    return Engine(engine, optimizer, world, stage, recomputer)
