"""Whether the hub of models and datasets can be reached."""

import functools
import os

import huggingface_hub

PROBE_S = 5


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
