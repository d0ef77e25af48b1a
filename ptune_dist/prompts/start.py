"""Where a prompt starts (Lester et al. 2021, section 3.2): random numbers, the vocabulary, a text, labels, or a file.

Shapes: P virtual tokens, D width.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from ptune_dist.data.framing import check_ids, special_ids
from ptune_dist.errors import UserError

# The paper samples from the 5,000 most common tokens, which are the first of its vocabulary.
NUM_COMMON_TOKENS = 5000
PROMPT_FILES = ("prompt/prompt.safetensors", "prompt.safetensors", "adapter_model.safetensors")
VECTOR_ADAPTERS = ("PROMPT_TUNING", "P_TUNING", "CPT")  # PEFT's types whose prompt_embeddings are virtual tokens
VECTOR_NAMES = ("virtual_tokens", "prompt_embeddings")  # ours and PEFT's
BASE = "base."  # tensors of the base that a method has trained
VALUE_HEAD = "value_head."  # the head that answers numbers

NOTHING = "nothing"

ReadExamples = Callable[[], Iterable[tuple[list[int], list[int]]]]  # of each training row, input and target
Lookup = Callable[[list[int]], torch.Tensor]  # token ids -> embeddings [len(ids), D]
ReadRows = Callable[[], Iterable[list[int]]]  # the token ids of each training row, input and target


class Source(NamedTuple):
    """A stored prompt: its tensors, the facts of ours, and PEFT's settings of an adapter; either may be empty."""

    file: Path
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]
    settings: dict[str, Any]


@dataclass
class Start:
    """The start that config section `prompt` asks for; a function of `seed` alone.

    `lookup` reads rows of the base's embeddings. Kind NOTHING gives zeros: a trained prompt will be loaded.
    num_embeddings: the base's, where the tokenizer has ids beyond them. asked: prompt.init, also where kind is NOTHING.
    rows: those to train on, if any. tasks: the names of the rows' tasks.
    """

    kind: str  # prompt.init, or NOTHING
    seed: int
    tokenizer: PreTrainedTokenizerBase
    lookup: Lookup
    text: str | None = None
    labels: list[str] | None = None
    file: str | None = None
    num_embeddings: int | None = None
    asked: str = NOTHING
    placement: str = "prefix"
    rows: ReadRows | None = None
    tasks: list[str] = field(default_factory=list)
    read_stored: Lookup | None = None  # the base's embeddings as its files have them: Gemma scales what it looks up
    read_examples: ReadExamples | None = None

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def vectors(self, num: int, width: int) -> torch.Tensor:
        """Virtual tokens [P, D]. Raises UserError."""
        if self.kind == NOTHING:
            return torch.zeros(num, width)
        if self.kind == "random":
            return random_vectors(num, width, self.generator)
        if self.kind == "text":
            return self._text_vectors(num)
        if self.kind == "labels":
            return self._label_vectors(num)
        if self.kind == "file":
            return read_vectors(self.file or "", num, width)
        return self._vocab_vectors(num)

    def tensors(self, wanted: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """The tensors of these names and shapes in `prompt.init_file`, in float32. Raises UserError."""
        file = find_prompt_file(self.file or "")
        stored = read_tensors(file)
        missing = [name for name in wanted if name not in stored]
        if missing:
            text = f"prompt.init_file: {file} holds no {missing[0]}, {describe_held(file, stored)}: a prompt of this "
            text += "method cannot be trained further from it"
            kind = read_adapter_settings(file.parent).get("peft_type", "PROMPT_TUNING")
            if kind in VECTOR_ADAPTERS and any(name in stored for name in VECTOR_NAMES):
                text += "; prompt.method=prompt_tuning can, from its plain vectors"
            raise UserError(text)
        for name, shape in wanted.items():
            if tuple(stored[name].shape) != tuple(shape):
                raise UserError(
                    f"prompt.init_file: {file} holds {name} {tuple(stored[name].shape)}, this prompt has {tuple(shape)}"
                )
        return {name: stored[name].float() for name in wanted}

    def stored_embeddings(self, ids: list[int]) -> torch.Tensor:
        """The base's own embeddings [len(ids), D] as its files have them."""
        assert self.read_stored is not None, "whoever builds a prompt for a base can read its embeddings"
        return self.read_stored(ids)

    def holds(self, *prefixes: str) -> bool:
        """Whether `prompt.init_file` is given and has tensors whose names begin so. Raises UserError."""
        return self.kind == "file" and any(name.startswith(prefixes) for name in self.read().tensors)

    def read(self) -> "Source":
        """What `prompt.init_file` holds. Raises UserError."""
        file = find_prompt_file(self.file or "")
        return Source(file, read_tensors(file), read_facts(file), read_adapter_settings(file.parent))

    def tokens(self, num: int, num_rows: int | None = None) -> list[int]:
        """Token ids [num] of the text or the rows to start from, repeated or cut; a text begins as the base reads one.

        Empty where no rows are read. Raises UserError.
        """
        if self.kind == "text":
            begin = special_ids(self.tokenizer)[0]
            return (begin + repeat(self._encode(self.text or "", "prompt.init_text"), num))[:num]
        if self.rows is None:
            return []
        found: list[int] = []
        count = 0
        for ids in self.rows():
            if count == num_rows or (num_rows is None and len(found) >= num):
                break
            found += ids
            count += 1
        if num_rows is not None and count < num_rows:
            raise UserError(f"prompt.init_rows is {num_rows} but there are {count} training rows")
        return repeat(found, num)[:num]

    def base_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the base that `prompt.init_file` holds, by their names there, in float32.

        A run that answers numbers may have trained its head alone. Raises UserError.
        """
        file = find_prompt_file(self.file or "")
        stored = read_tensors(file)
        found = {name: tensor.float() for name, tensor in stored.items() if name.startswith(BASE)}
        if not found and not any(name.startswith(VALUE_HEAD) for name in stored):
            raise UserError(f"prompt.init_file: {file} has no tensors of a base, {describe_held(file, stored)}")
        return found

    def examples(self) -> Iterable[tuple[list[int], list[int]]]:
        """Token ids of the training rows, (input, target) each; none where no rows are read."""
        return self.read_examples() if self.read_examples is not None else ()

    def _text_vectors(self, num: int) -> torch.Tensor:
        """[P, D]: embeddings of the text's tokens, repeated or cut to P."""
        ids = self._encode(self.text or "", "prompt.init_text")
        return self.lookup(repeat(ids, num)[:num])

    def _vocab_vectors(self, num: int) -> torch.Tensor:
        """[P, D]: embeddings of tokens drawn from the common part of the vocabulary, special tokens left out."""
        special = set(self.tokenizer.all_special_ids)
        ids = sorted(self.tokenizer.get_vocab().values())
        if self.num_embeddings is not None:
            ids = [i for i in ids if i < self.num_embeddings]
        common = [i for i in ids if i not in special][:NUM_COMMON_TOKENS]
        order = torch.randperm(len(common), generator=self.generator)[:num].tolist()
        if len(order) < num:  # a small vocabulary: draw with repetition
            order = torch.randint(len(common), (num,), generator=self.generator).tolist()
        return self.lookup([common[i] for i in order])

    def _label_vectors(self, num: int) -> torch.Tensor:
        """[P, D]: each label's mean embedding, then draws from the vocabulary for the rest of P."""
        labels = self.labels or []
        if len(labels) > num:
            raise UserError(f"prompt.num_virtual_tokens is {num} but there are {len(labels)} labels to start from")
        parts = [torch.stack([self._mean_of(label) for label in labels])]
        if num > len(labels):
            parts.append(self._vocab_vectors(num - len(labels)))
        return torch.cat(parts)

    def _mean_of(self, text: str) -> torch.Tensor:
        return self.lookup(self._encode(text, "prompt.init: the label")).mean(dim=0)

    def _encode(self, text: str, what: str) -> list[int]:
        """Token ids, at least one, that all have an embedding. Raises UserError."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if not ids:
            raise UserError(f"{what}: {text!r} has no tokens")
        check_ids(ids, self.num_embeddings, self.tokenizer, lambda: f"{what}: {text!r}")
        return ids


def repeat(ids: list[int], num: int) -> list[int]:
    """Token ids repeated to `num` or more."""
    return ids * (num // len(ids) + 1)


def random_vectors(num: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """[P, D], uniform in [-0.5, 0.5) as in the paper."""
    return torch.rand(num, width, generator=generator) - 0.5


def find_prompt_file(source: str) -> Path:
    """The tensor file of a run, a prompt folder or a PEFT adapter folder; a file is itself."""
    return next((Path(source) / name for name in PROMPT_FILES if (Path(source) / name).is_file()), Path(source))


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Raises UserError."""
    if file.is_dir():
        raise UserError(f"prompt.init_file: {file} has none of {', '.join(PROMPT_FILES)}")
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"prompt.init_file: cannot read {file}: {error}") from None


def read_vectors(source: str, num: int, width: int) -> torch.Tensor:
    """Plain virtual tokens [P, D] from a run, a prompt folder, a PEFT adapter folder or a safetensors file.

    PEFT's p-tuning adapters hold the vectors with their encoder folded in. Raises UserError.
    """
    file = find_prompt_file(source)
    tensors = read_tensors(file)
    found = next((tensors[name] for name in VECTOR_NAMES if name in tensors), None)
    if found is None:
        raise UserError(f"prompt.init_file: {file} holds no virtual_tokens, {describe_held(file, tensors)}")
    if found.dim() == 3:
        raise UserError(
            f"prompt.init_file: {file} is a prompt of {len(found)} tasks: export one with ptune-dist export --task"
        )
    settings = read_adapter_settings(file.parent)
    kind = settings.get("peft_type", "PROMPT_TUNING")
    if kind not in VECTOR_ADAPTERS:
        raise UserError(f"prompt.init_file: {file} is a PEFT adapter of type {kind}, which holds no virtual tokens")
    if settings.get("num_transformer_submodules") == 2:  # PEFT keeps rows for a decoder too, which nothing reads
        found = found[: len(found) // 2]
    if tuple(found.shape) != (num, width):
        raise UserError(
            f"prompt.init_file: {file} holds {tuple(found.shape)}, "
            f"this prompt is (num_virtual_tokens, width) = {(num, width)}"
        )
    return found.float()


def describe_held(file: Path, tensors: dict[str, torch.Tensor]) -> str:
    """What a file holds, for a message: the method of a prompt that is ours, else the names of some tensors."""
    method = read_facts(file).get("method")
    return f"but a prompt of {method}" if method else f"only {', '.join(sorted(tensors)[:5])}"


def read_facts(file: Path) -> dict[str, Any]:
    """What a run stored about its prompt, in the header of the tensors; empty where a file is of another kind."""
    try:
        with safe_open(file, framework="pt") as opened:
            return json.loads((opened.metadata() or {}).get("facts", "{}"))
    except (OSError, SafetensorError, ValueError):
        return {}


def read_adapter_settings(folder: Path) -> dict[str, Any]:
    """PEFT's adapter_config.json beside its tensors; empty where there is none."""
    try:
        return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
