"""The residual reparameterization: the paper's formula, its start, and what it is folded into."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ptune_dist.errors import UserError
from ptune_dist.prompts.method import BaseFacts, Method
from ptune_dist.prompts.p_tuning import PTuning, PTuningOptions
from ptune_dist.prompts.prompt_tuning import PromptTuning
from ptune_dist.prompts.residual import ResidualOptions
from ptune_dist.prompts.start import Start
from ptune_dist.tiny.make import build_tokenizer

P, WIDTH, HIDDEN = 5, 16, 7
TOKENIZER = build_tokenizer()
EMBEDDINGS = torch.randn(len(TOKENIZER), WIDTH, generator=torch.Generator().manual_seed(1))
MLP = {"reparameterization": "residual_mlp", "reparameterization_hidden_size": HIDDEN}


def start_of(kind: str = "vocab", file=None, seed: int = 0) -> Start:
    return Start(kind, seed, TOKENIZER, lambda ids: EMBEDDINGS[torch.tensor(ids)], file=str(file) if file else None)


def build(start: Start, method=PromptTuning, **options) -> Method:
    options_type = method.options_type
    return method.build(options_type(**options), P, BaseFacts(WIDTH), start)


def draw_parameters(prompt: Method) -> None:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))


def plain_network(prompt: Method, number: int) -> nn.Sequential:
    """The paper's network of torch's own modules, with the parameters of network `number`."""
    layers = [nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH)]
    residual = prompt.residual
    tensors = {
        "0.weight": residual.down[number].T, "0.bias": residual.down_bias[number, 0],
        "2.weight": residual.up[number].T, "2.bias": residual.up_bias[number, 0],
    }  # fmt: skip
    if residual.has_norm:
        layers.append(nn.LayerNorm(WIDTH))
        tensors |= {"3.weight": residual.gain[number, 0], "3.bias": residual.bias[number, 0]}
    network = nn.Sequential(*layers)
    network.load_state_dict({name: tensor.detach() for name, tensor in tensors.items()})
    return network


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
def test_a_step_of_it_is_a_step_of_the_papers_formula(per_token, has_norm):
    options = MLP | {"reparameterization_per_token": per_token, "reparameterization_layer_norm": has_norm}
    prompt = build(start_of(), **options)
    draw_parameters(prompt)
    vectors = nn.Parameter(prompt.embedding.detach().clone())
    networks = [plain_network(prompt, number) for number in range(P if per_token else 1)]
    weights = torch.randn(P, WIDTH, generator=torch.Generator().manual_seed(2))
    trained = [vectors, *(parameter for network in networks for parameter in network.parameters())]
    for parameters, forward in (
        (list(prompt.parameters()), lambda: prompt().vectors),
        (trained, lambda: torch.stack([networks[i % len(networks)](row) + row for i, row in enumerate(vectors)])),
    ):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(3):
            (forward() * weights).square().sum().sqrt().backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = torch.stack([networks[i % len(networks)](row) + row for i, row in enumerate(vectors)])
    torch.testing.assert_close(prompt().vectors, expected, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in prompt.parameters()) == sum(p.numel() for p in trained)


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("method", [PromptTuning, PTuning])
def test_training_begins_at_the_start_without_it_and_moves(method, has_norm):
    kind = "vocab" if method is PromptTuning else "random"
    without = build(start_of(kind), method)
    prompt = build(start_of(kind), method, **MLP, reparameterization_layer_norm=has_norm)
    assert torch.equal(prompt().vectors, without().vectors)
    optimizer = torch.optim.SGD(prompt.parameters(), lr=0.1)
    for _ in range(2):
        prompt().vectors.square().sum().backward()
        optimizer.step()
    moved = [name for name, parameter in prompt.named_parameters() if parameter.grad.any()]
    assert "residual.down" in moved and "residual.up" in moved
    torch.testing.assert_close(prompt.plain()["virtual_tokens"], prompt().vectors.detach())


def test_a_file_with_the_network_is_trained_further_with_it_and_without_from_what_it_amounts_to(tmp_path):
    prompt = build(start_of(), **MLP)
    draw_parameters(prompt)
    stored = prompt.plain() | {name: p.detach() for name, p in prompt.named_parameters()}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, tmp_path / "prompt.safetensors")
    start = start_of("file", tmp_path)
    again = build(start, **MLP)
    for name, parameter in prompt.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    assert torch.equal(build(start)().vectors, prompt.plain()["virtual_tokens"])
    with pytest.raises(UserError, match=r"holds residual.down \(1, 16, 7\), this prompt has \(1, 16, 9\)"):
        build(start, **MLP | {"reparameterization_hidden_size": 9})


def test_a_p_tuning_file_is_not_read_without_its_network(tmp_path):
    prompt = build(start_of("random"), PTuning, **MLP)
    draw_parameters(prompt)
    save_file({name: p.detach().contiguous() for name, p in prompt.named_parameters()}, tmp_path / "prompt.safetensors")
    start = start_of("file", tmp_path)
    assert torch.equal(build(start, PTuning, **MLP)().vectors, prompt().vectors)
    with pytest.raises(UserError, match="holds a residual reparameterization: set prompt.reparameterization"):
        build(start, PTuning)
    encoder = {name: p.detach().contiguous() for name, p in prompt.named_parameters() if "residual" not in name}
    save_file(encoder, tmp_path / "prompt.safetensors")
    assert torch.equal(build(start, PTuning, **MLP)().vectors, build(start, PTuning)().vectors)


@pytest.mark.parametrize("method", [PromptTuning, PTuning])
def test_its_options_alone_are_refused(method):
    for name, value in {"hidden_size": 9, "per_token": True, "layer_norm": False}.items():
        key = f"reparameterization_{name}"
        with pytest.raises(ValueError, match=f"prompt.{key} is given but prompt.reparameterization is none"):
            build(start_of("random"), method, **{key: value})


def test_the_papers_sizes_are_the_defaults():
    options = ResidualOptions(reparameterization="residual_mlp")
    assert options.reparameterization_hidden_size == 800
    assert not options.reparameterization_per_token and options.reparameterization_layer_norm
    assert PTuningOptions().reparameterization == "none"
