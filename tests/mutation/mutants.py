"""Faulty versions of a source file: cosmic-ray's operators, and statements that are left out."""

import ast
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
)
COMPARED_BY_IDENTITY = ("Is_IsNot", "IsNot_Is")  # in place of each other alone
ASSERTIONS = ("strict=", "-    assert ")  # they never fail, so no test can tell
UPDATES = ("+=", "-=", "*=", "|=")


class OmitStatement(Operator):
    """Replaces a call, or an assignment to what exists already, by `pass`."""

    def mutation_positions(self, node: Any) -> Iterator[tuple]:
        is_call = node.type in ("atom_expr", "power") and node.children[-1].type == "trailer"
        is_update = isinstance(node, tree.ExprStmt) and str(node.children[1].get_code()).strip() in UPDATES
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
    """A file with one fault. `name` and `difference` (the function, lines with - and +) last as long as the file."""

    path: str
    name: str
    code: str
    difference: str


def is_used(operator: str) -> bool:
    if "_Is" in operator:
        return operator.endswith(COMPARED_BY_IDENTITY)
    return not any(part in operator for part in LEFT_OUT)


def build_operators() -> dict[str, Operator]:
    used = {name.partition("/")[2]: get_operator(name)() for name in operator_names() if is_used(name)}
    return used | {"OmitStatement": OmitStatement()}


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
    mutants: list[Mutant] = []
    for place in chooser.sample(sorted(places), len(places)):
        name, number = chooser.choice(places[place])
        mutated = MutationVisitor.mutate_code(code, operators[name], number)
        if len(mutants) < count and mutated is not None and mutated != code:
            difference = render_difference(code, mutated)
            if not any(part in difference for part in ASSERTIONS):
                mutants.append(Mutant(path, f"{path}:{place[0]}:{place[1]} {name}", mutated, difference))
    return sorted(mutants, key=lambda mutant: mutant.name)


def replace_text(path: str, code: str, old: str, new: str) -> Mutant:
    """A fault that somebody thought of. Raises ValueError where `old` is not in the code exactly once."""
    if code.count(old) != 1:
        raise ValueError(f"{path} has {old!r} {code.count(old)} times, not once")
    mutated = code.replace(old, new)
    return Mutant(path, f"{path} {old.strip()} -> {new.strip()}", mutated, render_difference(code, mutated))


def render_difference(code: str, mutated: str) -> str:
    """The changed function's name in a line of its own, then the lines that are replaced and those that replace."""
    lines = list(difflib.unified_diff(code.splitlines(), mutated.splitlines(), lineterm="", n=0))
    first = int(lines[2].split()[1].lstrip("-").partition(",")[0])
    changed = [f"{line[0]} {line[1:].strip()}" for line in lines[3:] if line[:2] != "@@"]
    return "\n".join([f"@@ {name_scope(code, first)}", *changed])


def name_scope(code: str, line: int) -> str:
    """The dotted name of the function or class around a line; `module` outside of all."""
    return next((name for name, first, last in reversed(find_scopes(code)) if first <= line <= last), "module")


def find_scopes(code: str) -> list[tuple[str, int, int]]:
    """Name, first and last line of every function and class, outer ones first."""
    found: list[tuple[str, int, int]] = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                found.append((prefix + child.name, first, child.end_lineno or first))
                visit(child, f"{prefix}{child.name}.")
            else:
                visit(child, prefix)

    visit(ast.parse(code), "")
    return found
