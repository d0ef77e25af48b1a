"""P-tuning (Liu et al. 2021, arXiv:2103.10385): a small encoder makes the virtual tokens of trained embeddings.

Parameters have PEFT's names and start as PEFT's do; the encoder is folded away for serving and export. What it makes
can be reparameterized further (`residual.py`).
Shapes: P virtual tokens, D width, E the encoder's hidden size.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ptune_dist.errors import UserError
from ptune_dist.prompts.method import BaseFacts, Contribution, Method, PeftAdapter, TrainingDefaults
from ptune_dist.prompts.prompt_tuning import PromptTuning
from ptune_dist.prompts.residual import PREFIX, ResidualOptions, build_residual
from ptune_dist.prompts.start import Start

NUM_MLP_LAYERS = 2  # hidden layers, as in PEFT, which has no other MLP


class PTuningOptions(ResidualOptions):
    """PEFT's options under PEFT's names."""

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    """The encoder: a multilayer perceptron, or the paper's bidirectional LSTM with a perceptron over it."""

    encoder_hidden_size: int | None = Field(default=None, gt=0)
    """The encoder's hidden size; the base's embedding width where left out."""

    encoder_num_layers: int = Field(default=NUM_MLP_LAYERS, gt=0)
    """Layers of the LSTM. An MLP always has two hidden layers."""

    encoder_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout between the layers of the LSTM."""


class PTuning(Method):
    """P trained embeddings of width D and an encoder over them."""

    options_type = PTuningOptions
    starts = ("random", "file")
    default_start = "random"
    default_training = TrainingDefaults(1e-3, "PEFT's comparison on MetaMathQA: 5e-4 to 5e-3")

    def __init__(self, num_virtual_tokens: int, width: int, options: PTuningOptions, seed: int):
        """Draws the start from `seed` alone. Raises ValueError that begins with the key."""
        super().__init__()
        self.num_virtual_tokens = num_virtual_tokens
        self._seed = seed
        self._step = 0
        self._has_dropout = options.encoder_reparameterization_type == "LSTM" and options.encoder_dropout > 0
        hidden = options.encoder_hidden_size or width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(num_virtual_tokens, width)
            self.lstm_head = build_lstm(width, hidden, options)
            self.mlp_head = build_mlp(width, hidden, is_over_lstm=self.lstm_head is not None)
        self.residual = build_residual(num_virtual_tokens, width, options, seed)

    @classmethod
    def build(cls, options: PTuningOptions, num_virtual_tokens: int, base: BaseFacts, start: Start) -> "PTuning":
        if options.encoder_reparameterization_type == "MLP":
            check_mlp_options(options)
        prompt = cls(num_virtual_tokens, base.width, options, start.seed)
        if start.kind == "file":
            prompt._load(start)
        return prompt

    def _load(self, start: Start) -> None:
        """Start from the file of a prompt of this method. Raises UserError."""
        has_residual = start.holds(PREFIX)
        if has_residual and self.residual is None:
            raise UserError(
                f"prompt.init_file: {start.file} holds a residual reparameterization: set "
                "prompt.reparameterization=residual_mlp"
            )
        named = dict(self.named_parameters())
        wanted = {name: tuple(p.shape) for name, p in named.items() if has_residual or not name.startswith(PREFIX)}
        self.load_state_dict(start.tensors(wanted), strict=has_residual)  # without one it starts by adding nothing

    def begin_step(self, step: int) -> None:
        self._step = step

    def forward(self) -> Contribution:
        if not (self.training and self._has_dropout):
            return Contribution(vectors=self._encode())
        # The same dropout on every rank, in every micro-batch of a step, and after a resume.
        with torch.random.fork_rng():
            torch.manual_seed(self._seed * 1_000_003 + self._step)
            return Contribution(vectors=self._encode())

    def _encode(self) -> torch.Tensor:
        """[P, D]."""
        vectors = self.embedding.weight
        if self.lstm_head is not None:
            vectors = self.lstm_head(vectors[None])[0][0]
        vectors = self.mlp_head(vectors)
        return vectors if self.residual is None else self.residual(vectors)

    @torch.no_grad()
    def plain(self) -> dict[str, torch.Tensor]:
        was_training = self.training
        self.eval()
        vectors = self._encode()
        self.train(was_training)
        return {"virtual_tokens": vectors}

    @classmethod
    def to_peft(cls, plain: dict[str, torch.Tensor]) -> PeftAdapter:
        """As an adapter of prompt tuning: it gives the same outputs, and any version of PEFT reads it."""
        return PromptTuning.to_peft(plain)


def check_mlp_options(options: PTuningOptions) -> None:
    """Raise ValueError for options that only an LSTM has."""
    if options.encoder_num_layers != NUM_MLP_LAYERS:
        raise ValueError("prompt.encoder_num_layers is for the LSTM: set prompt.encoder_reparameterization_type=LSTM")
    if options.encoder_dropout:
        raise ValueError("prompt.encoder_dropout is for the LSTM: set prompt.encoder_reparameterization_type=LSTM")


def build_lstm(width: int, hidden: int, options: PTuningOptions) -> nn.LSTM | None:
    """[1, P, D] -> [1, P, 2 E]; None for an MLP alone."""
    if options.encoder_reparameterization_type == "MLP":
        return None
    return nn.LSTM(
        input_size=width,
        hidden_size=hidden,
        num_layers=options.encoder_num_layers,
        dropout=options.encoder_dropout,
        bidirectional=True,
        batch_first=True,
    )


def build_mlp(width: int, hidden: int, *, is_over_lstm: bool) -> nn.Sequential:
    """[P, D or 2 E] -> [P, D]."""
    if is_over_lstm:
        return nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
    )
