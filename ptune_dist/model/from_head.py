"""A base from its head on: logits of given hidden states, with what the base does to them (scaling, soft caps, a bias).

The base's own `forward` runs with a stand-in for everything below the head. Shapes: U positions, D width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ptune_dist.base.own_rows import ROWS
from ptune_dist.base.trained import trained_parameters
from ptune_dist.model.encoder_output import EncoderOutput


class Bypass(nn.Module):
    """Stands where a base computes its last hidden state, when that is known already."""

    def __init__(self, hidden: torch.Tensor, inner: nn.Module):
        super().__init__()
        self._hidden = hidden
        self._inner = (inner,)  # in a tuple, so that it is no child
        self.config = getattr(getattr(inner, "decoder", inner), "config", None)  # T5Gemma reads its decoder's

    def forward(self, *_args: Any, **_inputs: Any) -> "Bypassed":
        return Bypassed(self._hidden)

    def __getattr__(self, name: str) -> Any:
        """Numbers that a base reads from there at its head, such as Falcon-H1's multiplier of the logits."""
        return getattr(self.__dict__["_inner"][0], name)

    @property
    def decoder(self) -> "Bypass":  # OPT calls its model's decoder
        return self


class Bypassed:
    """An output of transformers in which nothing but the last hidden state is there."""

    def __init__(self, hidden: torch.Tensor):
        self.last_hidden_state = hidden

    def __getitem__(self, index: int | slice):
        return (self.last_hidden_state,)[index]

    def __getattr__(self, _name: str) -> None:
        return None


class FromHead:
    """The part of a base that begins with its head.

    It runs without the hooks of the modules on its way: one gather of the head's weights by ZeRO-3 is enough for any
    number of calls, but the caller has to make them within it.
    """

    def __init__(self, base: PreTrainedModel):
        head = base.get_output_embeddings()
        assert head is not None, "a base that writes text has a head over its vocabulary"
        self.head: nn.Module = head
        self._base = base
        # Below this module are all layers; T5's class has its decoder there, and Llama 4's prefix names another part.
        self._inner = next(name for name in (base.base_model_prefix, "decoder", "model") if name in base._modules)
        name = next(name for name, module in base.named_modules() if module is head)
        steps = name.split(".")
        self._path = [base.get_submodule(".".join(steps[: depth + 1])) for depth in range(len(steps))]
        # What such modules hold beside the head has computed its part before the head's input was taken.
        self._passed = [
            (parent._modules, child)
            for parent, step in zip([base, *self._path], steps, strict=False)
            for child, module in parent.named_children()
            if child != step and any(True for _ in module.parameters())
        ]
        self._hidden: torch.Tensor | None = None
        self._name = name

    @property
    def trained(self) -> list[nn.Parameter]:
        """The head's own parameters that are trained."""
        named = trained_parameters(self._base)
        own = [parameter for path, parameter in named.items() if path.startswith(f"{self._name}.")]
        rows = self.head.__dict__.get(ROWS)
        return own if rows is None else [*own, rows]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[U, D] -> [U, V]. Runs the base's forward; gradients reach `hidden` and the head's trained parameters."""
        given = hidden.detach()[None]
        inputs: dict[str, Any] = {"inputs_embeds": given}
        if self._base.config.is_encoder_decoder:
            inputs = {"encoder_outputs": EncoderOutput(given), "decoder_inputs_embeds": given}
        self._hidden = hidden
        with self._bare(given):
            return self._base.forward(**inputs, use_cache=False).logits[0]

    @contextmanager
    def _bare(self, given: torch.Tensor) -> Iterator[None]:
        """Without hooks and without what comes before the head."""
        hooks = [(module, module._forward_pre_hooks, module._forward_hooks) for module in self._path]
        passed = [(modules, name, modules[name]) for modules, name in self._passed]
        inner = self._base.get_submodule(self._inner)
        for module in self._path:
            module._forward_pre_hooks = type(module._forward_pre_hooks)()
            module._forward_hooks = type(module._forward_hooks)()
        for modules, name, _ in passed:
            modules[name] = nn.Identity()
        self._base._modules[self._inner] = Bypass(given, inner)
        self.head._forward_pre_hooks[0] = self._give
        try:
            yield
        finally:
            self._hidden = None
            for module, before, after in hooks:
                module._forward_pre_hooks = before
                module._forward_hooks = after
            for modules, name, module in passed:
                modules[name] = module

    def _give(self, _head: nn.Module, args: tuple) -> tuple:
        """Before the head: what the base may have done to its last hidden state (T5 scales it) is done already."""
        assert self._hidden is not None
        return (self._hidden[None], *args[1:])
