"""What must be equal on all nodes of a run, and how two nodes differ in it."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

Facts = Mapping[str, Any]  # JSON by the key of the config, or by a few words where it is none
MOST_CHARACTERS = 80  # of a value that is shown; of a longer one nodes exchange a digest
MOST_SHOWN = 3
HIDDEN = "sha256:"
ADVICE = "start all nodes with the same config and the same files"


def hide(text: str) -> str:
    """A value that nobody wants to read."""
    return HIDDEN + hashlib.sha256(text.encode()).hexdigest()[:16]


def shorten(facts: Facts) -> dict[str, str]:
    """Each value as text of a length that can be sent and shown."""
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True) for key, value in facts.items()
    }
    return {key: text if len(text) <= MOST_CHARACTERS else hide(text) for key, text in texts.items()}


def digest_facts(facts: Facts) -> str:
    return hashlib.sha256(json.dumps(shorten(facts), sort_keys=True).encode()).hexdigest()


def describe_difference(own: Facts, others: Facts, name: str) -> str:
    """One line about the first keys in which this node differs from node `name`."""
    here, there = shorten(own), shorten(others)
    differing = [key for key in {**here, **there} if here.get(key) != there.get(key)]
    found = [describe_key(key, here.get(key, "unknown"), there.get(key, "unknown"), name) for key in differing]
    if not found:
        return f"their versions differ: {ADVICE}"
    more = f" and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""
    return f"{', '.join(found[:MOST_SHOWN])}{more}: {ADVICE}"


def describe_key(key: str, here: str, there: str, name: str) -> str:
    if HIDDEN in here + there:
        return f"{key} is not that of node {name}"
    return f"{key} is {here} here and {there} on node {name}"
