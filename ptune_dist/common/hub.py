"""Whether a hub of models and data sets can be reached. Floor 0."""

import functools
import os

import huggingface_hub

PROBE_S = 5


@functools.cache
def hub_answers() -> bool:
    """One short look, once per process: without a network the hub's own clients retry every file for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=PROBE_S)
    except Exception:  # the HTTP library differs between versions of the hub's client
        return False
    return True
