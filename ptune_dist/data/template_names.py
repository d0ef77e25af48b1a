"""The names and expressions that a parsed template uses."""

from collections.abc import Iterator

import jinja2.nodes

CONSTANTS = {True: ("true", "True"), False: ("false", "False"), None: ("none", "None")}
# What names mean inside a part of a template: there a column of the same name is hidden.
MEANT_INSIDE: dict[type[jinja2.nodes.Node], tuple[str, ...]] = {
    jinja2.nodes.Template: ("self",),
    jinja2.nodes.For: ("loop",),
    jinja2.nodes.Block: ("super",),
    jinja2.nodes.Macro: ("caller", "varargs", "kwargs"),
    jinja2.nodes.CallBlock: ("caller", "varargs", "kwargs"),
}


def show_expression(node: jinja2.nodes.Node | None) -> str:
    """A simple expression as a template writes it; empty for any other."""
    if isinstance(node, jinja2.nodes.Name):
        return node.name
    if isinstance(node, jinja2.nodes.Getattr):
        inner = show_expression(node.node)
        return inner and f"{inner}.{node.attr}"
    if isinstance(node, jinja2.nodes.Getitem):
        sign = "-" if isinstance(node.arg, jinja2.nodes.Neg) else ""
        index = node.arg.node if isinstance(node.arg, jinja2.nodes.Neg) else node.arg
        if not isinstance(index, jinja2.nodes.Const):
            return ""
        inner = show_expression(node.node)
        return inner and f"{inner}[{sign}{index.value!r}]"
    if isinstance(node, jinja2.nodes.Filter) and not node.args:
        inner = show_expression(node.node)
        return inner and f"{inner} | {node.name}"
    return ""


def tested_names(test: jinja2.nodes.Node) -> set[str]:
    """The names whose truth a test asks for; what is compared with a value must be there."""
    if isinstance(test, jinja2.nodes.Compare):
        operands = [test.expr, *(operand.expr for operand in test.ops)]
        if not any(isinstance(node, jinja2.nodes.Const) and node.value is None for node in operands):
            return set()
    if isinstance(test, jinja2.nodes.Name):
        return {test.name}
    return set().union(*(tested_names(node) for node in test.iter_child_nodes()))


def names_in(node: jinja2.nodes.Node | None) -> set[str]:
    if node is None:
        return set()
    own = {node.name} if isinstance(node, jinja2.nodes.Name) else set()
    return own | {name.name for name in node.find_all(jinja2.nodes.Name)}


def find_reserved(parsed: jinja2.nodes.Template) -> set[str]:
    """The names in a template that jinja2 takes for its own, in every spelling that it has for them."""
    found: set[str] = set()
    for node in parsed.find_all(jinja2.nodes.Const):
        if node.value is None or isinstance(node.value, bool):
            found |= set(CONSTANTS[node.value])
    for kind, names in MEANT_INSIDE.items():
        nodes = [parsed] if kind is jinja2.nodes.Template else parsed.find_all(kind)
        for node in nodes:
            found |= names_in(node) & set(names)
    return found


def find_expressions(node: jinja2.nodes.Node) -> Iterator[str]:
    """The largest simple expressions below a node, without filters; what only a slice of is used is left out."""
    if isinstance(node, jinja2.nodes.Getitem) and isinstance(node.arg, jinja2.nodes.Slice):
        return
    shown = "" if isinstance(node, jinja2.nodes.Filter) else show_expression(node)
    if shown:
        yield shown
        return
    for child in node.iter_child_nodes():
        yield from find_expressions(child)
