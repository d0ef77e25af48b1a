"""Trained prompts as an ordinary transformers folder: the base, with tokens that have the prompts' vectors."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ptune_dist.base.open import OpenedBase
from ptune_dist.base.source import is_local_only, load_shape
from ptune_dist.base.weight_files import find_weight_files
from ptune_dist.errors import UserError
from ptune_dist.export.token_prompts import (
    TokenPrompt,
    TrainedPrompt,
    check_vectors,
    choose_tokens,
    list_reserved,
)
from ptune_dist.export.tokenizer import chat_as_template, put_by_itself, put_by_name, save_tokenizer, set_system
from ptune_dist.export.weights import Changes, change_tokens, write_weights
from ptune_dist.run.parts import open_base_of
from ptune_dist.run.whole_model import whole_precision

CARRIED = ("*.model", "generation_config.json", "*processor_config.json", "LICENSE*", "NOTICE*")
HEAD = "head."


def export_tokens(prompts: Sequence[TrainedPrompt], out: Path, *, uses_reserved: bool, by_name: bool) -> list[str]:
    """Write a folder for any server that takes one; returns lines for people. Raises UserError.

    The prompts are of one base, of which no weight is loaded but the embeddings and the head.
    """
    for prompt in prompts:
        check_vectors(prompt)
    check_same_base(prompts)
    reading = prompts[0].reading
    model = reading.config.model
    if model.random_init:
        raise UserError("--to model: model.random_init: this base has no weight files: train over a stored one")
    tokenizer = reading.tokenizer
    reserved = [token for token in list_reserved(tokenizer) if "extra_id" not in token]  # T5 answers those
    unused = cast(int, tokenizer.convert_tokens_to_ids(reserved[-1])) if reserved else None
    placed = choose_tokens(prompts, tokenizer, uses_reserved=uses_reserved)
    by_name = by_name or len(prompts) > 1 or prompts[0].placement == "template"
    texts, late = put_prompts(tokenizer, placed, by_name=by_name)
    opened = open_base_of(whole_precision(reading))
    rows = {i: row for prompt in placed for i, row in zip(prompt.ids, prompt.trained.vectors, strict=True)}
    appended = set() if uses_reserved else set(rows)
    changes = with_head(change_tokens(opened, model.path, rows, appended, unused), opened, prompts[0])
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_tokenizer(tokenizer, late, out)
        write_folder(out, placed, changes, texts)
    except OSError as error:
        raise UserError(f"--out: {out}: {error.strerror or error}") from None
    return describe(placed, changes, by_name=by_name)


def check_same_base(prompts: Sequence[TrainedPrompt]) -> None:
    """Raise UserError for prompts that cannot be in one model."""
    first = prompts[0]
    for other in prompts[1:]:
        if other.facts["base"]["fingerprint"] != first.facts["base"]["fingerprint"]:
            paths = [prompt.reading.config.model.path for prompt in (first, other)]
            raise UserError(
                f"--to model: {first.name} was trained over {paths[0]} and {other.name} over another base, {paths[1]}: "
                "export them apart"
            )
        if first.reading.family.trains_head:
            raise UserError("--to model: each prompt over an encoder has a head of its own: export them apart")
        if other.reading.config.model.dtype != first.reading.config.model.dtype:
            raise UserError(f"--to model: model.dtype of {first.name} and {other.name} differ: give model.dtype=...")


def put_prompts(
    tokenizer: PreTrainedTokenizerBase, placed: Sequence[TokenPrompt], *, by_name: bool
) -> tuple[dict[str, str] | None, list[int]]:
    """Have tokenizer and chat template put the prompts.

    Returns the texts of their names, or None of one that needs none, and `late` as for `save_tokenizer`.
    """
    first = placed[0].trained.reading
    path = first.config.model.path
    chats = [prompt.trained.reading.encoding(prompt.trained.reading.config).chat for prompt in placed]
    texts = None
    late: list[int] = []
    if by_name:
        texts, late = put_by_name(tokenizer, placed, path)
    else:
        if first.family.name == "causal":
            chat_as_template(tokenizer, placed[0].trained.template)
        put_by_itself(tokenizer, placed[0], ends=first.family.frame_text().ends_input, path=path)
    begun = {(chat.system, chat.text) if chat else (None, "") for chat in chats}
    if len(begun) == 1:
        set_system(tokenizer, *begun.pop())
    return texts, late


def with_head(changes: Changes, opened: OpenedBase, prompt: TrainedPrompt) -> Changes:
    """The changes with the classification head that an encoder's prompt was trained with."""
    for name, tensor in prompt.tensors.items():
        if name.startswith(HEAD):
            own = name.removeprefix(HEAD)
            stored = opened.names.get(own)
            into = changes.new if stored is None else changes.replaced
            into[stored or own] = tensor.to(opened.dtype)
    return changes


def write_folder(
    out: Path,
    placed: Sequence[TokenPrompt],
    changes: Changes,
    texts: dict[str, str] | None,
) -> None:
    """All but the tokenizer's files."""
    reading = placed[0].trained.reading
    path = reading.config.model.path
    folder = find_weight_files(path, is_local_only(path))[0].parent
    for pattern in CARRIED:
        for file in sorted(folder.glob(pattern)):
            shutil.copyfile(file, out / file.name)
    write_weights(path, changes, out)
    shape = load_shape(path)
    reading.family.prepare_shape(shape, reading.config.data.labels)
    settings = change_settings(json.loads((folder / "config.json").read_text()), shape, placed[0].trained, changes)
    change_generation(out / "generation_config.json", placed, changes)
    (out / "prompts.json").write_text(json.dumps(list_prompts(placed, texts), indent=2, ensure_ascii=False) + "\n")
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")  # last: without it a folder is no model


def change_settings(
    settings: dict[str, Any], shape: PretrainedConfig, prompt: TrainedPrompt, changes: Changes
) -> dict[str, Any]:
    """A base's config.json with as many tokens as the exported model has, and a head of its own."""
    family = prompt.reading.family
    parts = [part for part in (settings, settings.get("text_config")) if isinstance(part, dict)]
    for part in parts:
        if "vocab_size" in part or part is parts[-1]:
            part["vocab_size"] = changes.num_tokens
        # An encoder-decoder whose head is tied scales it too; its files, which differ, untie it.
        if changes.has_untied and family.name == "causal":
            part["tie_word_embeddings"] = False
    dtypes = [key for key in ("dtype", "torch_dtype") if key in settings] or ["dtype"]
    settings |= dict.fromkeys(dtypes, prompt.reading.config.model.dtype)
    if family.trains_head:
        settings["architectures"] = [changes.architecture]
        of_labels = {key: value for key, value in shape.to_dict().items() if key in ("id2label", "label2id")}
        settings |= of_labels
    return settings


def change_generation(file: Path, placed: Sequence[TokenPrompt], changes: Changes) -> None:
    """Have answers end where the runs' did. A tied head of an encoder-decoder may be tied again by older releases."""
    reading = placed[0].trained.reading
    tokenizer = reading.tokenizer
    if reading.family.trains_head:
        return
    settings = json.loads(file.read_text()) if file.is_file() else {}
    ends = settings.get("eos_token_id")
    known = ends if isinstance(ends, list) else [ends]
    if tokenizer.eos_token_id not in known:
        settings["eos_token_id"] = [i for i in [*known, tokenizer.eos_token_id] if i is not None]
    if changes.has_untied and reading.family.name != "causal":
        settings["suppress_tokens"] = sorted(i for prompt in placed for i in prompt.ids)
    file.write_text(json.dumps(settings, indent=2) + "\n")


def list_prompts(placed: Sequence[TokenPrompt], texts: dict[str, str] | None) -> dict[str, Any]:
    """What a client needs to know of each prompt."""
    found = {}
    for prompt in placed:
        trained = prompt.trained
        data = trained.reading.config.data
        found[trained.name] = {
            "placement": trained.placement,
            "name": None if texts is None else prompt.name_token,
            "text": prompt.text if texts is None else texts[trained.name],
            "token_ids": prompt.ids,
            "template": trained.template,
            "chat": data.is_chat,
            "max_new_tokens": trained.facts.get("longest_target"),
        }
    return {"base": placed[0].trained.reading.config.model.path, "prompts": found}


def describe(placed: Sequence[TokenPrompt], changes: Changes, *, by_name: bool) -> list[str]:
    """Lines for people: which tokens there are and how a text gets them."""
    lines = []
    for prompt in placed:
        where = "last" if prompt.trained.placement == "infix" else "first"
        how = f"write {prompt.name_token}" if by_name else f"put {where} by the tokenizer and the chat template"
        lines.append(f"prompt {prompt.trained.name}: {len(prompt.ids)} tokens, {prompt.tokens[0]} ...; {how}")
    if changes.is_rounded:
        dtype = str(next(iter(changes.replaced.values())).dtype).removeprefix("torch.")
        lines.append(f"the vectors are rounded to {dtype}, in which the base's embeddings are stored")
    return lines
