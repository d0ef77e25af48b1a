"""Encoder-decoders (T5, BART, ...): the encoder reads [virtual tokens, input], the decoder writes the target.

Under placement decoder the virtual tokens stand before what the decoder reads, and the encoder's output is a context.
Shapes: S readers, T tokens, C context positions, D width.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from ptune_dist.base.source import is_local_only
from ptune_dist.common.hub import split_revision
from ptune_dist.data.batches import Batch, Unit, pad_rows
from ptune_dist.data.examples import Examples
from ptune_dist.data.framing import Framing
from ptune_dist.errors import UserError
from ptune_dist.families.family import Family
from ptune_dist.families.seq2seq_decoder import Seq2SeqDecoder
from ptune_dist.model.encoder_output import EncoderOutput
from ptune_dist.model.given_cache import GivenCache, cut_layers
from ptune_dist.model.members import contributions_in_eval
from ptune_dist.model.passes import Contexts, Supervised
from ptune_dist.model.prompted_model import PromptedModel
from ptune_dist.model.seq2seq_prefix import (
    PREFIX,
    GivenPair,
    Prefixes,
    check_lengths,
    open_cache,
    open_encoder,
    prefixes_of,
    unread,
)
from ptune_dist.prompts.method import Contribution
from ptune_dist.prompts.stacks import ALL, CROSS, DECODER, ENCODER, STACKS

REFUSED = {  # model type -> why
    "encoder-decoder": "join two models, each with a configuration of its own: use a model of one architecture",
    "fsmt": "have a vocabulary for each language and a head that is not the one over the target's",
    "prophetnet": "predict several tokens at each position",
    "xlm-prophetnet": "predict several tokens at each position",
    "seamless_m4t": "choose an encoder by the kind of their input",
    "seamless_m4t_v2": "choose an encoder by the kind of their input",
}


class ReadInputs(NamedTuple):
    """What an encoder left of the readers' inputs: output [S, T, D], mask, and the keys/values of the output."""

    hidden: torch.Tensor
    mask: torch.Tensor
    crossed: DynamicCache

    def inputs(self, own: DynamicCache | GivenCache) -> dict[str, Any]:
        """Inputs of a pass over the decoder that has read `own` before."""
        cache = EncoderDecoderCache(own, self.crossed)
        return {"encoder_outputs": EncoderOutput(self.hidden), "attention_mask": self.mask, "past_key_values": cache}


class PromptedSeq2Seq(PromptedModel):
    """Rows are padded; every reader has its own virtual tokens."""

    needs_empty_contexts = True  # the decoder wants something of every encoder's input

    def __init__(self, base: PreTrainedModel, *args: Any, **options: Any):
        super().__init__(base, *args, **options)
        if any(contribution.encoder_keys is not None for contribution in contributions_in_eval(list(self.members()))):
            open_encoder(base)
        check_lengths(base, self.num_prefix)

    def count_positions(self, units: list[Unit], examples: Examples, *, with_contexts: bool = True) -> int:
        return count_padded(self, units, examples, with_contexts=with_contexts)

    def supervise(self, batch: Batch) -> Supervised:
        batch = self.by_contribution(batch)
        readers = batch.readers
        members = [member for _, member in readers]
        start = [self.base.config.decoder_start_token_id]
        written = [np.concatenate([start, batch.targets[row][:-1]]) for row, _ in readers]
        contributions = self.contributions(self.start_layers[members[0]])
        inputs = {} if batch.read is not None else self.source(batch, members)
        starts = [0] * len(readers)
        if self.placement == "decoder":
            embeddings = self.base.get_decoder().get_input_embeddings()
            vectors, mask = self.embed(written, members, contributions, embeddings=embeddings)
            inputs["decoder_inputs_embeds"] = vectors + unread(contributions)
            starts = [contributions[member].num_vectors for member in members]
        else:
            ids, present = pad_rows(written, batch.pad_id)
            inputs["decoder_input_ids"] = self.to_tensor(ids)
            mask = self.to_tensor(present)
        own = prefixes_of(DECODER, members, contributions, self.no_hidden(0))
        if own is not None:
            inputs["decoder_attention_mask"] = own.before(mask)
        if batch.read is not None:
            inputs |= batch.read.inputs(DynamicCache() if own is None else GivenCache(own.layers))
        else:
            inputs |= self.before_decoder(inputs, members, own, contributions)
        return self.supervise_rows(batch, starts, **inputs)

    def before_decoder(
        self, inputs: dict[str, Any], members: list[int], own: Prefixes | None, contributions: list[Contribution]
    ) -> dict[str, Any]:
        """Inputs of a pass whose decoder reads prefixes: those of its self-attention are `own`."""
        cross = prefixes_of(CROSS, members, contributions, self.no_hidden(0))
        if own is None and cross is None:
            return {}
        caches = [GivenCache([] if prefixes is None else prefixes.layers) for prefixes in (own, cross)]
        found: dict[str, Any] = {"past_key_values": GivenPair(*caches)}
        if cross is not None:
            found["attention_mask"] = cross.before(inputs["attention_mask"])
        return found

    def source(self, batch: Batch, members: list[int]) -> dict[str, Any]:
        """What the encoder reads of every reader, with contributions `members`; or what it left of contexts."""
        rows = [row for row, _ in batch.readers]
        if self.placement == "decoder":
            assert batch.held is not None, "placement decoder has a context for every row"
            hidden = [batch.held[row][0] for row in rows]
            read = self.to_tensor(pad_rows([np.ones(len(part)) for part in hidden], 0)[0])
            return {"encoder_outputs": EncoderOutput(pad_sequence(hidden, batch_first=True)), "attention_mask": read}
        start = self.start_layers[members[0]]
        texts = [batch.rests[row] for row in rows]
        contributions = self.contributions(start)
        vectors, mask = self.embed(texts, members, contributions, below=self.below_of(batch, members))
        prefixes = prefixes_of(ENCODER, members, contributions, vectors)
        if not start:
            inputs = {"inputs_embeds": vectors + unread(contributions), "attention_mask": mask}
            if prefixes is None:
                return inputs
            inputs |= {"attention_mask": prefixes.before(mask), PREFIX: GivenCache(prefixes.layers)}
            hidden = self.base.get_encoder()(**inputs)[0]
            return {"encoder_outputs": EncoderOutput(hidden), "attention_mask": mask}
        no_vectors = self.no_vectors(*vectors.shape[:2])
        with self.layer_parts.above(start, vectors):
            hidden = self.base.get_encoder()(inputs_embeds=no_vectors, attention_mask=mask)[0]
        return {"encoder_outputs": EncoderOutput(hidden), "attention_mask": mask}

    def run_layers(self, vectors: torch.Tensor) -> None:
        self.base.get_encoder()(inputs_embeds=vectors)

    def row_below(self, batch: Batch, row: int) -> tuple[np.ndarray, int]:
        """Of a context, which is the encoder's output, no prompt has changed anything."""
        return batch.rests[row], 0

    def plain_outputs(self, batch: Batch, virtual: np.ndarray) -> torch.Tensor:
        start = [self.base.config.decoder_start_token_id]
        losses = []
        for context, rest, target in zip(batch.contexts, batch.rests, batch.targets, strict=True):
            read, written = np.concatenate([virtual, rest]), np.concatenate([start, target[:-1]])
            if self.placement == "decoder":
                read, written = context, np.concatenate([virtual, written])
            ids = self.to_tensor(read)[None]
            written_ids = self.to_tensor(written)[None]
            logits = self.base(
                input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=written_ids, use_cache=False
            ).logits[0, -len(target) :]
            losses.append(self.objective.validation_losses(logits, self.to_tensor(target)))
        return torch.cat(losses)

    def encode(self, batch: Batch, members: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the encoder leaves of every reader [S, T, D], and its mask [S, T]."""
        source = self.source(batch, members)
        encoded = source.get("encoder_outputs") or self.base.get_encoder()(**source)
        return encoded[0], source["attention_mask"]

    def _encode_late(self, batch: Batch, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """As `encode`, of a batch that the layers below have not read."""
        readers = [(row, self.member_of(numbers[0])) for row in range(len(batch.rests))]
        return self.encode(self.read_below(dataclasses.replace(batch, readers=readers)), numbers)

    def open_decoder(self, number: int) -> Seq2SeqDecoder | None:
        return Seq2SeqDecoder(self, self._encode_late, number) if self.writes_text else None

    @torch.no_grad()
    def read_inputs(self, batch: Batch) -> Batch:
        """The encoder once, and once the keys and values of its output that the decoder's layers read."""
        if len(set(self.start_layers)) > 1:  # the readers' passes are several
            return batch
        members = [member for _, member in self.by_contribution(batch).readers]
        hidden, mask = self.encode(batch, members)
        cross = prefixes_of(CROSS, members, self.contributions(), hidden)
        crossed = DynamicCache()
        if cross is not None:
            crossed = cross.cache()
            mask = cross.before(mask)
        start = torch.full((len(batch.readers), 1), self.base.config.decoder_start_token_id, device=mask.device)
        self.base(
            encoder_outputs=EncoderOutput(hidden),
            attention_mask=mask,
            decoder_input_ids=start,
            past_key_values=open_cache(DynamicCache(), crossed),
            use_cache=True,
        )
        return dataclasses.replace(batch, read=ReadInputs(hidden, mask, crossed))

    @torch.no_grad()
    def read_contexts(self, work: Contexts) -> list[tuple[torch.Tensor, ...]]:
        padded, present = pad_rows(work.tokens, work.pad_id)
        encoder = self.base.get_encoder()
        inputs = {"input_ids": self.to_tensor(padded), "attention_mask": self.to_tensor(present)}
        if work.start_layer:
            with self.layer_parts.below(work.start_layer) as captured:
                encoder(**inputs)
            assert captured.hidden is not None
            hidden = captured.hidden
        else:
            hidden = encoder(**inputs)[0]
        return [(row[: len(tokens)].clone(),) for row, tokens in zip(hidden, work.tokens, strict=True)]

    @torch.no_grad()
    def read_start(self, work: Contexts) -> tuple[torch.Tensor, ...]:
        """Keys and values of the stacks that the placement has: the encoder reads a text, the decoder writes it.

        The decoder begins with its start token, so that the text's last token is left out there.
        """
        if work.start_layer:
            return super().read_start(work)
        (text,) = work.tokens
        recorded = {name: GivenCache([], record=True) for name in ALL}
        ids = self.to_tensor(text)[None]
        given = {}
        if ENCODER in STACKS[self.placement]:
            open_encoder(self.base)
            given = {PREFIX: recorded[ENCODER]}
        hidden = self.base.get_encoder()(input_ids=ids, attention_mask=torch.ones_like(ids), **given)[0]
        written = np.concatenate([[self.base.config.decoder_start_token_id], text[:-1]])
        self.base(
            encoder_outputs=EncoderOutput(hidden),
            attention_mask=torch.ones_like(ids),
            decoder_input_ids=self.to_tensor(written)[None],
            past_key_values=GivenPair(recorded[DECODER], recorded[CROSS]),
            use_cache=False,
        )
        layers = [pair for name in STACKS[self.placement] for pair in recorded[name].recorded]
        return cut_layers(layers, 0, len(text)).tensors

    def count_before_answer(self, num_virtual: int, num_tokens: int) -> int:
        """The decoder's start token, after what the decoder reads of the prompt."""
        return 1 + (num_virtual if self.placement == "decoder" or any(self.num_prefix) else 0)


def count_padded(model: PromptedModel, units: list[Unit], examples: Examples, *, with_contexts: bool) -> int:
    """Positions of readers that are padded to one width."""
    if not units:
        return 0
    rows = [example for example, _ in units]
    lengths = [prompt.num_virtual_tokens for prompt in model.members()]
    readers = [(example, lengths[member]) for example, members in units for member in members]
    contexts = int(examples.num_context[rows].sum()) if with_contexts else 0
    read, written = examples.widths_of([row for row, _ in readers]).T
    widest = int(read.max()) + int(written.max())
    return max(contexts, len(readers) * (widest + max(count for _, count in readers)))


class Seq2Seq(Family):
    """Reads an input that ends as a text ends, and writes a target that begins as a text begins."""

    name = "seq2seq"
    auto_class = AutoModelForSeq2SeqLM
    architectures = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    model_class = PromptedSeq2Seq
    placements = ("prefix", "encoder", "decoder", "both")
    peft_task = "SEQ_2_SEQ_LM"

    def is_own(self, shape: PretrainedConfig) -> bool:
        return shape.is_encoder_decoder

    def frame_text(self) -> Framing:
        return Framing(ends_input=True, starts_target=True)

    def check_model(self, model: PreTrainedModel, path: str) -> None:
        super().check_model(model, path)
        kind = model.config.model_type
        if kind in REFUSED:
            raise UserError(f"model.path: {path}: {kind} models {REFUSED[kind]}")
        if getattr(model.config, "decoder_start_token_id", None) is None:
            model.config.decoder_start_token_id = stored_start(path)
        if model.config.decoder_start_token_id is None:
            raise UserError(f"model.path: {path}/config.json names no decoder_start_token_id: set it there")

    def generation_config(self, shape: PretrainedConfig) -> GenerationConfig:
        """Where a decoder starts is the base's."""
        return GenerationConfig(decoder_start_token_id=getattr(shape, "decoder_start_token_id", None))

    def context_bytes_per_token(self, shape: PretrainedConfig, dtype: torch.dtype) -> int:
        """The encoder's output."""
        return shape.get_text_config(decoder=True).hidden_size * dtype.itemsize


def stored_start(path: str) -> int | None:
    """The token that a decoder starts from, of a base that names it in its generation_config.json."""
    try:
        name, revision = split_revision(path)
        stored = GenerationConfig.from_pretrained(
            name, revision=revision or "main", local_files_only=is_local_only(path)
        )
        return stored.decoder_start_token_id
    except (OSError, ValueError):
        return None
