"""Tied parameters that are stored twice: heads and embeddings are loaded as transformers loads them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ptune_dist.base.load import fill_whole
from ptune_dist.families.find import open_any
from tests.conftest import build_tiny_base

EMBEDDINGS = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]


def build_with(folder: Path, kind: str, changes: dict[str, str]) -> Path:
    """A tied base with other tensors beside the one that is stored: name -> `copy` or `other`; `none` removes one."""
    build_tiny_base(kind, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    shared = next(t for name, t in tensors.items() if name in ("shared.weight", "model.embed_tokens.weight"))
    for name, what in changes.items():
        if what == "none":
            tensors.pop(name, None)
        else:
            tensors[name] = shared.clone() if what == "copy" else torch.randn(shared.shape)
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("kind", "changes", "untied"),
    [
        ("t5", dict(zip(EMBEDDINGS[1:], ["copy", "copy", "other"], strict=True)), ["lm_head"]),  # Flan-T5
        ("t5", {"lm_head.weight": "other"}, ["lm_head"]),  # T5 v1.1 as it is saved today
        ("t5", dict.fromkeys(EMBEDDINGS[1:], "copy"), []),
        ("t5", {"decoder.embed_tokens.weight": "other"}, ["decoder.embed_tokens"]),
        (
            "t5",
            {"shared.weight": "none", "encoder.embed_tokens.weight": "copy", "lm_head.weight": "other"},
            ["lm_head"],
        ),
        ("qwen2", {"lm_head.weight": "other"}, ["lm_head"]),
        ("qwen2", {"lm_head.weight": "copy"}, []),
    ],
)
def test_what_is_stored_twice_is_loaded_as_transformers_loads_it(kind, changes, untied, tmp_path):
    folder = build_with(tmp_path / "base", kind, changes)
    opened = open_any(str(folder), dtype=torch.float32)
    ours = fill_whole(opened)
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    plain = auto.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(5, 25)[None]
    more = {"decoder_input_ids": ids[:, :7]} if kind == "t5" else {}
    wanted = plain(input_ids=ids, **more).logits
    torch.testing.assert_close(ours(input_ids=ids, **more).logits, wanted, rtol=1e-5, atol=1e-5)
    assert all(f"{name}.weight is stored beside" in (opened.note or "") for name in untied)
    assert bool(opened.note) == bool(untied)
