"""What a job knows before any weight is read: the base's shape, the prompts at their start, DeepSpeed's JSON.

Everything that can be wrong with these is found here, on every rank, before memory is used.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ptune_dist.base.fp8 import check_device
from ptune_dist.base.layers import (
    embedding_width,
    heads_of_half,
    hidden_size,
    key_value_heads,
    layer_stacks,
    layers_of,
    max_positions,
    num_first_layers,
)
from ptune_dist.base.memory_check import check_memory
from ptune_dist.base.open import OpenedBase, open_base
from ptune_dist.base.recompute import read_settings
from ptune_dist.base.rotary import fixed_positions
from ptune_dist.base.trained import parameters_of_head
from ptune_dist.config.deepspeed_json import fill_deepspeed_json, show_source
from ptune_dist.config.schema import Config
from ptune_dist.config.sweep import naming_member
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.distributed.world import World
from ptune_dist.errors import UserError
from ptune_dist.model.given_cache import layer_heads
from ptune_dist.prompts.build import build_prompt, choose_trained, source_files
from ptune_dist.prompts.method import BaseFacts, Method, Stack
from ptune_dist.run.micro_batch import is_out_of_memory
from ptune_dist.run.reading import Reading
from ptune_dist.run.trained_tokens import check_trained_tokens
from ptune_dist.zero.engine import check_with_deepspeed
from ptune_dist.zero.offload import settle_offload, without_autos
from ptune_dist.zero.prefetch import settle_prefetch
from ptune_dist.zero.residency import settle_residency

FIRST_WITH_BFLOAT16 = 8  # major compute capability


@dataclass(frozen=True)
class Parts:
    """What is known before any weight is read."""

    opened: OpenedBase
    prompts: dict[str, Method]  # of each member, at its start
    deepspeed_json: dict[str, Any]  # filled
    sources: dict[str, dict[str, Method]]  # of each member that has several to start from


def build_parts(reading: Reading, world: World | None, *, with_start: bool, rows: TrainingRows | None = None) -> Parts:
    """Raises UserError for everything that can be wrong with base, prompts and DeepSpeed's JSON.

    Without `with_start` the prompts' numbers are not read: those of a trained prompt follow, and what it started from
    may be gone. Without a `world` nothing is asked of the machine. `rows` are those to train on, if any.
    """
    config = reading.config
    check_precision(config)
    if world is not None and config.model.quantization == "fp8":
        check_device(world.device)
    opened = open_base_of(reading)
    content = build_deepspeed_json(config, opened.model, world)
    reading.family.check_contexts(opened.model, config.prompt.placement)
    prompts = {}
    sources = {}
    for name, member in reading.members.items():
        with naming_member(reading.members, name, "prompt", "data"):
            check_positions(member, opened.model)
            prompts[name], found = build_member(reading, name, opened, with_start=with_start, rows=rows)
            if rows is not None:
                check_trained_tokens(prompts[name], rows.own_examples(name), reading)
        if found:
            sources[name] = found
    if world is not None:
        check_memory(opened.model, content, config.model.path, world.size, world.device)
    return Parts(opened, prompts, content, sources)


def build_member(
    reading: Reading, name: str, opened: OpenedBase, *, with_start: bool, rows: TrainingRows | None
) -> tuple[Method, dict[str, Method]]:
    """A member's prompt, and the prompts that it may start from by file, where there are several. Raises UserError."""
    member = reading.members[name]
    # An encoder's targets are numbers of labels.
    has_texts = not reading.family.trains_head
    build = functools.partial(
        build_prompt,
        member,
        base=base_facts(opened.model),
        tokenizer=reading.tokenizer,
        lookup=opened.embed,
        with_start=with_start,
        num_embeddings=reading.num_embeddings,
        read_stored=opened.read_rows,
        rows=None if rows is None else functools.partial(rows.tokens_of, name, with_targets=has_texts),
        read_examples=None if rows is None else functools.partial(rows.examples_of, name),
    )
    try:
        prompt = build()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        size = f"{member.prompt.num_virtual_tokens} virtual tokens of {member.prompt.method}"
        raise UserError(f"prompt: {size}, with its options, do not fit in this machine's memory") from None
    files = source_files(member.prompt)
    if not with_start or len(files) < 2:
        return prompt, {}
    prompt.head_start = None  # it is not known yet which file is the best
    sources = {file: build(file=file) for file in files}
    check_sources(sources)
    return prompt, sources


def check_sources(sources: dict[str, Method]) -> None:
    """Raise UserError for prompts that are more than what their files hold as a prompt, or of unlike shapes."""
    if any(prompt.start_tokens or not prompt.state_dict() for prompt in sources.values()):
        raise UserError(
            f"prompt.init_file: {', '.join(sources)}: several sources are scored only where each file holds the whole "
            "prompt: name one file"
        )
    shapes = [{key: tensor.shape for key, tensor in prompt.state_dict().items()} for prompt in sources.values()]
    if all(shape == shapes[0] for shape in shapes):
        return
    files = ", ".join(sources)
    if any(shape.keys() != shapes[0].keys() for shape in shapes):
        raise UserError(f"prompt.init_file: {files}: these prompts hold different tensors: name those of like options")
    raise UserError(
        f"prompt.init_file: {files}: these prompts differ in their number of frozen positions: set prompt.num_frozen"
    )


def open_base_of(reading: Reading) -> OpenedBase:
    """The base without its weights. Raises UserError."""
    model = reading.config.model
    int8 = {"include": model.int8_include, "threshold": model.int8_threshold if model.int8_activations else None}
    return open_base(
        model.path,
        reading.family,
        dtype=getattr(torch, model.dtype),
        random_init=model.random_init,
        seed=reading.config.seed,
        int8=int8 if model.quantization == "int8" else None,
        fp8={"include": model.int8_include} if model.quantization == "fp8" else None,
        labels=reading.config.data.labels,
        choose_trained=functools.partial(choose_trained_of, reading),
    )


def choose_trained_of(reading: Reading, base: PreTrainedModel) -> set[str]:
    """Names of the base's parameters that the job trains. Raises UserError.

    The head over the vocabulary is not among them where a new head answers numbers.
    """
    chosen = choose_trained(next(iter(reading.members.values())).prompt, base)
    if reading.objective.target == "number":
        chosen -= parameters_of_head(base)
    return chosen


def base_facts(base: PreTrainedModel) -> BaseFacts:
    """What methods may need to know of a base."""
    text = base.config.get_text_config(decoder=True)
    num_heads, of_keys, of_values = key_value_heads(base.config)
    own = layer_heads(base)
    is_uniform = own is not None and len(set(own)) == 1
    num_layers = getattr(text, "num_hidden_layers", None)
    encoder = None
    if base.config.is_encoder_decoder:
        encoder, decoder = stacks_of_base(base) or (None, None)
        num_layers, num_heads, of_keys = decoder or (None, None, None)
        of_values = of_keys
        is_uniform = True
    return BaseFacts(
        width=embedding_width(base),
        num_layers=num_layers,
        num_key_value_heads=num_heads if is_uniform else None,
        head_width=of_keys,
        value_width=of_values,
        layer_heads=None if is_uniform else own,
        model_type=base.config.model_type,
        num_embeddings=getattr(base.get_input_embeddings(), "num_embeddings", None),
        hidden_size=hidden_size(base),
        num_first_layers=num_first_layers(base),
        encoder=encoder,
    )


def stacks_of_base(base: PreTrainedModel) -> tuple[Stack, Stack] | None:
    """The attention of an encoder-decoder's encoder and of its decoder; None where they are of an unknown shape."""
    stacks = layer_stacks(base)
    (of_encoder, width), (of_decoder, decoder_width) = (heads_of_half(base, h) for h in ("encoder", "decoder"))
    if len(stacks) != 2 or not (of_encoder and width and of_decoder and decoder_width):
        return None
    return Stack(len(stacks[0]), of_encoder, width), Stack(len(stacks[1]), of_decoder, decoder_width)


def check_precision(config: Config) -> None:
    """Raise UserError for what this machine cannot compute in."""
    if config.model.dtype == "float16" and not torch.cuda.is_available():
        raise UserError("model.dtype: float16 needs a GPU: use bfloat16 or float32 on a CPU")
    if config.model.dtype == "bfloat16" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if major < FIRST_WITH_BFLOAT16:
            name = torch.cuda.get_device_name()
            raise UserError(
                f"model.dtype: bfloat16 needs a GPU of compute capability {FIRST_WITH_BFLOAT16}.0 or newer, and this "
                f"{name} has {major}.{minor}: use float16"
            )


def build_deepspeed_json(config: Config, base: PreTrainedModel, world: World | None) -> dict[str, Any]:
    """DeepSpeed's JSON filled in and accepted by DeepSpeed. Raises UserError."""
    file = show_source(config.deepspeed)
    content = fill_deepspeed_json(config, hidden_size=hidden_size(base))
    check_with_deepspeed(without_autos(content), config.deepspeed)
    settle_offload(content, base, world.size if world else None, file)
    settle_prefetch(content, base)
    settle_residency(content, base)
    read_settings(content, len(layers_of(base)), file)
    return content


def check_positions(config: Config, base: PreTrainedModel) -> None:
    """Raise UserError where rows could be longer than a base's learned positions or fixed rotary frequencies."""
    most = max_positions(base)
    fixed = fixed_positions(base.config)
    num_virtual = config.prompt.num_virtual_tokens
    length = config.data.max_length
    assert length is not None, "the reading has settled it"
    needed = num_virtual + length
    if most is not None and needed > most:
        raise UserError(
            f"data.max_length: {length} with {num_virtual} virtual tokens needs "
            f"{needed} positions, the base has {most}: set data.max_length={most - num_virtual}"
        )
    if fixed is not None and needed > fixed:
        raise UserError(
            f"data.max_length: {length} with {num_virtual} virtual tokens needs {needed} positions, and the base's "
            f"rotary frequencies are fixed for the first {fixed} only: beyond, the longest row would change the "
            f"others: set data.max_length={fixed - num_virtual}"
        )
