"""Whether a base computes the same from our passes as by itself: once per job, before anything is trained.

An architecture may use token ids, positions or masks in ways that input vectors and packed rows do not give it. Such a
prompt would be trained on silently different numbers. So a row and a shorter one go through our pass, with virtual
tokens that are real tokens' embeddings, and through the base's own forward, one by one.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ptune_dist.base.layers import layers_of, max_positions
from ptune_dist.base.open import OpenedBase
from ptune_dist.config.schema import PLACEMENTS_WITH_CONTEXTS, Config
from ptune_dist.data.batches import Batch
from ptune_dist.distributed.world import World, together
from ptune_dist.errors import UserError
from ptune_dist.model.attention import narrow_windows
from ptune_dist.model.given_cache import keeps_more
from ptune_dist.model.keys_values import KeysValues, wrap
from ptune_dist.model.members import contributions_in_eval, keys_values_of
from ptune_dist.model.passes import Contexts
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.prompts.build import find_method
from ptune_dist.prompts.method import Contribution, Method
from ptune_dist.prompts.prompt_tuning import PromptTuning
from ptune_dist.run.keys_check import Fixed, check_prefix, check_stacks, run_after_keys, use_prompt
from ptune_dist.run.reading import Reading
from ptune_dist.run.rounding_noise import LEAST_OUTPUTS, describe_excess, rounded_embeddings
from ptune_dist.zero.engine import Engine

NUM_VIRTUAL = 4
# Of each row: context, rest, target; without contexts they belong to the rest. Some bases change what they do after
# some tens of positions, many outputs tell small differences from rounding, and a row's first positions tell most of
# what leaks into it.
LENGTHS = [(8, 40, 24), (3, 3, 24)]
WINDOW = 5  # a sliding window of so many positions, so that short rows tell where it is
SEED = 0
# Of the largest output. Each layer rounds what it adds, so errors grow with the square root of their number. Tiny bases
# of many architectures and SmolLM2's shape differ by up to 2e-7 in float32, 1.3e-3 in bfloat16 and 2.7e-3 in fp8.
LEAST_TOLERANCE = 1e-4  # products in float32 may be computed in TF32
TOLERANCE_OF_8_BITS = 0.03  # of inputs too: what is rounded may depend on the rows beside


@dataclass(frozen=True)
class Found:
    """Numbers [U] of our pass and the base's own, on the host, and what rounding does to them, if measured."""

    what: str
    ours: torch.Tensor
    plain: torch.Tensor
    noise: torch.Tensor | None = None


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
    trained = [number for prompt in prompts for number in prompt.trained_tokens]
    ordinary = ordinary_ids(reading, opened.model.config, embeddings.num_embeddings)
    ids = np.setdiff1d(ordinary, trained)
    most = max_positions(opened.model)
    longest = max(1, (most - NUM_VIRTUAL) // 3) if most is not None else max(map(max, LENGTHS))
    rows = [[draw.choice(ids, min(length, longest)).astype(np.int32) for length in lengths] for lengths in LENGTHS]
    virtual = draw.choice(ids, NUM_VIRTUAL).astype(np.int32)
    contexts, rests, targets = (list(parts) for parts in zip(*rows, strict=True))
    placement = find_placement(reading, opened.model)
    nothing = np.zeros(0, np.int32)
    if placement not in PLACEMENTS_WITH_CONTEXTS:
        rests = [np.concatenate(parts) for parts in zip(contexts, rests, strict=True)]
        contexts = [nothing] * len(rests)
    elif placement == "decoder":
        contexts = [np.concatenate(parts) for parts in zip(contexts, rests, strict=True)]
        rests = [nothing] * len(contexts)
    batch = Batch(contexts, rests, targets, [(row, 0) for row in range(len(rests))], int(ids[0]))
    return Probe(batch, virtual, opened.embed(virtual.tolist()), placement)


def find_placement(reading: Reading, base: PreTrainedModel) -> str:
    """Where the job's virtual tokens stand; keys and values of a prefix are read as those of a context are.

    Those of a base with states are not, for a context has states too.
    """
    placement = reading.config.prompt.placement
    methods = [find_method(member.prompt) for member in reading.members.values()]
    is_read_first = any(method.takes_positions and not method.stands_in_sequence for method in methods)
    can_read = "infix" in reading.family.placements and not keeps_more(base)
    return "infix" if is_read_first and can_read else placement


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
    together(world, lambda: compare(engine, probe, config, world))


def compare(engine: Engine, probe: Probe, config: Config, world: World) -> None:
    """Collective where the base is sharded. Raises UserError."""
    kind = engine.model.base.config.model_type
    try:
        with restored(engine.model), narrow_windows(engine.model.base, WINDOW):
            found = engine.without_gradient(lambda: run_both(engine.model, probe, measures_noise=is_half(config)))
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an architecture's own, of any kind
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"model.path: {config.model.path}: {kind} models do not compute what training asks of them: {why[:300]}"
        ) from error
    for some in found:
        excess = describe_difference(some, config, len(layers_of(engine.model.base)))
        doubt = None if excess else describe_doubt(some, config)
        if doubt and world.device.type == "cuda":
            # These limits were measured on CPUs; GPU kernels round in another order.
            if world.is_main:
                print(f"warning: model.path: {config.model.path}: {doubt}", flush=True)
        elif excess or doubt:
            raise UserError(
                f"model.path: {config.model.path}: {kind} models need something that they are not given here: "
                f"{excess or doubt}: model.check=false trains on them as they are"
            )


def describe_difference(found: Found, config: Config, num_layers: int) -> str | None:
    """By what our numbers differ from the base's own by more than its precision's tolerance; None: they do not."""
    ours = found.ours
    plain = found.plain
    difference = (ours - plain).abs().nan_to_num(nan=torch.inf)
    difference[ours.isnan() & plain.isnan()] = 0  # training itself says what is not a number
    allowed = find_tolerance(config, num_layers) * plain.abs().nan_to_num().max().item()
    worst = int(difference.argmax())
    if difference[worst] <= allowed:
        return None
    return f"{show_both(found, worst)} (they may differ by {allowed:.2g})"


def describe_doubt(found: Found, config: Config) -> str | None:
    """By what our numbers differ from the base's own by more than rounding does on this base; None: they do not."""
    if found.noise is None:
        return None
    step = torch.finfo(getattr(torch, config.model.dtype)).eps * found.plain.abs().nan_to_num().max().item()
    excess = describe_excess(found.ours, found.plain, found.noise, step)
    worst = int((found.ours - found.plain).abs().argmax())
    return excess and f"{show_both(found, worst)}, and {excess}"


def show_both(found: Found, place: int) -> str:
    numbers = (found.ours[place], found.plain[place])
    return "{} is {:.6g} in ptune-dist's pass and {:.6g} in its own".format(found.what, *numbers)


def run_both(model: PromptedModel, probe: Probe, *, measures_noise: bool) -> list[Found]:
    """The numbers of what follows from the virtual tokens, and of themselves.

    Leaves the model with a prompt of its own: see `restored`.
    """
    contributions = contributions_in_eval(list(model.members()))
    found = []
    if model.base.config.is_encoder_decoder:
        pad_id = probe.batch.pad_id
        check_stacks(model, contributions, probe.virtual, pad_id, probe.placement)
        if any(contribution.keys is not None for contribution in contributions):
            given, written = run_after_keys(model, probe.virtual, probe.batch.targets[0], pad_id, probe.placement)
            found.append(Found("an output after keys and values", on_host(given.float()), on_host(written)))
    embeddings = model.base.get_decoder().get_input_embeddings() if probe.placement == "decoder" else None
    vectors = model.embed_tokens(probe.virtual, embeddings)
    use_prompt(model, PromptTuning(vectors), probe.placement)
    model.read_base()
    ours = run_ours(model, probe, contributions)
    noise = None
    if measures_noise and len(ours) >= LEAST_OUTPUTS:
        with rounded_embeddings(model.base):
            noise = on_host(run_ours(model, probe, contributions) - ours)
    found.append(Found("an output", on_host(ours), on_host(model.plain_outputs(probe.batch, probe.virtual)), noise))
    if probe.placement != "decoder":
        found.append(Found("an embedding", on_host(probe.vectors), on_host(vectors)))
    for start in sorted({contribution.start_layer for contribution in contributions} - {0}):
        above, whole = run_apart(model, probe, start)
        found.append(Found(f"an output of layers {start} and above", on_host(above), on_host(whole)))
    return found


def run_ours(model: PromptedModel, probe: Probe, contributions: list[Contribution]) -> torch.Tensor:
    """Outputs [U] of our pass in float32, over contexts that are read first where the placement has some."""
    batch = probe.batch
    if any(map(len, batch.contexts)):
        held = model.read_contexts(Contexts(batch.contexts, batch.pad_id))
        for contribution in contributions:
            if len(held[0]) > 1:  # an encoder's output is one tensor
                check_prefix(keys_values_of(contribution), contribution.start_layer, KeysValues.of(held[0]), model)
        batch = batch.with_held([(wrap(some),) for some in held])
    elif not model.has_language_head and any(contribution.keys is not None for contribution in contributions):
        (held,) = model.read_contexts(Contexts(batch.rests[:1], batch.pad_id))  # an encoder reads a row as a start
        for contribution in contributions:
            check_prefix(keys_values_of(contribution), contribution.start_layer, KeysValues.of(held), model)
    return model.outputs(batch).float()


def on_host(values: torch.Tensor) -> torch.Tensor:
    return values.float().cpu().flatten()


def run_apart(model: PromptedModel, probe: Probe, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of a pass that begins at a later layer, without a prompt, and the base's own."""
    model.prompts = nn.ModuleList([Fixed(Contribution(start_layer=start), model.device)])
    model.num_vectors = [0]
    model.start_layers = [start]
    model.read_prompts()
    ours = model.outputs(model.read_below(probe.batch))
    return ours, model.plain_outputs(probe.batch, probe.virtual[:0])


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


def is_half(config: Config) -> bool:
    """Whether rounding in half precision is all that outputs may differ by."""
    return torch.finfo(getattr(torch, config.model.dtype)).bits < 32 and not rounds_inputs(config)


def rounds_inputs(config: Config) -> bool:
    """Whether products round their inputs to 8 bits."""
    return config.model.quantization == "fp8" or config.model.int8_activations


def find_tolerance(config: Config, num_layers: int) -> float:
    """How far any output may be apart for rounding alone."""
    rounding = torch.finfo(getattr(torch, config.model.dtype)).eps * math.sqrt(num_layers)
    return max(rounding, TOLERANCE_OF_8_BITS if rounds_inputs(config) else LEAST_TOLERANCE)
