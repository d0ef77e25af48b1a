"""Whether a base computes the same from our passes as by itself: once per job, before anything is trained.

An architecture may use token ids, positions or masks in ways that input vectors and packed rows do not give it. Such a
prompt would be trained on silently different numbers. So two short rows go through our pass, with virtual tokens that
are real tokens' embeddings, and through the base's own forward, one by one.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from ptune_dist.base.layers import layers_of, max_positions
from ptune_dist.base.open import OpenedBase
from ptune_dist.config.schema import PLACEMENTS_WITH_CONTEXTS, Config
from ptune_dist.data.batches import Batch
from ptune_dist.distributed.world import World, together
from ptune_dist.errors import UserError
from ptune_dist.model.attention import KeysValues, narrow_windows
from ptune_dist.model.prompted_model import Contexts, PromptedModel, contributions_in_eval, keys_values_of
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.prompts.build import find_method
from ptune_dist.prompts.method import Contribution, Method
from ptune_dist.prompts.prompt_tuning import PromptTuning
from ptune_dist.run.reading import Reading
from ptune_dist.zero.engine import Engine

NUM_VIRTUAL = 4
LENGTHS = [(3, 3, 4), (5, 6, 6)]  # of each row: context, rest, target; without contexts they belong to the rest
WINDOW = 5  # a sliding window of so many positions, so that short rows tell where it is
SEED = 0
# Of the largest output. Each layer rounds what it adds, so errors grow with the square root of their number. Tiny bases
# of many architectures and SmolLM2's shape differ by up to 2e-7 in float32, 1.3e-3 in bfloat16 and 2.7e-3 in fp8.
LEAST_TOLERANCE = 1e-4  # products in float32 may be computed in TF32
TOLERANCE_OF_8_BITS = 0.03  # of inputs too: what is rounded may depend on the rows beside


@dataclass(frozen=True)
class Probe:
    """Two rows, the tokens whose embeddings are their virtual tokens, and these embeddings as a prompt gets them."""

    batch: Batch
    virtual: np.ndarray
    vectors: torch.Tensor
    placement: str


def draw_probe(reading: Reading, opened: OpenedBase, prompts: Iterable[Method] = ()) -> Probe:
    """Ordinary tokens of the base's tokenizer, the same in every job. Reads a few embeddings, so before the base.

    Tokens whose embeddings `prompts` train are left out.
    """
    draw = np.random.default_rng(SEED)
    embeddings = cast(nn.Embedding, opened.model.get_input_embeddings())
    trained = [number for prompt in prompts for number in prompt.token_ids]
    ordinary = ordinary_ids(reading, opened.model.config, embeddings.num_embeddings)
    ids = np.setdiff1d(ordinary, trained)
    most = max_positions(opened.model)
    longest = max(1, (most - NUM_VIRTUAL) // 3) if most is not None else max(map(max, LENGTHS))
    rows = [[draw.choice(ids, min(length, longest)).astype(np.int32) for length in lengths] for lengths in LENGTHS]
    virtual = draw.choice(ids, NUM_VIRTUAL).astype(np.int32)
    contexts, rests, targets = (list(parts) for parts in zip(*rows, strict=True))
    placement = find_placement(reading)
    nothing = np.zeros(0, np.int32)
    if placement not in PLACEMENTS_WITH_CONTEXTS:
        rests = [np.concatenate(parts) for parts in zip(contexts, rests, strict=True)]
        contexts = [nothing] * len(rests)
    elif placement == "decoder":
        contexts = [np.concatenate(parts) for parts in zip(contexts, rests, strict=True)]
        rests = [nothing] * len(contexts)
    batch = Batch(contexts, rests, targets, [(row, 0) for row in range(len(rests))], int(ids[0]))
    return Probe(batch, virtual, opened.embed(virtual.tolist()), placement)


def find_placement(reading: Reading) -> str:
    """Where the job's virtual tokens stand; keys and values of a prefix are read as those of a context are."""
    placement = reading.config.prompt.placement
    methods = [find_method(member.prompt) for member in reading.members.values()]
    is_read_first = any(method.takes_positions and not method.stands_in_sequence for method in methods)
    return "infix" if is_read_first and "infix" in reading.family.placements else placement


def ordinary_ids(reading: Reading, shape: PretrainedConfig, num_embeddings: int) -> np.ndarray:
    """Ids below `num_embeddings` that stand for text, as far as tokenizer and config tell."""
    special = set(reading.tokenizer.all_special_ids)
    for key, found in shape.get_text_config().to_dict().items():
        if key.endswith("_token_id"):
            special |= set(found if isinstance(found, list) else [found])
    all_ids = range(min(len(reading.tokenizer), num_embeddings))
    return np.array([number for number in all_ids if number not in special] or [0])


def check_base(engine: Engine, probe: Probe, config: Config, world: World) -> None:
    """Raise UserError where the base's outputs from our pass are not its own. Collective: every rank must call."""
    together(world, lambda: compare(engine, probe, config))


def compare(engine: Engine, probe: Probe, config: Config) -> None:
    """Collective where the base is sharded. Raises UserError."""
    kind = engine.model.base.config.model_type
    try:
        with restored(engine.model), narrow_windows(engine.model.base, WINDOW):
            found = engine.without_gradient(lambda: run_both(engine.model, probe))
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an architecture's own, of any kind
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"model.path: {config.model.path}: {kind} models do not compute what training asks of them: {why[:300]}"
        ) from error
    for what, ours, plain in found:
        difference = (ours - plain).abs().nan_to_num(nan=torch.inf)
        difference[ours.isnan() & plain.isnan()] = 0  # training itself says what is not a number
        allowed = find_tolerance(config, len(layers_of(engine.model.base))) * plain.abs().nan_to_num().max().item()
        worst = int(difference.argmax())
        if difference[worst] > allowed:
            numbers = f"{ours[worst]:.6g} in ptune-dist's pass and {plain[worst]:.6g} in its own"
            raise UserError(
                f"model.path: {config.model.path}: {kind} models need something that they are not given here: {what} "
                f"is {numbers} (they may differ by {allowed:.2g}): model.check=false trains on them as they are"
            )


def run_both(model: PromptedModel, probe: Probe) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Of what follows from the virtual tokens, and of themselves: a name, our numbers and the base's own, on the host.

    Leaves the model with a prompt of its own: see `restored`.
    """
    contributions = contributions_in_eval(list(model.members()))
    embeddings = model.base.get_decoder().get_input_embeddings() if probe.placement == "decoder" else None
    vectors = model.embed_tokens(probe.virtual, embeddings)
    model.prompts = nn.ModuleList([PromptTuning(vectors)])
    model.num_vectors = [len(vectors)]
    model.num_prefix = [0]
    model.start_layers = [0]
    model.placement = probe.placement
    model.objective = CrossEntropy()
    model.read_base()
    batch = probe.batch
    if any(map(len, batch.contexts)):
        held = model.read_contexts(Contexts(batch.contexts, batch.pad_id))
        for contribution in contributions:
            check_prefix(contribution, held[0], model.base.config.model_type)
        batch = batch.with_held([(KeysValues(*some) if len(some) == 2 else some[0],) for some in held])
    found = [("an output", model.outputs(batch), model.plain_outputs(probe.batch, probe.virtual))]
    for start in sorted({contribution.start_layer for contribution in contributions} - {0}):
        found.append((f"an output of layers {start} and above", *run_apart(model, probe, start)))
    if probe.placement != "decoder":
        found.append(("an embedding", probe.vectors, vectors))
    return [(what, one.float().cpu().flatten(), other.float().cpu().flatten()) for what, one, other in found]


def run_apart(model: PromptedModel, probe: Probe, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of a pass that begins at a later layer, without a prompt, and the base's own."""
    model.prompts = nn.ModuleList([Empty(start, model.device)])
    model.num_vectors = [0]
    model.start_layers = [start]
    model.read_prompts()
    ours = model.outputs(model.read_below(probe.batch))
    return ours, model.plain_outputs(probe.batch, probe.virtual[:0])


class Empty(Method):
    """Contributes nothing from a layer on."""

    num_virtual_tokens = 0

    def __init__(self, start: int, device: torch.device):
        super().__init__()
        self._start = start
        self.nothing = nn.Parameter(torch.empty(0, device=device), requires_grad=False)  # tells the model's device

    def forward(self) -> Contribution:
        return Contribution(start_layer=self._start)


def check_prefix(contribution: Contribution, held: tuple[torch.Tensor, ...], kind: str) -> None:
    """Raise UserError where a base's layers keep keys and values [L, C, G, D] of other sizes than a prompt's."""
    prefix = keys_values_of(contribution)
    if prefix is None:
        return
    start = contribution.start_layer
    sizes = [(part[start:].shape[0], *part.shape[2:]) for part in held]
    own = [(part.shape[0], *part.shape[2:]) for part in prefix]
    if sizes != own:
        raise UserError(
            f"prompt.method: prefix_tuning has keys and values of {describe_sizes(own)}, and {kind} models keep "
            f"{describe_sizes(sizes)}: choose another method"
        )


def describe_sizes(sizes: list[tuple[int, ...]]) -> str:
    (num_layers, num_heads, width), (_, _, value_width) = sizes
    return f"{num_layers} layers x {num_heads} heads x {width} and {value_width} numbers"


@contextmanager
def restored(model: PromptedModel) -> Iterator[None]:
    """The model gets back its prompts and what belongs to them."""
    names = ("prompts", "num_vectors", "num_prefix", "start_layers", "placement", "objective")
    before = {name: getattr(model, name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(model, name, value)
        model.read_base()
        model.read_prompts()
        model.train(model.training)


def find_tolerance(config: Config, num_layers: int) -> float:
    """How far outputs may be apart for rounding alone."""
    rounding = torch.finfo(getattr(torch, config.model.dtype)).eps * math.sqrt(num_layers)
    rounds_inputs = config.model.quantization == "fp8" or config.model.int8_activations
    return max(rounding, TOLERANCE_OF_8_BITS if rounds_inputs else LEAST_TOLERANCE)
