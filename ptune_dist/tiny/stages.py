"""The training loop of the recipes' tiny bases, which continues where it was stopped."""

import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WARMUP_STEPS = 100
SAVE_EVERY = 100  # steps


@dataclass(frozen=True)
class Stage:
    """`losses(rng)` draws a batch and returns the loss of each of its chunks."""

    losses: Callable[[random.Random], list[torch.Tensor]]
    learning_rate: float
    num_steps: int


def train_stages(model: torch.nn.Module, stages: list[Stage], *, seed: int, part: Path) -> None:
    """Train with AdamW, in each stage with warm-up and a cosine schedule to zero.

    The state is kept in the file `part` until the end. A step's random numbers depend on the seed, the stage and the
    step alone, so a training that was stopped ends with the same bits.
    """
    settings = [seed, *([stage.learning_rate, stage.num_steps] for stage in stages)]
    state: dict[str, Any] = torch.load(part, weights_only=True) if part.exists() else {}
    if state.get("settings") != settings:
        state = {"settings": settings, "stage": 0, "step": 0}
    else:
        model.load_state_dict(state["model"])
        print(f"continues after step {state['step']} of stage {state['stage'] + 1}", flush=True)
    model.train()
    for number in range(state["stage"], len(stages)):
        train_stage(model, stages[number], number, seed, part, state)
        state = {"settings": settings, "stage": number + 1, "step": 0}
    model.eval()
    part.unlink(missing_ok=True)


def train_stage(
    model: torch.nn.Module, stage: Stage, number: int, seed: int, part: Path, state: dict[str, Any]
) -> None:
    """Train one stage from `state["step"]` on."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    first, began = state["step"], time.time()
    for step in range(first, stage.num_steps):
        scale = min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / stage.num_steps))
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * scale
        losses = stage.losses(random.Random(f"{seed} {number} {step}"))
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % SAVE_EVERY == 0 or done == stage.num_steps:
            loss = torch.stack(losses).mean().item()
            seconds = (time.time() - began) / (done - first)
            print(f"step {done}/{stage.num_steps} loss {loss:.3f} {seconds:.2f} s per step", flush=True)
            save_part(part, state | {"step": done, "model": model.state_dict(), "optimizer": optimizer.state_dict()})


def save_part(part: Path, state: dict[str, Any]) -> None:
    """Replace the file as a whole."""
    part.parent.mkdir(parents=True, exist_ok=True)
    fresh = part.with_suffix(".new")
    torch.save(state, fresh)
    os.replace(fresh, part)
