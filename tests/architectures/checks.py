"""What is tried on a base: each check raises where it does not hold.

Shapes: S readers, P virtual tokens, D width, V vocabulary.
"""

import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptune_dist.base.load import fill_whole
from ptune_dist.base.source import load_shape
from ptune_dist.data.batches import Batch
from ptune_dist.errors import UserError
from ptune_dist.families.find import find_family, open_any
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.prompts.prompt_tuning import PromptTuning
from tests.architectures.bases import AUTO, LABELS

REL = 1e-4
NUM_VIRTUAL = 4


class Differs(Exception):
    """A number is not the plain model's."""


class BadBase(Exception):
    """The plain model itself does not work: the small configuration is wrong."""


def draw_batch(family: str) -> tuple[Batch, np.ndarray]:
    """Three rows of different length, and the tokens whose embeddings are the virtual tokens."""
    draw = np.random.default_rng(0)
    prompt, *texts = [draw.integers(5, 250, length).astype(np.int32) for length in (NUM_VIRTUAL, 11, 30, 6)]
    targets = [draw.integers(5, 250, length).astype(np.int32) for length in (3, 1, 6)]
    if family == "encoder":
        targets = [np.array([label], np.int32) for label in (0, 2, 1)]
    nothing = np.zeros(0, np.int32)
    return Batch([nothing] * 3, texts, targets, [(row, 0) for row in range(3)], 1), prompt


def compare_loss(folder: Path, family: str) -> str:
    """Losses over virtual tokens that are real tokens' embeddings are those of the plain model given the tokens."""
    found = find_family(load_shape(str(folder)), "auto", str(folder))
    batch, prompt = draw_batch(found.name)
    labels = LABELS if found.name == "encoder" else None
    opened = open_any(str(folder), dtype=torch.float32, labels=labels)
    plain = AUTO[family].from_pretrained(folder, dtype=torch.float32).eval()
    base = fill_whole(opened)
    try:
        with torch.no_grad():
            wanted = plain_losses(plain, found.name, batch, prompt)
    except Exception as error:
        raise BadBase(describe(error)) from None
    prompts = [PromptTuning(opened.embed(prompt.tolist()))]
    model = found.model_class(base, prompts, CrossEntropy(), found.placements[0]).train()
    losses = model.losses(batch)
    losses.sum().backward()
    if not torch.allclose(losses.detach(), wanted, rtol=REL, atol=0):
        raise Differs(f"losses {losses.tolist()}, plain {wanted.tolist()}")
    gradient = model.prompt(0).virtual_tokens.grad
    if gradient is None or not gradient.isfinite().all() or not gradient.abs().max() > 0:
        raise Differs("no gradient reaches the prompt")
    return opened.note or ""


def plain_losses(plain: Any, family: str, batch: Batch, prompt: np.ndarray) -> torch.Tensor:
    """[S], each row alone, from token ids."""
    losses = []
    for rest, target in zip(batch.rests, batch.targets, strict=True):
        wanted = torch.from_numpy(target).long()
        read = np.concatenate([prompt, rest])
        if family == "encoder":
            logits = plain(input_ids=ids_of(read)).logits
        elif family == "seq2seq":
            start = plain.config.decoder_start_token_id
            written = ids_of(np.concatenate([[start], target[:-1]]))
            logits = plain(input_ids=ids_of(read), decoder_input_ids=written, use_cache=False).logits[0]
        else:
            ids = ids_of(np.concatenate([read, target]))
            logits = plain(input_ids=ids, use_cache=False).logits[0, len(read) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum"))
    return torch.stack(losses)


def ids_of(tokens: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(tokens, np.int64))[None]


def outcome_of(check: Any, folder: Path, *args: Any) -> dict[str, str]:
    """{"result": works, refused or fails, "line": why}."""
    try:
        return {"result": "works", "line": check(folder, *args) or ""}
    except UserError as error:
        return {"result": "refused", "line": str(error).replace(str(folder), "BASE")}
    except BadBase as error:
        return {"result": "not tried", "line": str(error)}
    except Exception as error:
        return {"result": "fails", "line": describe(error)}


def describe(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first} ({Path(last.filename).name}:{last.lineno})"
