"""Take a trained prompt elsewhere: a PEFT adapter, or the embeddings that vLLM's prompt-embeds input takes."""

import base64
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ptune_dist.common.files import replace_file
from ptune_dist.common.hub import split_revision
from ptune_dist.data.encode import TokenPair
from ptune_dist.errors import UserError
from ptune_dist.prompts import METHODS
from ptune_dist.prompts.late_prompt import GENERATOR
from ptune_dist.prompts.late_prompt import VECTORS as LATE_VECTORS
from ptune_dist.prompts.peft_prefix import as_cartridge, for_decoder
from ptune_dist.prompts.prefix_file import PLAIN
from ptune_dist.prompts.start import BASE, VALUE_HEAD, read_adapter_settings

# PEFT's types that exports are of.
OWN_ADAPTERS = (
    "PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "CARTRIDGE",
    "MULTITASK_PROMPT_TUNING",
    "TRAINABLE_TOKENS",
    "ADAPTION_PROMPT",
)
CARTRIDGE = "cartridge"
SEQ2SEQ = "seq2seq"
POOLER = ".pooler."


ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
EXPORTED = {
    "peft": ADAPTER_FILES,
    CARTRIDGE: ADAPTER_FILES,
    "prompt-embeds": ("prompt_embeds.safetensors", "requests.jsonl"),
    "kv": ("past_key_values.safetensors", "past_key_values.json"),
    "vectors": ("vectors.safetensors", "vectors.json"),
    "model": (),  # an earlier one could be anybody's model
}


def check_export_folder(out: Path, to: str) -> None:
    """Raise UserError for a folder that holds anything but an earlier export of this kind; hidden files may stay."""
    if not out.is_dir():
        return
    names = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    other = [name for name in names if name not in EXPORTED[to]]
    if other:
        what = "another model or other files" if to == "model" else f"{other[0]}, which no export to {to} has"
        raise UserError(f"--out: {out} holds {what}: choose an empty or a new folder")
    settings = read_adapter_settings(out)
    kind = settings.get("peft_type", "PROMPT_TUNING")
    if "auto_mapping" in settings:  # which PEFT always writes
        raise UserError(f"--out: {out} holds an adapter that PEFT has written: choose an empty or a new folder")
    if kind not in OWN_ADAPTERS:
        raise UserError(f"--out: {out} holds a PEFT adapter of type {kind}: choose an empty or a new folder")


def check_for_peft(tensors: dict[str, torch.Tensor], facts: dict[str, Any], to: str = "peft") -> None:
    """Raise UserError for a prompt that PEFT cannot place: it puts virtual tokens before everything."""
    name = facts.get("method", "prompt_tuning")
    if METHODS[name].trains_base:
        raise UserError(f"--to {to}: PEFT has no {name}{name_other_export(tensors)}")
    if LATE_VECTORS in tensors:
        other = name_other_export(tensors)
        raise UserError(f"--to {to}: PEFT has no method whose virtual tokens enter at a later layer{other}")
    if to == CARTRIDGE and "prefix_keys" not in tensors:
        raise UserError(f"--to cartridge: a cartridge is keys and values, and this is {name}: use --to peft")
    if "prefix_keys" in tensors and tensors["prefix_keys"].shape != tensors["prefix_values"].shape:
        raise UserError(f"--to {to}: PEFT has no keys and values of unequal width, and this base has")
    if not is_of_seq2seq(facts) and differ_by_layer(tensors, facts):
        raise UserError(f"--to {to}: PEFT has no keys and values of layers that differ, and this base has")
    known = METHODS[name].peft_bases
    if known is not None and facts["base"]["model_type"] not in known:
        kind = facts["base"]["model_type"]
        raise UserError(f"--to peft: PEFT has {name} for {', '.join(known)} models only, not for {kind}")
    if "prefix_keys" in tensors and is_of_seq2seq(facts):
        if facts["placement"] != "decoder":
            raise UserError(f"--to {to}: PEFT's prefixes are the decoder's alone, which is prompt.placement=decoder")
    elif facts["placement"] not in ("prefix", "encoder"):
        has_vectors = facts["placement"] != "decoder" and "prefix_keys" not in tensors
        other = ": use --to prompt-embeds" if has_vectors else ""
        raise UserError(f"--to {to}: PEFT has no placement {facts['placement']}{other}")
    if any(name.startswith(VALUE_HEAD) for name in tensors):
        raise UserError(f"--to {to}: PEFT has no head that answers numbers for language models")
    if facts.get("options", {}).get("from_layer") and "lower_keys" not in tensors:
        raise UserError(f"--to {to}: PEFT's prefixes are in all layers, this one begins with prompt.from_layer")


def differ_by_layer(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> bool:
    """Whether the layers of a prefix have unlike heads; one tensor has fewer layers then than the base."""
    stored = [tensors[name] for name in ("lower_keys", "prefix_keys") if name in tensors]
    num_layers = facts.get("base", {}).get("num_layers")
    if not stored or num_layers is None:
        return False
    num_below = 0 if "lower_keys" in tensors else facts.get("options", {}).get("from_layer", 0)
    return sum(map(len, stored)) + num_below != num_layers or len({part.shape[2:] for part in stored}) > 1


def is_of_seq2seq(facts: dict[str, Any]) -> bool:
    return facts.get("base", {}).get("family") == SEQ2SEQ


def export_peft(
    tensors: dict[str, torch.Tensor],
    facts: dict[str, Any],
    task_type: str,
    out: Path,
    shape: str | None = None,
    to: str = "peft",
) -> None:
    """Write an adapter folder for `peft.PeftModel.from_pretrained(base, out)`. Raises UserError.

    The format is PEFT's: one tensor `prompt_embeddings` and its configuration. An encoder's head is beside it as
    `base_model.NAME`; its base is to be loaded for as many labels (`num_labels`), in their order. `task_type` is PEFT's
    name for the base's family. `shape` is a config.json that names the labels of an encoder, to load its base with.
    """
    adapter = METHODS[facts["method"]].to_peft(tensors)
    settings = adapter.settings
    if to == CARTRIDGE:  # an older prompt had no frozen positions
        num_frozen = tensors["frozen_values"].shape[1] if "frozen_values" in tensors else 0
        settings = as_cartridge(settings, num_frozen)
    if "prefix_keys" in tensors and is_of_seq2seq(facts):
        adapter = for_decoder(adapter, settings)
        settings = adapter.settings
    modules = facts.get("modules", {})
    head = {name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")}
    base_name, revision = split_revision(facts["base"]["path"])
    config = {
        "task_type": task_type,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "revision": revision,
    }
    stored = {name.format(**modules): tensor.contiguous() for name, tensor in adapter.more.items()}
    if adapter.prompt_embeddings is None:
        stored |= {f"base_model.model.{name}": tensor for name, tensor in head.items()}
    else:
        stored |= {"prompt_embeddings": adapter.prompt_embeddings.contiguous()}
        stored |= {f"base_model.{name}": tensor for name, tensor in head.items()}
        config |= prompt_settings(facts) | {"modules_to_save": head_modules(head) or None}
    config |= {key: fill_name(value, modules) for key, value in settings.items()}
    files = {
        "adapter_model.safetensors": save(stored, {"format": "pt"}),
        "adapter_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }
    if shape is not None:
        files["config.json"] = shape.encode()
    write_folder(out, files)


def prompt_settings(facts: dict[str, Any]) -> dict[str, Any]:
    """What PEFT's configuration says of every prompt."""
    return {
        "num_virtual_tokens": facts["num_virtual_tokens"],
        "token_dim": facts["width"],
        "num_layers": facts["base"]["num_layers"],
        "num_attention_heads": facts["base"]["num_attention_heads"],
        "num_transformer_submodules": 1,  # of seq2seq too: its decoder gets no virtual tokens
    }


def fill_name(value: Any, modules: dict[str, Any]) -> Any:
    """A setting in which the names of a base's modules are put."""
    return value.format(**modules) if isinstance(value, str) else value


def head_modules(names: Iterable[str]) -> list[str]:
    """The modules that hold a head's parameters, as PEFT wraps them: a head whole, a pooler's layer by itself."""
    return sorted({name.rpartition(".")[0] if POOLER in name else name.partition(".")[0] for name in names})


def export_prompt_embeds(
    tensors: dict[str, torch.Tensor],
    embed: Any,
    inputs: Sequence[TokenPair],
    dtype: torch.dtype,
    out: Path,
    placeholder: int = 0,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write `prompt_embeds.safetensors`: `virtual_tokens` [P, D], and `prompt_embeds.I` [T, D] for each input.

    With inputs, `requests.jsonl` has a line for each, as vLLM's server takes them; token id `placeholder` stands for
    the virtual tokens there.

    The latter stand in the order in which the base reads them: context, virtual tokens, rest. `embed` maps T token ids,
    at least one, to [T, D]. The tensors are in the base's dtype, as vLLM wants them; those of a seq2seq base are its
    encoder's `inputs_embeds`. Raises UserError, also for an encoder: its answers need its head.
    """
    other = name_other_export(tensors, facts)
    if any(name.startswith("head.") for name in tensors):
        raise UserError(f"--to prompt-embeds: this prompt was trained with a classification head{other}")
    if any(name.startswith(VALUE_HEAD) for name in tensors):
        raise UserError("--to prompt-embeds: this prompt was trained with a head that answers numbers")
    if LATE_VECTORS in tensors:
        raise UserError(f"--to prompt-embeds: this prompt enters at a later layer and has no input embeddings{other}")
    if any(name.startswith(BASE) for name in tensors):
        raise UserError(f"--to prompt-embeds: this run trained tensors of the base and no prompt{other}")
    if PLAIN[0] in tensors:
        raise UserError("--to prompt-embeds: this prompt has keys and values of every layer and no input embeddings")
    if "virtual_tokens" not in tensors:
        raise UserError(f"--to prompt-embeds: this run trained no virtual tokens{other}")
    virtual = tensors["virtual_tokens"].to(dtype)
    if virtual.dim() == 3:
        raise UserError(f"--to prompt-embeds: this prompt is of {len(virtual)} tasks: choose one with --task")
    found = {"virtual_tokens": virtual}
    requests = []
    for i, parts in enumerate(inputs):
        context, rest = (embed(list(ids)).to(dtype) if len(ids) else virtual[:0] for ids in parts)
        found[f"prompt_embeds.{i}"] = torch.cat([context, virtual, rest])
        ids = [*parts[0], *[placeholder] * len(virtual), *parts[1]]
        requests.append(render_request(found[f"prompt_embeds.{i}"], ids))
    files = {"prompt_embeds.safetensors": save({k: t.contiguous() for k, t in found.items()})}
    if requests:
        files["requests.jsonl"] = "".join(requests).encode()
    write_folder(out, files)


def render_request(vectors: torch.Tensor, ids: list[int]) -> str:
    """A line of JSON with vectors [T, D] as vLLM's server takes them, and what its `LLM` takes beside them.

    Some bases place positions by token ids, which no vector tells (vllm#44842): `prompt_token_ids`, none of which is
    looked up, as `prompt_is_token_ids` says.
    """
    stored = io.BytesIO()
    torch.save(vectors.clone(), stored)
    request = {
        "prompt_embeds": base64.b64encode(stored.getvalue()).decode(),
        "prompt_token_ids": [int(i) for i in ids],
        "prompt_is_token_ids": [False] * len(ids),
    }
    return json.dumps(request) + "\n"


def check_for_vectors(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Raise UserError for a prompt that is no set of vectors at a later layer."""
    if LATE_VECTORS not in tensors:
        name = facts.get("method", "prompt_tuning")
        raise UserError(f"--to vectors: this is for late_prompt, whose vectors enter at a later layer, not for {name}")
    if has_generator(tensors):
        raise UserError(
            "--to vectors: this prompt has a generator, so its vectors differ from row to row: use ptune-dist generate"
        )


def has_generator(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether the vectors of a late prompt differ from row to row, so that no other system takes them."""
    return any(name.startswith(GENERATOR) for name in tensors)


def name_other_export(tensors: dict[str, torch.Tensor], facts: dict[str, Any] | None = None) -> str:
    """Advice on what a prompt or the trained tensors of a base can be exported to; empty where there is nothing.

    With facts, PEFT is named only where it takes this prompt.
    """
    if LATE_VECTORS in tensors:
        return "" if has_generator(tensors) else ": use --to vectors"
    if any(name.startswith(VALUE_HEAD) for name in tensors):
        return ""
    if any(name.startswith(BASE) for name in tensors):
        return ": use --to model"
    return ": use --to peft" if facts is None or fits(check_for_peft, tensors, facts) else ""


def fits(check: Callable[..., None], tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> bool:
    """Whether the check of an export passes."""
    try:
        check(tensors, facts)
    except UserError:
        return False
    return True


def export_vectors(tensors: dict[str, torch.Tensor], facts: dict[str, Any], layer: str, out: Path) -> None:
    """Write `vectors.safetensors`, a late prompt's vectors [P, H] and perhaps a head, and `vectors.json`.

    `layer`: the name of the module in whose input the vectors stand. Raises UserError.
    """
    where = {
        "base": facts["base"]["path"],
        "layer": layer,
        "placement": facts["placement"],
        "num_virtual_tokens": facts["num_virtual_tokens"],
    }
    files = {
        "vectors.safetensors": save({name: tensor.contiguous() for name, tensor in tensors.items()}),
        "vectors.json": (json.dumps(where, indent=2) + "\n").encode(),
    }
    write_folder(out, files)


def write_folder(out: Path, files: dict[str, bytes]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            replace_file(out / name, data)
    except OSError as error:
        raise UserError(f"--out: {out}: {error.strerror}") from None
