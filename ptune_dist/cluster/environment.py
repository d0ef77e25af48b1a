"""Reads and checks variables of the environment; errors name the variable and who sets it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ptune_dist.errors import UserError

MAX_PORT = 65535


@dataclass(frozen=True)
class Environment:
    """The variables of one process. Empty ones count as unset."""

    variables: Mapping[str, str]
    source: str  # what sets them, for error messages: "slurm"

    def __contains__(self, name: str) -> bool:
        return bool(self.variables.get(name, "").strip())

    def find_text(self, name: str) -> str | None:
        return self.variables[name].strip() if name in self else None

    def text(self, name: str) -> str:
        """Raises UserError if the variable is unset."""
        if name not in self:
            raise UserError(f"{name} ({self.source}) is not set")
        return self.variables[name].strip()

    def find_number(self, name: str, minimum: int = 0) -> int | None:
        """None if the variable is unset. Raises UserError if it is not a whole number of at least `minimum`."""
        value = self.find_text(name)
        if value is None:
            return None
        if not (re.fullmatch("[0-9]+", value) and int(value) >= minimum):
            raise UserError(f"{name} ({self.source}): must be a whole number of at least {minimum}, not {value!r}")
        return int(value)

    def number(self, name: str, minimum: int = 0) -> int:
        """As `find_number`; also raises UserError if the variable is unset."""
        self.text(name)
        found = self.find_number(name, minimum)
        assert found is not None, "the variable is set"
        return found

    def find_port(self, name: str) -> int | None:
        port = self.find_number(name, minimum=1)
        if port is not None and port > MAX_PORT:
            raise UserError(f"{name} ({self.source}): a port is at most {MAX_PORT}, not {port}")
        return port

    def node_rank(self, name: str, num_nodes: int) -> int:
        """The rank of a node, from 0. With one node the variable may be unset."""
        rank = self.find_number(name) if num_nodes == 1 else self.number(name)
        if rank is not None and rank >= num_nodes:
            raise UserError(f"{name} ({self.source}): the nodes are 0 to {num_nodes - 1}, not {rank}")
        return rank or 0

    def first_set(self, *names: str) -> str:
        """The first of the names that is set, else the first of all, so that an error can name it."""
        return next((name for name in names if name in self), names[0])
