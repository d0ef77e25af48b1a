"""A prefix as a cache: plain transformers, with the exported file, computes what it does with PEFT's adapter."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, DynamicCache, EncoderDecoderCache

from ptune_dist.prompts.export import export_peft
from ptune_dist.prompts.store import load_prompt
from tests.export.trained import NUM_VIRTUAL, export, family_of, write_trained
from tests.numerics.plain import PEFT_TASK, load_plain

TEXT = "a held ="


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_a_cache_gives_pefts_logits(tiny_bases, tmp_path, kind):
    from peft import PeftModel

    num_heads = 2 if kind == "llama" else 4
    torch.manual_seed(0)
    keys = {f"prefix_{name}": torch.randn(2, NUM_VIRTUAL, num_heads, 8) for name in ("keys", "values")}
    sections = {"prompt": {"placement": "decoder"}} if kind == "t5" else {}
    run = write_trained(tmp_path / "run", tiny_bases[kind], kind, keys, "prefix_tuning", **sections)
    export([run], tmp_path / "out", "kv")
    export_peft(*load_prompt(run / "prompt"), PEFT_TASK[family_of(kind)], tmp_path / "peft")
    model = load_plain(tiny_bases[kind], family_of(kind))
    tensors = load_file(tmp_path / "out" / "past_key_values.safetensors")
    cache = DynamicCache()
    for layer in range(len(tensors) // 2):
        cache.update(tensors[f"keys.{layer}"], tensors[f"values.{layer}"], layer)
    ids = AutoTokenizer.from_pretrained(tiny_bases[kind])(TEXT, return_tensors="pt").input_ids
    more = {"decoder_input_ids": torch.tensor([[1, 40, 50]])} if kind == "t5" else {}
    past = EncoderDecoderCache(cache, DynamicCache()) if kind == "t5" else cache
    with torch.no_grad():
        found = model(input_ids=ids, past_key_values=past, **more).logits
        theirs = PeftModel.from_pretrained(load_plain(tiny_bases[kind], family_of(kind)), tmp_path / "peft").eval()
        wanted = theirs(input_ids=ids, **more).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, model(input_ids=ids, **more).logits, atol=1e-3)
