"""Where a node that trains as a replica listens, and where the others are told to find it."""

import pytest

from ptune_dist.errors import UserError
from ptune_dist.run.open_nodes import read_address


def test_a_node_listens_on_the_port_of_its_address(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PTUNE_NODE_ADDRESS", raising=False)
    assert read_address() == ("", "0.0.0.0:0")
    monkeypatch.setenv("PTUNE_NODE_ADDRESS", " 10.0.0.7:29600")
    assert read_address() == ("10.0.0.7:29600", "0.0.0.0:29600")


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("10.0.0.7", "HOST:PORT is needed"),
        (":29600", "HOST:PORT is needed"),
        ("10.0.0.7:", "HOST:PORT is needed"),
        ("10.0.0.7:x", "HOST:PORT is needed"),
        ("10.0.0.7:0", "a port is a number from 1 to 65535"),
        ("10.0.0.7:65536", "a port is a number from 1 to 65535"),
    ],
)
def test_an_address_without_a_port_is_a_mistake(value: str, why: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PTUNE_NODE_ADDRESS", value)
    with pytest.raises(UserError, match=f"PTUNE_NODE_ADDRESS is '{value}': {why}"):
        read_address()
