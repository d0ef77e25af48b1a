"""Distributed training of soft prompts against large frozen language models.

The Python API is the names in `__all__` (docs/api.md). They are imported when they are first used, so importing this
package takes no time.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptune_dist.api.attach import Attached
    from ptune_dist.api.configs import load_config
    from ptune_dist.api.curves import LiveCurves
    from ptune_dist.api.trained import TrainedPrompt, load
    from ptune_dist.api.training import evaluate, train
    from ptune_dist.errors import RunFault, UserError

__version__ = "0.1.0"
__all__ = [
    "Attached",
    "LiveCurves",
    "RunFault",
    "TrainedPrompt",
    "UserError",
    "evaluate",
    "load",
    "load_config",
    "train",
]

PLACES = {
    "Attached": "ptune_dist.api.attach",
    "LiveCurves": "ptune_dist.api.curves",
    "RunFault": "ptune_dist.errors",
    "TrainedPrompt": "ptune_dist.api.trained",
    "UserError": "ptune_dist.errors",
    "evaluate": "ptune_dist.api.training",
    "load": "ptune_dist.api.trained",
    "load_config": "ptune_dist.api.configs",
    "train": "ptune_dist.api.training",
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PLACES])
