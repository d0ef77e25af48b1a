"""A base's layers in two passes, whatever hooks are on them."""

import pytest
import torch

from ptune_dist.base.layer_parts import LayerParts
from tests.numerics.late import build_deep, stack_of

START = 2


def as_view(found):
    """Tensors as new views of the same memory, as DeepSpeed's hooks of ZeRO-3 hand them on."""
    if torch.is_tensor(found):
        return found.view(found.shape)
    return type(found)(map(as_view, found)) if isinstance(found, (tuple, list)) else found


@torch.no_grad()
@pytest.mark.parametrize("is_hooked", [False, True])
@pytest.mark.parametrize("kind", ["t5", "llama", "bert"])
def test_two_passes_compute_what_one_does(kind, is_hooked):
    base = build_deep(kind)
    inner = base.get_encoder() if base.config.is_encoder_decoder else base
    for layer in stack_of(base) if is_hooked else ():
        layer.register_forward_hook(lambda _layer, _args, output: as_view(output))
        layer.register_forward_pre_hook(
            lambda _layer, args, kwargs: (as_view(args), {name: as_view(value) for name, value in kwargs.items()}),
            with_kwargs=True,
        )
    vectors = torch.randn(2, 7, base.get_input_embeddings().embedding_dim, generator=torch.Generator().manual_seed(0))

    def run():
        return inner(inputs_embeds=vectors)[0]

    wanted = run()
    parts = LayerParts(base)
    parts.learn(run)
    with parts.below(START) as captured:
        run()
    assert captured.hidden is not None
    with parts.above(START, captured.hidden):
        torch.testing.assert_close(run(), wanted)
