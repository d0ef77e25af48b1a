"""The process that believes it has a GPU: python -m tests.gpu_offline.child MODULE:FUNCTION GPU ANSWERS < CALLS"""

import importlib
import json
import sys
from pathlib import Path

from tests.gpu_offline import fake_cuda

if __name__ == "__main__":
    work, gpu, answers = sys.argv[1:]
    fake_cuda.pretend(gpu)
    module, _, name = work.partition(":")
    function = getattr(importlib.import_module(module), name)
    found = [function(**call) for call in json.load(sys.stdin)]
    Path(answers).write_text(json.dumps(found))
