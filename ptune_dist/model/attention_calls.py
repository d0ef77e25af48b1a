"""Whether a model's classes hand what its pass is given on to the attention function, found in their source.

A pass over segments gives the layers a layout in place of a mask. An architecture whose layers drop inputs that they do
not know (Nemotron), or compute with the mask themselves (Doge), would not see the layout.
"""

import ast
import functools
import inspect
import textwrap

from torch import nn

MASK = "attention_mask"


def hands_on(model: nn.Module) -> bool:
    """Whether every attention of a model, and every module above it, hands its inputs on, and the mask as it is."""
    for path, module in model.named_modules():
        if not is_attention(module):
            continue
        names = path.split(".")
        above = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
        kinds = [type(parent) for parent in above if not isinstance(parent, (nn.ModuleList, nn.ModuleDict))]
        if not all(hands_options_on(kind) for kind in kinds) or not hands_mask_on(type(module)):
            return False
    return True


def is_attention(module: nn.Module) -> bool:
    return hasattr(module, "layer_idx") and (
        hasattr(module, "is_causal") or type(module).__name__.endswith("Attention")
    )


@functools.cache
def hands_options_on(kind: type[nn.Module]) -> bool:
    """Whether a class's forward calls something with `**options`, or its source is unknown."""
    tree = forward_of(kind)
    return tree is None or any(keyword.arg is None for call in calls_in(tree) for keyword in call.keywords)


@functools.cache
def hands_mask_on(kind: type[nn.Module]) -> bool:
    """Whether an attention reads its mask only to give it to an attention function, or its source is unknown."""
    tree = forward_of(kind)
    if tree is None:
        return True
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == MASK]
    used = [name for name in names if isinstance(name.ctx, ast.Load)]
    attending = [call for call in calls_in(tree) if "att" in ast.unparse(call.func)]
    given = [argument for call in attending for argument in (*call.args, *(k.value for k in call.keywords))]
    return all(any(node is argument for argument in given) for node in used)


def forward_of(kind: type[nn.Module]) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, SyntaxError, TypeError):
        return None


def calls_in(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
