"""Activation checkpointing per layer, configured by section `activation_checkpointing` of DeepSpeed's JSON.

transformers checkpoints only in training mode, drops keys/values that are passed in, and never reads that section. Here
torch's non-reentrant checkpoint runs a layer's forward again in backward, in any mode, with all arguments and gradients
to them. The fields of the section: https://www.deepspeed.ai/docs/config-json
"""

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ptune_dist.errors import UserError

SECTION = "activation_checkpointing"
DEFAULTS = {
    "partition_activations": False,
    "cpu_checkpointing": False,
    "contiguous_memory_optimization": False,
    "number_checkpoints": None,
    "synchronize_checkpoint_boundary": False,
    "profile": False,
}


class Recomputer:
    """Checkpointed layers and, with `profile`, the seconds that each has taken."""

    def __init__(self, settings: dict[str, Any], layers: list[nn.Module]):
        self._settings = settings
        self.num_layers = len(layers)
        self._seconds: defaultdict[tuple[int, str], float] = defaultdict(float)  # (layer, "forward" or "backward")
        self._calls: Counter[tuple[int, str]] = Counter()
        self._slots = Slots(settings["number_checkpoints"] or len(layers))
        for number, layer in enumerate(layers):
            layer.forward = self._wrap(number, layer.forward)

    def _wrap(self, number: int, forward: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            with self._timed(number, "forward"), self._parked():
                out = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
            if self._settings["profile"]:
                self._time_backward(number, args, out)
            return out

        return run

    def _parked(self) -> contextlib.AbstractContextManager:
        """Where the inputs of a checkpoint, the only tensors that it saves, are kept until backward."""
        if self._settings["cpu_checkpointing"]:
            return save_on_cpu(pin_memory=torch.cuda.is_available())
        if self._settings["contiguous_memory_optimization"]:
            return saved_tensors_hooks(self._slots.put, self._slots.take)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _timed(self, number: int, which: str) -> Iterator[None]:
        self._synchronize()
        began = time.perf_counter()
        yield
        self._synchronize()
        if self._settings["profile"]:
            self._seconds[number, which] += time.perf_counter() - began
            self._calls[number, which] += 1

    def _time_backward(self, number: int, args: tuple, out: Any) -> None:
        """Measure from the gradient at a layer's output to the gradient at its input, including recomputation."""
        first = out if torch.is_tensor(out) else out[0]
        hidden = next((arg for arg in args if torch.is_tensor(arg) and arg.requires_grad), None)
        if hidden is None or not first.requires_grad:
            return
        began: list[float] = []

        def start(_: torch.Tensor) -> None:
            self._synchronize()
            began.append(time.perf_counter())

        def stop(_: torch.Tensor) -> None:
            if began:
                self._synchronize()
                self._seconds[number, "backward"] += time.perf_counter() - began.pop()
                self._calls[number, "backward"] += 1

        first.register_hook(start)
        hidden.register_hook(stop)

    def _synchronize(self) -> None:
        is_wanted = self._settings["synchronize_checkpoint_boundary"] or self._settings["profile"]
        if is_wanted and torch.cuda.is_available():
            torch.cuda.synchronize()

    def describe_profile(self) -> list[str]:
        """A line of mean milliseconds for each layer; no lines without `profile`."""
        lines = []
        for number in sorted({number for number, _ in self._seconds}):
            means = {
                which: 1000 * self._seconds[number, which] / max(1, self._calls[number, which])
                for which in ("forward", "backward")
            }
            lines.append(
                f"activation checkpoint {number}: forward {means['forward']:.2f} ms, "
                f"backward {means['backward']:.2f} ms (mean of {self._calls[number, 'forward']})"
            )
        return lines


class Slots:
    """One buffer for `num` checkpoints, so that they do not fragment memory."""

    def __init__(self, num: int):
        self._num = num
        self.free = list(range(num))
        self._buffer: torch.Tensor | None = None

    def put(self, tensor: torch.Tensor) -> "torch.Tensor | Parked":
        """Copy an activation into a free slot. Other tensors (masks, positions), or ones that do not fit, are kept."""
        if not tensor.is_floating_point() or not tensor.requires_grad or not self.free:
            return tensor
        if self._buffer is None or (len(self.free) == self._num and self._buffer.shape[1] < tensor.numel()):
            self._buffer = tensor.new_empty(self._num, tensor.numel(), requires_grad=False)
        if tensor.dtype != self._buffer.dtype or tensor.numel() > self._buffer.shape[1]:
            return tensor
        slot = self.free.pop()
        kept = self._buffer[slot, : tensor.numel()].view(tensor.shape)
        kept.copy_(tensor.detach())
        return Parked(self, slot, kept)

    def take(self, packed: "torch.Tensor | Parked") -> torch.Tensor:
        return packed.tensor if isinstance(packed, Parked) else packed


class Parked:
    """An activation in a slot; the slot is freed when autograd drops this object, with or without a backward."""

    def __init__(self, slots: Slots, slot: int, tensor: torch.Tensor):
        self._slots = slots
        self._slot = slot
        self.tensor = tensor

    def __del__(self) -> None:
        self._slots.free.append(self._slot)


def read_settings(content: dict[str, Any], num_layers: int, file: str) -> dict[str, Any] | None:
    """The section's fields with DeepSpeed's defaults, or None without the section. Raises UserError.

    `file` is the JSON's name in errors.
    """
    given = content.get(SECTION)
    if given is None:
        return None
    for name, value in given.items():
        check_field(name, value, file)
    settings = DEFAULTS | given
    number = settings["number_checkpoints"]
    if settings["contiguous_memory_optimization"] and number is None:
        raise UserError(f"{file}: {SECTION}.contiguous_memory_optimization needs number_checkpoints: {num_layers} here")
    if number is not None and number < num_layers:
        raise UserError(f"{file}: {SECTION}.number_checkpoints is {number} but this base has {num_layers} layers")
    if settings["contiguous_memory_optimization"] and settings["cpu_checkpointing"]:
        raise UserError(f"{file}: {SECTION}: cpu_checkpointing and contiguous_memory_optimization exclude each other")
    return settings


def check_field(name: str, value: Any, file: str) -> None:
    """Raise UserError for an unknown field of the section, or for a value of another type."""
    if name not in DEFAULTS:
        raise UserError(f"{file}: {SECTION}.{name} is not supported: use {', '.join(DEFAULTS)}")
    if DEFAULTS[name] is None:
        is_valid = value is None or (isinstance(value, int) and not isinstance(value, bool))
        kind = "number"
    else:
        is_valid = isinstance(value, bool)
        kind = "bool"
    if not is_valid:
        raise UserError(f"{file}: {SECTION}.{name} is {value!r}, not a {kind}")
