"""Whether the hub of models and datasets can be reached, and the commit of it that a name is pinned to."""

import functools
import os
from pathlib import Path

import huggingface_hub

PROBE_S = 5


def split_revision(path: str) -> tuple[str, str | None]:
    """`NAME@REVISION`, a base on the hub at a commit, as (name, revision); a folder, or a name alone, has None."""
    if Path(path).is_dir():
        return path, None
    name, _, revision = path.partition("@")
    return name, revision or None


@functools.cache
def hub_answers() -> bool:
    """Whether the hub answers; asked once per process, because its clients retry for half a minute per file."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=PROBE_S)
    except Exception:  # the HTTP library depends on the version of the hub's client
        return False
    return True
