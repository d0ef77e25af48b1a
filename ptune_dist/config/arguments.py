"""What stands on the command line besides options: overrides in the ways people write them, and words that are none."""

import json
import re
from collections.abc import Sequence

from ptune_dist.config.messages import known_keys, nearest_key
from ptune_dist.config.schema import Config

SECTIONS = tuple(Config.model_fields)
OVERRIDE = re.compile(rf"({'|'.join(SECTIONS)})(\.[\w.]+)?=")


def drop_dashes(word: str) -> str:
    """`--train.max_steps=5`, as other programs want it, as `train.max_steps=5`; other words as they are."""
    return word.removeprefix("--") if OVERRIDE.match(word.removeprefix("--")) else word


def join_labels(words: Sequence[str]) -> list[str]:
    """`--labels yes,no` as one word, and `--labels` alone as an empty list: only a word with a comma belongs to it."""
    found: list[str] = []
    for word in words:
        if found[-1:] == ["--labels="] and "," in word and not OVERRIDE.match(word) and not word.startswith("-"):
            found[-1] += word
        else:
            found.append("--labels=" if word == "--labels" else word)
    return found


def render_labels(text: str) -> str:
    """`yes,no` as the value of an override; a list in brackets stays as it is."""
    return text if text.startswith("[") else json.dumps([label.strip() for label in text.split(",") if label.strip()])


def overrides_last(words: Sequence[str]) -> list[str]:
    """The words of a command that takes no options, with its overrides behind its config."""
    return sorted(words, key=lambda word: bool(OVERRIDE.match(word)))  # sorted keeps the order within each


def explain_words(words: Sequence[str], command: str) -> str:
    """What is wrong with words that are no argument of a command, and what to write instead."""
    word = words[0]
    name = word.lstrip("-").partition("=")[0].rstrip(":").replace("-", "_")
    if name in ("config", "config_file", "c", "f") and word.startswith("-"):
        return f"{word}: the config is given by its name alone: {command} my.yaml"
    if word.endswith((".yaml", ".yml")):
        return f"{word}: one config at a time, and a second one is given"
    known = known_keys(Config)
    key = name if name in known else next((k for k in known if k.rpartition(".")[2] == name), "")
    if not key and word.startswith("-"):
        key = nearest_key(name, known)
    if key:
        values = [w for w in words[1:] if w not in ("=", ":") and not w.endswith((".yaml", ".yml"))]
        value = word.partition("=")[2] or (values[0] if values else "VALUE")
        return f"{word}: write {key}={value}, without dashes and spaces"
    if word.startswith("-"):
        return f"unrecognized arguments: {' '.join(words)}"
    if command.endswith(" export") and "=" not in word:
        return f"{word}: there is no such folder of a run, and it is not key.path=value"
    return f"{word!r} is not key.path=value"


def explain_command(word: str, commands: Sequence[str], near: Sequence[str]) -> str:
    """What to write instead of a word that is no command."""
    if word in ("help", "version"):
        return f"write ptune-dist --{word}"
    if word.endswith((".yaml", ".yml", ".json")):
        return f"a command stands before the config: ptune-dist train {word}"
    return f"did you mean {near[0]}?" if near else f"it is none of {', '.join(commands)}"
