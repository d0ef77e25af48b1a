"""Take a trained prompt elsewhere: a PEFT adapter, or the embeddings that vLLM's prompt-embeds input takes.

Floor 5.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ptune_dist.errors import UserError
from ptune_dist.files import replace_file


def export_peft(tensors: dict[str, torch.Tensor], facts: dict[str, Any], out: Path) -> None:
    """Write an adapter folder for `peft.PeftModel.from_pretrained(base, out)`. Raises UserError.

    The format is PEFT's for PROMPT_TUNING: one tensor `prompt_embeddings` [P, D] and its configuration.
    """
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": facts["base"]["path"],
        "inference_mode": True,
        "num_virtual_tokens": facts["num_virtual_tokens"],
        "token_dim": facts["width"],
        "num_layers": facts["base"]["num_layers"],
        "num_attention_heads": facts["base"]["num_attention_heads"],
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
        "revision": None,
    }
    write_folder(
        out,
        {
            "adapter_model.safetensors": save({"prompt_embeddings": tensors["virtual_tokens"]}, {"format": "pt"}),
            "adapter_config.json": (json.dumps(config, indent=2) + "\n").encode(),
        },
    )


def export_prompt_embeds(
    tensors: dict[str, torch.Tensor], embed: Any, inputs: Sequence[Sequence[int]], dtype: torch.dtype, out: Path
) -> None:
    """Write `prompt_embeds.safetensors`: `virtual_tokens` [P, D], and `prompt_embeds.I` [P + T, D] for each input.

    `embed` maps T token ids to [T, D]. The tensors are in the base's dtype, as vLLM wants them. Raises UserError.
    """
    virtual = tensors["virtual_tokens"].to(dtype)
    found = {"virtual_tokens": virtual}
    for i, ids in enumerate(inputs):
        found[f"prompt_embeds.{i}"] = torch.cat([virtual, embed(list(ids)).to(dtype)])
    write_folder(out, {"prompt_embeds.safetensors": save({k: t.contiguous() for k, t in found.items()})})


def write_folder(out: Path, files: dict[str, bytes]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            replace_file(out / name, data)
    except OSError as error:
        raise UserError(f"--out: {out}: {error.strerror}") from None
