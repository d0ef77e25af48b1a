"""Passes over a part of a base's layers: the base's own forward, with stand-ins for the layers that are left out.

A stand-in computes nothing and has no parameters, so ZeRO-3 does not gather the layer that it stands for. What the base
does before its layers (positions, scales of embeddings) belongs to the pass below, what it does after them to the pass
above. Layer m divides them: the pass below ends with the input of layer m, and the pass above begins with it.

Shapes: B rows, T positions, H hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ptune_dist.base.layers import layer_stacks

HIDDEN = "hidden_states"  # what transformers calls the first input of a layer


class StandIn(nn.Module):
    """Stands for a layer and has its attributes, such as the kind of its attention, but none of its parameters."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self._real = (layer,)  # in a tuple, so that it is no child

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"][0], name)


class Skipped(StandIn):
    """Hands its input on, in the form in which layers return their output.

    `num_outputs`: of that tuple; None where layers return hidden states alone. `more`: what else stands in it.
    """

    def __init__(self, layer: nn.Module, num_outputs: int | None, more: list[Any] | None = None):
        super().__init__(layer)
        self._num_outputs = num_outputs
        self._more = more

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = input_of(args, kwargs)
        if self._num_outputs is None:
            return hidden
        return (hidden, *(self._more or [None] * (self._num_outputs - 1)))


class Captured(Skipped):
    """Also keeps its input, [B, T, H]."""

    hidden: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.hidden = input_of(args, kwargs)
        return super().forward(*args, **kwargs)


class Noted(StandIn):
    """Computes as its layer does, and adds to the list `more` what the layer returns beside hidden states."""

    def __init__(self, layer: nn.Module, more: list[Any]):
        super().__init__(layer)
        self._more = more

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self._real[0](*args, **kwargs)
        self._more[:] = found[1:]
        return found


class Given(StandIn):
    """Has its layer compute with a given input in place of what it gets."""

    def __init__(self, layer: nn.Module, hidden: torch.Tensor):
        super().__init__(layer)
        self._hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer = self._real[0]
        if args:
            return layer(self._hidden, *args[1:], **kwargs)
        return layer(**kwargs | {HIDDEN: self._hidden})


class LayerParts:
    """The layers of a base's first stack, which for an encoder-decoder is the encoder's."""

    def __init__(self, base: nn.Module):
        self._stack = layer_stacks(base)[0]
        self._num_outputs: list[int | None] = []  # of each layer, as for `Skipped`
        self._hands_on = False  # what a layer returns besides, later ones are called with (T5's biases of positions)

    @property
    def is_known(self) -> bool:
        return bool(self._num_outputs)

    def learn(self, run: Callable[[], Any]) -> None:
        """Note in what form layers return their outputs, in a pass over all of them: `run`. The others need it."""
        found: list[int | None] = []
        seen: list[Any] = []  # what layers have returned besides

        def before(_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            self._hands_on = self._hands_on or any(is_same(one, other) for one in given for other in seen)

        def after(_layer: nn.Module, _args: tuple, output: Any) -> None:
            found.append(len(output) if isinstance(output, tuple) else None)
            seen.extend(part for part in (output[1:] if isinstance(output, tuple) else ()) if torch.is_tensor(part))

        hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self._stack]
        hooks += [layer.register_forward_hook(after) for layer in self._stack]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        assert len(found) == len(self._stack), "a base calls each of its layers once"
        self._num_outputs = found

    @contextmanager
    def below(self, end: int) -> Iterator[Captured]:
        """Within the body only layers before `end` compute; afterwards the result has the input of layer `end`."""
        captured = Captured(self._stack[end], self._num_outputs[end])
        stand_ins: dict[int, StandIn] = {end: captured}
        for number in range(end + 1, len(self._stack)):
            stand_ins[number] = Skipped(self._stack[number], self._num_outputs[number])
        with self._replaced(stand_ins):
            yield captured

    @contextmanager
    def above(self, start: int, hidden: torch.Tensor) -> Iterator[None]:
        """Within the body only layers from `start` on compute, from `hidden` [B, T, H].

        Where the first layer makes something for all others, it computes too, for that alone.
        """
        more: list[Any] = []
        stand_ins: dict[int, StandIn] = {}
        for number in range(start):
            layer = self._stack[number]
            is_needed = self._hands_on and number == 0
            stand_ins[number] = Noted(layer, more) if is_needed else Skipped(layer, self._num_outputs[number], more)
        stand_ins[start] = Given(self._stack[start], hidden)
        with self._replaced(stand_ins):
            yield

    @contextmanager
    def _replaced(self, stand_ins: dict[int, StandIn]) -> Iterator[None]:
        layers = {number: self._stack[number] for number in stand_ins}
        for number, stand_in in stand_ins.items():
            self._stack[number] = stand_in
        try:
            yield
        finally:
            for number, layer in layers.items():
                self._stack[number] = layer


def input_of(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states that a layer is called with."""
    return args[0] if args else kwargs[HIDDEN]


def is_same(given: Any, tensor: torch.Tensor) -> bool:
    """Whether what a layer is called with is this tensor, perhaps as a view: DeepSpeed's hooks make those of ZeRO-3."""
    return torch.is_tensor(given) and given.shape == tensor.shape and given.data_ptr() == tensor.data_ptr()
