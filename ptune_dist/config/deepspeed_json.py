"""DeepSpeed's own JSON: read it, fill its `auto` values from the config, refuse contradictions. The one place for both.

The file stays plain DeepSpeed JSON. A value that the config also sets must be `auto`, absent or equal; the filled
content is what the `zero` package hands to DeepSpeed.
"""

import copy
import json
import re
from pathlib import Path
from typing import Any

from ptune_dist.config.deepspeed_names import check_names
from ptune_dist.config.deepspeed_optimizer import settle_optimizer, settle_scheduler
from ptune_dist.config.deepspeed_sections import refuse_sections
from ptune_dist.config.deepspeed_spellings import use_one_spelling
from ptune_dist.config.schema import Config
from ptune_dist.errors import UserError

PRESETS = Path(__file__).parent / "presets"
COMMENT = re.compile(r"(^|\s)(//|#|/\*)")
TRAILING_COMMA = re.compile(r",\s*[}\]]")

# The keys that must be objects where they are given, beside the sections in deepspeed_names.
OBJECTS = """
zero_optimization optimizer scheduler optimizer.params scheduler.params zero_optimization.offload_param
zero_optimization.offload_optimizer
""".split()

# `auto` values that DeepSpeed itself takes, and those that follow from the base's tensors (zero/).
FILLED_LATER = (
    "autotuning",
    "data_types.keep_in_fp32_modules",
    "zero_optimization.offload_param.buffer_",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_model_persistence_threshold",
)


def preset_names() -> list[str]:
    return sorted(file.stem for file in PRESETS.glob("*.json"))


def find_preset(source: Any) -> Any:
    """The file of a JSON that comes with the package, where `source` is its name; any other source as it is."""
    is_name = isinstance(source, str) and source.removesuffix(".json") in preset_names()
    return str(PRESETS / f"{source.removesuffix('.json')}.json") if is_name else source


def show_source(source: Any) -> str:
    """The `deepspeed` of a config in a message: a file's name, or that of one that comes with the package."""
    if not isinstance(source, str):
        return "deepspeed"
    return f"deepspeed: {Path(source).stem}" if is_preset(source) else source


def is_preset(source: Any) -> bool:
    """Whether a config's `deepspeed`, with its paths resolved, comes with the package."""
    return isinstance(source, str) and Path(source).parent == PRESETS


def load_deepspeed_json(source: str | dict[str, Any] | None) -> dict[str, Any]:
    """The content of config key `deepspeed`: a file's, given in place, or that of ZeRO stage 0. Raises UserError."""
    if source is None:
        return {"zero_optimization": {"stage": 0}}
    if isinstance(source, dict):
        content = copy.deepcopy(source)
        check_sections(content, "deepspeed")
        return content
    content = read_json(find_preset(source))
    if not isinstance(content, dict):
        raise UserError(f"deepspeed: {source}: DeepSpeed's JSON is an object, found {type(content).__name__}")
    check_sections(content, source)
    return content


def read_json(source: str) -> Any:
    """The content of a JSON file. Raises UserError naming file and line."""
    text = ""
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
        return json.loads(text, object_pairs_hook=refuse_repeated)
    except FileNotFoundError as error:
        is_name = not source.endswith(".json") and "/" not in source
        names = f", and the JSON files that come with the package are {', '.join(preset_names())}" if is_name else ""
        name = Path(source).stem
        if not is_name and name in preset_names():
            names = f"; a JSON file of that name comes with the package: set deepspeed={name}"
        raise UserError(f"deepspeed: {source}: {error.strerror}{names}") from None
    except UnicodeDecodeError:
        raise UserError(f"deepspeed: {source}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        lines = text.splitlines() or [""]
        near = "\n".join(lines[max(error.lineno - 2, 0) : error.lineno])
        hint = ""
        if COMMENT.search(near):
            hint = "; DeepSpeed's JSON has no comments: remove them"
        elif TRAILING_COMMA.search("\n".join(lines[max(error.lineno - 2, 0) : error.lineno + 1])):
            hint = "; remove the comma after the last item"
        elif not text.strip():
            hint = "; the file is empty"
        raise UserError(f"deepspeed: {source} line {error.lineno}: not valid JSON: {error.msg}{hint}") from None
    except RecursionError:
        raise UserError(f"deepspeed: {source}: not valid JSON: nested too deeply") from None
    except ValueError as error:  # a key given twice, a name that no file has, an integer of thousands of digits
        raise UserError(f"deepspeed: {source}: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise UserError(f"deepspeed: {source}: {error.strerror}") from None


def refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a key given twice, which DeepSpeed refuses too."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice} is given twice")
    return content


def check_sections(content: dict[str, Any], file: str) -> None:
    """Raise UserError for a section of the wrong type or an unknown key: DeepSpeed ignores what it does not know."""
    try:
        use_one_spelling(content)
        check_names(content)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    for path in OBJECTS:
        node: Any = content
        for part in path.split("."):
            node = node.get(part, {}) if isinstance(node, dict) else node
        if not isinstance(node, dict):
            raise UserError(f"{file}: {path} must be an object, found {json.dumps(node, default=str)}")


def fill_deepspeed_json(config: Config, *, hidden_size: int) -> dict[str, Any]:
    """DeepSpeed's JSON with every `auto` filled in and nothing left that contradicts the config. Raises UserError."""
    content = load_deepspeed_json(config.deepspeed)
    file = show_source(config.deepspeed)
    refuse_sections(content, file)
    settle = Settler(content, file)
    train = config.train
    dtype = config.model.dtype
    if is_preset(config.deepspeed):
        refuse_other_dtype(content, file, dtype)
    settle("bf16.enabled", dtype == "bfloat16", "model.dtype", dtype)
    settle("fp16.enabled", dtype == "float16", "model.dtype", dtype)
    if "seed" in content:
        settle("seed", config.seed, "the config's seed")
        del content["seed"]  # DeepSpeed reads none
    settle("gradient_clipping", train.max_grad_norm, "train.max_grad_norm")
    settle("train_batch_size", train.batch_size, "train.batch_size")
    for key in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu"):
        if content.pop(key, "auto") != "auto":
            raise UserError(
                f'{file}: {key} follows from train.batch_size and train.micro_batch_tokens: set it to "auto"'
            )
    settle_optimizer(settle, content, file, config)
    settle_scheduler(settle, content, file, config)
    zero = content.setdefault("zero_optimization", {})
    if zero.get("reduce_bucket_size") == "auto":
        zero["reduce_bucket_size"] = hidden_size * hidden_size  # as Hugging Face fills it
    if str(zero.get("stage", 0)) not in ("0", "1", "2", "3"):
        raise UserError(f"{file}: zero_optimization.stage is {zero['stage']!r}, not 0, 1, 2 or 3")
    zero["stage"] = zero_stage(content)
    refuse_unfilled(content, file)

    # DeepSpeed gets the frozen base alone: gradients, clipping, optimizer and schedule are ours (optim/). How many
    # micro-batches make a step varies with the lengths of its rows, and DeepSpeed counts none.
    for key in ("optimizer", "scheduler", "train_batch_size"):
        content.pop(key, None)
    content |= {"gradient_clipping": 0.0, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    content.setdefault("steps_per_print", 1 << 31)  # our own log reports progress
    # Our own log has the throughput; DeepSpeed's timer waits for the GPU.
    content.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    return content


def refuse_other_dtype(content: dict[str, Any], file: str, dtype: str) -> None:
    """Raise UserError where a JSON that comes with the package, which nobody should edit, is for another precision."""
    for section, needed in (("bf16", "bfloat16"), ("fp16", "float16")):
        if content.get(section, {}).get("enabled") is True and dtype != needed:
            raise UserError(f"{file} is for {needed} and model.dtype is {dtype}: set model.dtype={needed}")


class Settler:
    """Settles the values that both files can set."""

    def __init__(self, content: dict[str, Any], file: str):
        self.content = content
        self.file = file

    def __call__(self, path: str, value: Any, key: str, shown: Any = None) -> None:
        """Fill `path` where it is absent or `auto`; raise UserError where it differs from config key `key`."""
        *parents, leaf = path.split(".")
        node = self.content
        for parent in parents:
            node = node.setdefault(parent, {})
        found = node.get(leaf, "auto")
        if found == "auto":
            node[leaf] = value
        elif found is True and not isinstance(value, bool):  # equal to 1 in Python
            raise UserError(f"{self.file}: {path} is true and must be as {key}, {json.dumps(shown or value)}")
        elif as_json(found) != as_json(value):
            raise UserError(
                f"{self.file}: {path} is {json.dumps(found, default=str)} but {key} is {json.dumps(shown or value)}: "
                f'make them equal or set {path} to "auto"'
            )


def as_json(value: Any) -> Any:
    """The value as JSON holds it: a tuple is a list."""
    return list(value) if isinstance(value, tuple) else value


def refuse_unfilled(node: Any, file: str, path: str = "") -> None:
    """Raise UserError for an `auto` that nothing in the config can fill."""
    if isinstance(node, dict):
        for key, child in node.items():
            refuse_unfilled(child, file, f"{path}.{key}" if path else key)
    elif node == "auto" and not path.startswith(FILLED_LATER):
        raise UserError(f'{file}: {path} is "auto" but nothing in the config fills it: give a value')


def zero_stage(content: dict[str, Any]) -> int:
    """The ZeRO stage that DeepSpeed's JSON asks for."""
    return int(content.get("zero_optimization", {}).get("stage", 0))
