"""Text encoders with a classification head (BERT, RoBERTa, ...): [virtual tokens, input] is read, a label answered.

The head is new: it is trained with the prompt and stored with it. For regression it has one output.
Shapes: S readers, U supervised readers, T tokens, P virtual tokens, V labels.
"""

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from ptune_dist.base.architecture import model_types
from ptune_dist.base.trained import is_outside
from ptune_dist.data.batches import Batch, Unit, pad_rows
from ptune_dist.data.examples import Examples
from ptune_dist.data.framing import Framing, LabelTargets, NumberTargets, Targets
from ptune_dist.errors import UserError
from ptune_dist.families.family import Family
from ptune_dist.families.seq2seq import count_padded
from ptune_dist.model.encoder_prefix import EncoderPrefixes
from ptune_dist.model.keys_values import KeysValues
from ptune_dist.model.members import keys_values_of
from ptune_dist.model.passes import Contexts, LossOf
from ptune_dist.model.prompted_model import PromptedModel

POOLER = ".pooler."
BESIDE = "mix a row with the padding beside it, so an answer would depend on the other rows of its batch"
REFUSED = {  # model type -> why
    "convbert": BESIDE,
    "fnet": BESIDE,
    "nystromformer": BESIDE,
    "yoso": BESIDE,
    "esmc": "cannot continue from input vectors",
    "esm": "scale token embeddings by what is masked in a row, which input vectors do not tell",
    "reformer": "draw random numbers in training mode, without which they have no gradient",
    "longformer": "choose global attention by token ids, which input vectors do not tell",
}


class PromptedEncoder(PromptedModel):
    """Rows are padded; the base's own head gives the outputs."""

    has_language_head = False

    def __init__(self, base: PreTrainedModel, *args: Any, **options: Any):
        super().__init__(base, *args, **options)
        self._prefixes = EncoderPrefixes(base) if any(self.num_prefix) else None

    def count_positions(self, units: list[Unit], examples: Examples, *, with_contexts: bool = True) -> int:
        return count_padded(self, units, examples, with_contexts=with_contexts)

    def label_logits(
        self, texts: list[np.ndarray], members: list[int], below: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """[S, V]; of a regression [S, 1]. `below`: what stands for the texts where a prompt enters at a later layer."""
        start = self.start_layers[members[0]]
        contributions = self.contributions(start)
        vectors, mask = self.embed(texts, members, contributions, below=below)
        # A base has one member, for it has one head.
        inputs = self._after(keys_values_of(contributions[members[0]]), vectors, mask, start)
        if not start:
            return self.base(inputs_embeds=vectors, **inputs).logits
        with self.layer_parts.above(start, vectors):
            return self.base(inputs_embeds=self.no_vectors(*vectors.shape[:2]), **inputs).logits

    def _after(
        self, prefix: KeysValues | None, vectors: torch.Tensor, mask: torch.Tensor, start: int = 0
    ) -> dict[str, Any]:
        """Inputs of rows [S, T, D] of this mask that read a prefix in the layers from `start` on, or none."""
        if prefix is None:
            return {"attention_mask": mask}
        assert self._prefixes is not None, "a member has keys and values"
        return self._prefixes.inputs(prefix.to(vectors.dtype), mask, start)

    def run_layers(self, vectors: torch.Tensor) -> None:
        self.base(inputs_embeds=vectors, attention_mask=torch.ones(vectors.shape[:2], device=vectors.device).long())

    @torch.no_grad()
    def read_contexts(self, work: Contexts) -> list[tuple[torch.Tensor, ...]]:
        """What the layers below `start_layer` leave of each text; without one, each text's keys and values."""
        padded, present = pad_rows(work.tokens, work.pad_id)
        vectors = self.embed_tokens(self.to_tensor(padded).flatten()).unflatten(0, padded.shape)
        mask = self.to_tensor(present)
        if not work.start_layer:
            assert self._prefixes is not None, "only keys and values start from those of a text"
            recorder = self._prefixes.recorder()
            self.base(inputs_embeds=vectors, attention_mask=mask, **recorder.inputs)
            return [recorder.cut(row, len(tokens)).tensors for row, tokens in enumerate(work.tokens)]
        with self.layer_parts.below(work.start_layer) as captured:
            self.base(inputs_embeds=vectors, **self._after(work.lead, vectors, mask))
        assert captured.hidden is not None
        return [(row[: len(tokens)],) for row, tokens in zip(captured.hidden, work.tokens, strict=True)]

    def row_below(self, batch: Batch, row: int) -> tuple[np.ndarray, int]:
        return batch.rests[row], 0

    def outputs(self, batch: Batch) -> torch.Tensor:
        """The logits, flat."""
        return self.label_logits(batch.rests, [0] * len(batch.rests), self.below_of(batch)).flatten()

    def plain_outputs(self, batch: Batch, virtual: np.ndarray) -> torch.Tensor:
        found = []
        for rest in batch.rests:
            ids = self.to_tensor(np.concatenate([virtual, rest]))[None]
            found.append(self.base(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.flatten())
        return torch.cat(found)

    def name_labels(self, texts: list[np.ndarray], number: int) -> list[str]:
        nothing = [np.zeros(0, np.int64)] * len(texts)
        member = self.member_of(number)
        batch = self.read_below(Batch(nothing, texts, nothing, [(row, member) for row in range(len(texts))], pad_id=0))
        logits = self.label_logits(texts, [number] * len(texts), self.below_of(batch))
        names = self.base.config.id2label
        assert names is not None, "transformers names the labels of every classifier"
        return [names[index] for index in logits.argmax(dim=1).tolist()]

    scores_trees = True  # the classes of one output

    def _label_losses(self, batch: Batch) -> list[np.ndarray]:
        assert batch.trees is not None, "labels are scored of rows that have some"
        logits, reader = self._outputs(batch)
        found = [np.zeros(0) for _ in batch.readers]
        for number, outputs in zip(reader.tolist(), logits, strict=True):
            targets = self.to_tensor(batch.trees[batch.readers[number][0]].targets)
            losses = self.objective.validation_losses(outputs.expand(len(targets), -1), targets)
            found[number] = batch.trees[batch.readers[number][0]].sum_paths(losses.double().cpu().numpy())
        return found

    def _losses(self, batch: Batch, loss_of: LossOf, *, with_own: bool = False) -> tuple[torch.Tensor, np.ndarray]:
        if self.predicts_numbers:
            return self._number_losses(batch, loss_of)
        logits, reader = self._outputs(batch)
        targets = np.concatenate([batch.targets[row] for row, _ in batch.readers])
        return loss_of(logits, self.to_tensor(targets)), reader

    def _predict(self, batch: Batch) -> tuple[torch.Tensor, np.ndarray]:
        outputs, reader = self._outputs(batch)
        return outputs[:, 0].float(), reader

    def _outputs(self, batch: Batch) -> tuple[torch.Tensor, np.ndarray]:
        """Outputs [U, V] of the readers that have a target, and their numbers: a rank that idles has none."""
        readers = self.by_contribution(batch).readers
        has_target = np.array([len(batch.targets[row]) > 0 for row, _ in readers])
        reader = np.flatnonzero(has_target)
        texts = [batch.rests[row] for row, _ in readers]
        logits = self.label_logits(texts, [member for _, member in readers], self.below_of(batch))
        return logits[self.to_tensor(reader)], reader


class Encoder(Family):
    """Classifies, or scores, an input that ends as a text ends."""

    name = "encoder"
    auto_class = AutoModelForSequenceClassification
    architectures = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    model_class = PromptedEncoder
    placements = ("prefix",)
    peft_task = "SEQ_CLS"
    trains_head = True
    has_contexts = False

    def is_own(self, shape: PretrainedConfig) -> bool:
        is_masked_model = any(kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES for kind in model_types(shape))
        return is_masked_model and not shape.is_encoder_decoder and not getattr(shape, "is_decoder", False)

    def frame_text(self) -> Framing:
        return Framing(ends_input=True)

    def build_targets(
        self, objective_target: str, tokenizer: PreTrainedTokenizerBase, labels: list[str] | None, append_eos: bool
    ) -> Targets:
        return NumberTargets() if objective_target == "number" else LabelTargets(labels or [])

    def prepare_shape(self, shape: PretrainedConfig, labels: list[str] | None) -> None:
        if labels:
            shape.id2label = dict(enumerate(labels))
            shape.label2id = {label: number for number, label in enumerate(labels)}
            shape.problem_type = "single_label_classification"
        else:
            shape.num_labels = 1
            shape.problem_type = "regression"

    def check_model(self, model: PreTrainedModel, path: str) -> None:
        super().check_model(model, path)
        why = REFUSED.get(model.config.model_type)
        if why is not None:
            raise UserError(f"model.path: {path}: {model.config.model_type} models {why}")
        if getattr(model.config, "default_language", "any") is None:  # X-MOD has adapters for each language
            raise UserError(f"model.path: {path}/config.json names no default_language: set it there")

    def trained_names(self, model: PreTrainedModel, new: list[str]) -> set[str]:
        return {name for name, _ in model.named_parameters() if is_outside(model, name) or name in new}

    def may_start_anew(self, model: PreTrainedModel, name: str) -> bool:
        """The head, or a pooler, which masked language models lack."""
        return is_outside(model, name) or POOLER in name

    def may_be_left_out(self, model: PreTrainedModel, stored: str) -> bool:
        """Another head, or a pooler that this architecture does without."""
        parts = dict(model.base_model.named_children())
        is_other_head = is_outside(model, stored) and stored.partition(".")[0] not in parts
        return is_other_head or POOLER in f".{stored}"

    def generation_config(self, shape: PretrainedConfig) -> None:
        return None
