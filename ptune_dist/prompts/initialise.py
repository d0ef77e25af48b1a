"""Where the virtual tokens start (Lester et al. 2021, section 3.2). P virtual tokens, D width, V vocabulary."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ptune_dist.errors import UserError

# The paper samples from the 5,000 first, so most common, tokens of its vocabulary.
NUM_COMMON_TOKENS = 5000

Lookup = Callable[[list[int]], torch.Tensor]  # token ids -> embeddings [len(ids), D]


def random_vectors(num: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """[P, D], uniform in [-0.5, 0.5) as in the paper."""
    return torch.rand(num, width, generator=generator) - 0.5


def vocab_vectors(num: int, tokenizer, lookup: Lookup, generator: torch.Generator) -> torch.Tensor:
    """[P, D]: embeddings of tokens drawn from the vocabulary's common part, special tokens left out."""
    special = set(tokenizer.all_special_ids)
    common = [i for i in sorted(tokenizer.get_vocab().values()) if i not in special][:NUM_COMMON_TOKENS]
    order = torch.randperm(len(common), generator=generator)[:num].tolist()
    if len(order) < num:  # a small vocabulary: draw with repetition
        order = torch.randint(len(common), (num,), generator=generator).tolist()
    return lookup([common[i] for i in order])


def text_vectors(num: int, text: str, tokenizer, lookup: Lookup) -> torch.Tensor:
    """[P, D]: embeddings of the text's tokens, repeated or cut to P."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise UserError(f"prompt.init_text: {text!r} has no tokens")
    return lookup((ids * (num // len(ids) + 1))[:num])


def label_vectors(num: int, labels: list[str], tokenizer, lookup: Lookup, generator: torch.Generator) -> torch.Tensor:
    """[P, D]: each label's mean embedding, then draws from the vocabulary for what is left of P."""
    if len(labels) > num:
        raise UserError(f"prompt.num_virtual_tokens is {num} but there are {len(labels)} labels to start from")
    means = [text_mean(label, tokenizer, lookup) for label in labels]
    rest = [vocab_vectors(num - len(means), tokenizer, lookup, generator)] if num > len(means) else []
    return torch.cat([torch.stack(means), *rest])


def text_mean(text: str, tokenizer, lookup: Lookup) -> torch.Tensor:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise UserError(f"prompt.init: the label {text!r} has no tokens")
    return lookup(ids).mean(dim=0)


def file_vectors(num: int, width: int, source: str) -> torch.Tensor:
    """[P, D] from a run, a prompt folder, a PEFT adapter folder or a safetensors file. Raises UserError."""
    names = ("prompt/prompt.safetensors", "prompt.safetensors", "adapter_model.safetensors")
    file = next((Path(source) / name for name in names if (Path(source) / name).is_file()), Path(source))
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"prompt.init_file: cannot read {file}: {error}") from None
    found = next((tensors[k] for k in ("virtual_tokens", "prompt_embeddings") if k in tensors), None)
    if found is None:
        raise UserError(f"prompt.init_file: {file} holds no virtual_tokens, only {', '.join(sorted(tensors)[:5])}")
    if tuple(found.shape) != (num, width):
        raise UserError(
            f"prompt.init_file: {file} holds {tuple(found.shape)}, "
            f"this prompt is (num_virtual_tokens, width) = {(num, width)}"
        )
    return found.float()


def build_initial_vectors(prompt, data, *, seed: int, width: int, tokenizer, lookup: Lookup) -> torch.Tensor:
    """The starting vectors [P, D] that config sections `prompt` and `data` ask for, a function of `seed` alone.

    Under ZeRO-3 `lookup` gathers, so this is collective: every rank must call.
    """
    generator = torch.Generator().manual_seed(seed)
    num = prompt.num_virtual_tokens
    if prompt.init == "random":
        return random_vectors(num, width, generator)
    if prompt.init == "text":
        return text_vectors(num, prompt.init_text, tokenizer, lookup)
    if prompt.init == "labels":
        return label_vectors(num, prompt.init_labels or data.labels, tokenizer, lookup, generator)
    if prompt.init == "file":
        return file_vectors(num, width, prompt.init_file)
    return vocab_vectors(num, tokenizer, lookup, generator)
