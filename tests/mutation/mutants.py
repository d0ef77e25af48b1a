"""Faulty versions of a source file: cosmic-ray's operators, and statements that are left out."""

import difflib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import parso.python.tree as tree
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names

# Replacements that nobody types by mistake; | also joins types, where it means nothing while the code runs.
LEFT_OUT = (
    "Variable",
    "BitXor",
    "BitAnd",
    "BitOr",
    "LShift",
    "RShift",
    "Pow",
    "Decorator",
    "ExceptionReplacer",
    "_Is",
    "_IsNot",
)


ASSERTIONS = ("strict=", "-    assert ")  # what never happens: no test can tell
UPDATES = ("+=", "-=", "*=", "|=")


class OmitStatement(Operator):
    """Replaces a call, or an assignment to what exists already, by `pass`."""

    def mutation_positions(self, node: Any) -> Iterator[tuple]:
        is_call = node.type in ("atom_expr", "power") and node.children[-1].type == "trailer"
        is_update = isinstance(node, tree.ExprStmt) and str(node.children[1].get_code()).strip() in (
            "+=",
            "-=",
            "*=",
            "|=",
        )
        stands_alone = node.parent is not None and node.parent.type in ("simple_stmt", "suite")
        if (is_call or is_update) and stands_alone:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        return tree.Keyword("pass", node.start_pos, prefix=node.get_first_leaf().prefix)

    @classmethod
    def examples(cls) -> tuple:
        return ()


@dataclass(frozen=True)
class Mutant:
    """A file with one fault. `name` is the same as long as the file is."""

    path: str
    name: str
    code: str
    difference: str


def build_operators() -> dict[str, Operator]:
    names = [name for name in operator_names() if not any(part in name for part in LEFT_OUT)]
    return {name.partition("/")[2]: get_operator(name)() for name in names} | {"OmitStatement": OmitStatement()}


def find_mutants(code: str, operators: dict[str, Operator]) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """By place (line, column): the operators that change something there, each with the number of its occurrence."""
    found: dict[tuple[int, int], list[tuple[str, int]]] = {}
    nodes = list(ast_nodes(get_ast(code)))
    for name, operator in operators.items():
        places = [place for node in nodes for place in operator.mutation_positions(node)]
        for number, (start, _) in enumerate(places):
            found.setdefault(start, []).append((name, number))
    return found


def sample_mutants(path: str, code: str, count: int, seed: int) -> list[Mutant]:
    """At most `count` mutants at different places of a file, the same for the same seed."""
    chooser = random.Random(f"{seed} {path}")
    operators = build_operators()
    places = find_mutants(code, operators)
    chosen = chooser.sample(sorted(places), min(count, len(places)))
    mutants = []
    for place in sorted(chosen):
        name, number = chooser.choice(places[place])
        mutated = MutationVisitor.mutate_code(code, operators[name], number)
        if mutated is None or mutated == code:
            continue
        lines = difflib.unified_diff(code.splitlines(), mutated.splitlines(), lineterm="", n=0)
        difference = "\n".join(line for line in lines if line[:3] not in ("---", "+++"))
        if any(part in difference for part in ASSERTIONS):
            continue
        mutants.append(Mutant(path, f"{path}:{place[0]}:{place[1]} {name}", mutated, difference))
    return mutants
