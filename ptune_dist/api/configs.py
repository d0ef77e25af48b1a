"""Configs for the Python API: from a file, or given in place as nested dicts."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptune_dist.config.load import load_config as load_config_file
from ptune_dist.config.schema import Config
from ptune_dist.errors import UserError

ConfigSource = str | Path | Mapping[str, Any]
Overrides = Sequence[str] | Mapping[str, Any]
IN_PLACE = "config"  # the name of a config without a file, in messages


def load_config(source: ConfigSource, overrides: Overrides = ()) -> Config:
    """Read and check a config, as `ptune-dist train` does.

    source: a YAML file, or its content as nested dicts. overrides: by dotted key (`{"train.max_steps": 100}`), or as on
    the command line (`["train.max_steps=100"]`). Relative paths are looked up from the current folder.

    Raises UserError, whose message names the key.
    """
    from ptune_dist.run.resolve import resolve

    words = to_words(overrides)
    if not isinstance(source, Mapping):
        return load_config_file(source, words, resolve=resolve)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(json.dumps(source, default=str), encoding="utf-8")  # JSON is YAML
        try:
            return load_config_file(file, words, resolve=resolve)
        except UserError as error:
            raise UserError(str(error).replace(str(file), IN_PLACE)) from None


def to_words(overrides: Overrides) -> list[str]:
    """Overrides as on the command line."""
    if not isinstance(overrides, Mapping):
        return list(overrides)
    return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
