"""What the tests share: tiny bases of every architecture, a small config, and the rule for `gpu`."""

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import Commands
from tests.processes import ROOT

TINY = ROOT / "configs" / "tiny"

# A shell starts its background jobs with SIGINT ignored, which all children inherit and bash cannot undo.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The files that take longest, the longest first: at the end no worker is left alone with one of them.
LONG_FILES = [
    "launcher/test_run_ranks.py",
    "numerics/test_sharding.py",
    "cluster/test_faults.py",
    "test_quickstart.py",
    "test_types.py",
    "cluster/test_jobs.py",
    "launcher/test_run.py",
    "numerics/test_bank.py",
    "gpu_offline/test_attention.py",
    "numerics/test_bank_life.py",
    "test_cli_runs.py",
    "numerics/test_placements.py",
    "numerics/test_curves.py",
    "numerics/test_prefix_tuning.py",
    "numerics/test_seq2seq_prefix_runs.py",
    "numerics/test_answers.py",
    "cluster/test_scripts.py",
]


def extended_beyond(kept: list[Any], values: list[Any]) -> list[Any]:
    """`values` for `parametrize`, those that are not `kept` in the extended suite only."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.extended) for value in values]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {ROOT / "tests" / name: rank for rank, name in enumerate(LONG_FILES)}
    num_long = Counter(item.path for item in items if item.get_closest_marker("long"))
    items.sort(key=lambda item: (ranks.get(item.path, len(ranks)), -num_long[item.path]))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("extended") and not os.environ.get("PTUNE_TEST_EXTENDED"):
            item.add_marker(pytest.mark.skip(reason="too long for CI: tests/run.sh --all"))


def write_config(path: Path, **overrides) -> Path:
    """A small config over the shipped base and data; `overrides` are whole sections or values to merge in."""
    content = {
        "output_dir": str(path.parent / "run"),
        "model": {"path": str(TINY / "causal")},
        "prompt": {"num_virtual_tokens": 4},
        "data": {
            "train": str(TINY / "data" / "train.jsonl"),
            "template": "{{ word }} =",
            "target": " {{ answer }}",
            "max_length": 64,
        },
        "train": {"max_steps": 20, "batch_size": 8, "learning_rate": 0.05, "micro_batch_tokens": 1024},
        "checkpoint": {"every": 0},
    }
    for key, value in overrides.items():
        content[key] = {**content[key], **value} if isinstance(content.get(key), dict) else value
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


ARCHITECTURES = ["gpt2", "llama", "qwen2", "opt", "gpt_neox", "bloom"]
SEQ2SEQ, ENCODERS = ["t5", "bart"], ["bert", "roberta"]
LABELS = ["short", "middle", "long"]


def tiny_shape(kind: str) -> dict:
    """What makes a two-layer base of one architecture."""
    # room above the 258 tokens, as real vocabularies have (some tokenizer classes add a special token when loaded)
    common = {"vocab_size": 272, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1}
    wide = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shapes = {
        # learned positions, tied head, Conv1D layers
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
        # rotary, grouped keys/values, untied head
        "llama": wide | {"intermediate_size": 64, "num_key_value_heads": 2, "tie_word_embeddings": False},
        # rotary, biased projections, tied head
        "qwen2": wide | {"intermediate_size": 64, "num_key_value_heads": 2, "tie_word_embeddings": True},
        # learned positions from the attention mask, embeddings narrower than the hidden size
        "opt": wide | {"ffn_dim": 64, "max_position_embeddings": 128, "word_embed_proj_dim": 16},
        # partial rotary, parallel residual, untied head
        "gpt_neox": wide | {"intermediate_size": 64, "tie_word_embeddings": False},
        # ALiBi
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        # relative positions, tied head with a scale
        "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1},
        # learned positions with an offset, scaled embeddings, a bias after the head
        "bart": {
            "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "scale_embedding": True,
            "max_position_embeddings": 128, "decoder_start_token_id": 0, "forced_eos_token_id": None,
        },
        # a pooler over the first position, one linear layer as head
        "bert": wide | {"intermediate_size": 64, "max_position_embeddings": 128},
        # positions from the padding token's id on, a head of two layers
        "roberta": wide | {"intermediate_size": 64, "max_position_embeddings": 130},
    }  # fmt: skip
    return common | shapes[kind]


def build_tiny_base(kind: str, folder: Path, **more: int) -> Path:
    """A random two-layer base of one architecture with the byte-level tokenizer, saved for the Auto classes.

    `more`: what differs from `tiny_shape`. Its heads are 8 wide, and flex attention on a GPU needs 16.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    from ptune_dist.tiny.make import build_tokenizer

    auto = AutoModelForSeq2SeqLM if kind in SEQ2SEQ else AutoModelForMaskedLM if kind in ENCODERS else None
    torch.manual_seed(0)
    model = (auto or AutoModelForCausalLM).from_config(AutoConfig.for_model(kind, **tiny_shape(kind) | more)).eval()
    with torch.no_grad():  # tiny random bases barely answer; larger weights make the numbers worth comparing
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.5 if kind == "t5" else 3.0)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True, scope="module")
def leaves_no_process_group() -> Iterator[None]:
    """A test that trains in this process leaves a group and a rank, which the next module's tests would meet."""
    kept = {name: os.environ[name] for name in RANK_VARIABLES if name in os.environ}
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():
        distributed.destroy_process_group()
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(kept)


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Commands:
    """ptune-dist commands, each in a process of its own, at the price of a fork."""
    return Commands(tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory) -> dict[str, Path]:
    """A folder for each of ARCHITECTURES, SEQ2SEQ and ENCODERS."""
    root = tmp_path_factory.mktemp("bases")
    return {kind: build_tiny_base(kind, root / kind) for kind in ARCHITECTURES + SEQ2SEQ + ENCODERS}


@pytest.fixture(scope="session")
def llama(tiny_bases) -> Path:
    return tiny_bases["llama"]
