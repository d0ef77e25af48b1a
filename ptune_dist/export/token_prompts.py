"""Which tokens of a model stand for the vectors of trained prompts: appended ones, or tokens that the base reserves."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import AddedToken, PreTrainedTokenizerBase

from ptune_dist.errors import UserError
from ptune_dist.export.kv import check_for_kv
from ptune_dist.prompts.export import fits, name_other_export
from ptune_dist.prompts.start import BASE
from ptune_dist.run.reading import Reading

RESERVED = re.compile(
    r"<\|?(?:reserved(?:_special_token)?_\d+|unused_?(?:token_)?\d+|extra_id_\d+|dummy_\d+|SPECIAL_\d+)\|?>"
    r"|\[(?:unused|control_)\d+\]"
)
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class TrainedPrompt:
    """What a run has trained: its tensors, the facts beside them, and how its rows are read."""

    name: str
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]
    reading: Reading

    @property
    def vectors(self) -> torch.Tensor:
        """[P, D]."""
        return self.tensors["virtual_tokens"]

    @property
    def placement(self) -> str:
        return self.facts["placement"]

    @property
    def template(self) -> str | None:
        """`data.template` with the texts of `prompt.text` around it; None of plain text and of conversations."""
        config = self.reading.config
        source = config.data.template
        around = config.prompt.around
        if source is None:
            return None
        source = source.removesuffix("\n") if around.after and not around.joins else source
        return around.head() + source + around.tail()


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt and the tokens that stand for its vectors, one for each."""

    trained: TrainedPrompt
    tokens: list[str]
    ids: list[int]

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def name_token(self) -> str:
        """What is written in a text to have the prompt there."""
        return f"<|{self.trained.name}|>"


def check_vectors(prompt: TrainedPrompt) -> None:
    """Raise UserError for a prompt that is no set of input vectors before, in or after a text."""
    method = prompt.facts.get("method", "prompt_tuning")
    tensors = prompt.tensors
    if "prefix_keys" in tensors:
        fits_cache = fits(check_for_kv, tensors, prompt.facts)
        other = ": use --to kv" if fits_cache else name_other_export(tensors, prompt.facts)
        raise UserError(f"--to model: {method} trains keys and values, which are no tokens{other}")
    if "virtual_tokens" not in tensors:
        if any(name.startswith(BASE) for name in tensors):
            raise UserError(f"--to model: {method} trains tensors of the base, so its run makes a model alone")
        other = name_other_export(tensors, prompt.facts)
        raise UserError(f"--to model: {method} trains more than the base has{other}")
    if any(name.startswith("value_head.") for name in tensors):
        raise UserError("--to model: this prompt was trained with a head that answers numbers, which no server has")
    if prompt.vectors.dim() == 3:
        raise UserError(f"--to model: this prompt is of {len(prompt.vectors)} tasks: choose one with --task")
    if prompt.placement == "decoder":
        raise UserError("--to model: prompt.placement=decoder puts virtual tokens where no text is given to a server")


def name_prompts(folders: Sequence[str], given: Sequence[str]) -> list[str]:
    """A name for each run: those given, or its folder's. Raises UserError."""
    if given and len(given) != len(folders):
        raise UserError(f"--names: {len(given)} names for {len(folders)} runs: give one for each, with commas between")
    names = [NOT_IN_NAMES.sub("_", name).strip("_") for name in given or folders]
    for name in names:
        if not name:
            raise UserError("--names: a name needs a letter or a digit")
        if names.count(name) > 1:
            raise UserError(f"--names: two runs are called {name}: give a name for each, with commas between")
    return names


def choose_tokens(
    prompts: Sequence[TrainedPrompt], tokenizer: PreTrainedTokenizerBase, *, uses_reserved: bool
) -> list[TokenPrompt]:
    """Give each vector a token; `tokenizer` gets those that it does not have. Raises UserError."""
    free = list_reserved(tokenizer) if uses_reserved else []
    needed = sum(len(prompt.vectors) for prompt in prompts)
    if uses_reserved and len(free) < needed:
        raise UserError(f"--reserved: the base reserves {len(free)} tokens and the prompts need {needed}: leave it out")
    found = []
    for prompt in prompts:
        count = len(prompt.vectors)
        tokens = free[:count] if uses_reserved else [f"<|{prompt.name}_{i}|>" for i in range(count)]
        free = free[count:]
        known = tokenizer.get_vocab()
        taken = next((token for token in tokens if token in known), None)
        if taken is not None and not uses_reserved:
            raise UserError(f"--names: the base has a token {taken} already: choose another name")
        # A normalizer writes them in place of a prompt's name, so they are looked for in the text that it leaves.
        added = [AddedToken(token, special=True, normalized=True) for token in tokens]
        tokenizer.add_tokens(added, special_tokens=True)
        ids = cast(list[int], tokenizer.convert_tokens_to_ids(tokens))
        found.append(TokenPrompt(prompt, tokens, ids))
    return found


def list_reserved(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that a base has for others' use, in the order of their ids, without those that it uses itself."""
    used = {str(getattr(tokenizer, role, None)) for role in ROLES}
    template = str(tokenizer.chat_template or "")
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [token for token, _ in by_id if RESERVED.fullmatch(token) and token not in used and token not in template]
