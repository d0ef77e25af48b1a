"""What a folder is that is no base, or a base that cannot be read as it is, and what to do about it."""

import importlib.util
import json
import shlex
from pathlib import Path

MAX_POINTER_BYTES = 1024
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
OTHER_TOKENIZERS = ("tekken.json", "tiktoken.model", "qwen.tiktoken")
OWN_CODE = "is code of its own (auto_map), which is not run: give a base that transformers has a class for"
# PEFT's types that add positions instead of changing weights.
PROMPT_METHODS = (
    "PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "CARTRIDGE",
    "MULTITASK_PROMPT_TUNING",
    "CPT",
    "ADAPTION_PROMPT",
)
# Weights that are not read, by the name of their files, and what they are called.
ELSEWHERE = {
    "consolidated*": "weights in the layout of its publisher (consolidated)",
    "*.pth": "pickled weights (.pth)",
    "*.pt": "pickled weights (.pt)",
    "*.h5": "TensorFlow weights (.h5)",
    "*.ckpt*": "weights in a checkpoint (.ckpt)",
    "*.msgpack": "Flax weights (.msgpack)",
    "*.npz": "MLX or NumPy weights (.npz)",
    "*.onnx": "ONNX weights (.onnx)",
    "openvino_model*": "OpenVINO weights",
    "*.engine": "a TensorRT engine's weights (.engine)",
    "*.mlmodel*": "Core ML weights",
}


def describe_other_folder(place: Path) -> str | None:
    """What a folder without a config.json is and what to do; None if it cannot be told."""
    names = {file.name for file in place.iterdir()}

    def has(*patterns: str) -> bool:
        return any(any(place.glob(pattern)) for pattern in patterns)

    if "adapter_config.json" in names:
        return describe_adapter(place)
    if "config.json" in names:
        return "has a config.json that is not a file, or a link to none: copy the files that links point to as well"
    if not names:
        return "is an empty folder: give the folder that contains config.json"
    if has("*.gguf"):
        return f"holds GGUF files: {describe_gguf(next(place.glob('*.gguf')))}"
    if "config.yaml" in names and names & {"status.json", "prompt", "checkpoints", "metrics.jsonl"}:
        return "is a run of ptune-dist, not a base: give the model.path of its config.yaml"
    if "latest" in names or has("global_step*") or place.name.startswith("global_step"):
        return "is a checkpoint of DeepSpeed: convert it with its zero_to_fp32.py and give a folder with config.json"
    if has("checkpoint-*/config.json"):
        found = sorted(place.glob("checkpoint-*/config.json"))[-1].parent
        return f"holds checkpoints of a trainer: give one of them, such as {found}"
    if "model_index.json" in names:
        return "is a diffusers pipeline, not a language model: give its text model's folder, if any"
    if has("snapshots/*/config.json"):
        return f"is a cache of the hub: give {next(place.glob('snapshots/*/config.json')).parent}"
    if has("*.incomplete", "**/*.incomplete"):
        return "is a download that was interrupted: finish it with: hf download NAME --local-dir FOLDER"
    if "params.json" in names or has("consolidated*"):
        return "is in the layout of its publisher (params.json): give the folder in the layout of Hugging Face"
    if has("*.onnx", "onnx/*.onnx"):
        return "is an ONNX export: give the folder of the PyTorch model that it was made from"
    if has("*.zip", "*.tar", "*.tar.gz", "*.tgz"):
        return "holds an archive: unpack it and give the folder that contains config.json"
    if "modules.json" in names:
        return "is in the layout of sentence-transformers: give the folder of its transformer"
    if names & {"tokenizer.json", "tokenizer_config.json"}:
        return "holds a tokenizer only: put the base's config.json and weights there"
    inner = sorted(place.glob("*/config.json"))
    hint = f", such as {inner[0].parent}" if inner else ""
    return f"has no config.json: give the folder that contains it{hint}"


def import_command(source: str) -> str:
    """The command that makes a folder of safetensors of another format."""
    name = Path(source).stem if source.endswith(".gguf") else Path(source).name
    return f"ptune-dist import-base {shlex.quote(source)} --out {shlex.quote(name + '-base')}"


def describe_gguf(file: Path) -> str:
    return f"convert one with: {import_command(str(file))}"


def describe_adapter(place: Path) -> str:
    try:
        settings = json.loads((place / "adapter_config.json").read_text())
        base = settings["base_model_name_or_path"]
        method = settings.get("peft_type")
    except (OSError, ValueError, KeyError, TypeError):
        base = "its base"
        method = None
    if method in PROMPT_METHODS:
        return f"is a PEFT prompt ({method}) of {base}: give that base, and the prompt as prompt.init_file"
    return f"is a PEFT adapter of {base}: give that base, or merge them: {import_command(str(place))}"


def describe_other_weights(place: Path) -> str | None:
    """What a folder with a config.json holds instead of weights in safetensors; None if nothing is known of it."""

    def find(*patterns: str) -> Path | None:
        return next((file for pattern in patterns for file in sorted(place.glob(pattern))), None)

    links = [file.name for file in sorted(place.glob("model*.safetensors*")) if not file.exists()]
    if links:
        return f"has a {links[0]} that links to no file: copy the files that links point to as well"
    if (place / "adapter_config.json").is_file():
        return describe_adapter(place)
    gguf = find("*.gguf")
    if gguf:
        return f"holds GGUF files: {describe_gguf(gguf)}"
    shard = find("model-*-of-*.safetensors")
    if shard:
        return f"holds {shard.name} without {INDEX}, which lists the parts: copy that too"
    pickled = find("pytorch_model*.bin*")
    if pickled and is_pointer(pickled):
        return describe_pointer(pickled)
    if pickled:
        return f"has pickled weights, which are not read: {describe_conversion(str(place))}"
    for pattern, what in ELSEWHERE.items():
        if find(pattern, f"*/{pattern}"):
            return f"has {what}, which are not read: give the folder with its weights in safetensors"
    named = find("*.safetensors")
    if named and named.is_file():
        return f"holds {named.name}: if these are all of its weights, name the file {WHOLE}"
    if find("*.incomplete", "**/*.incomplete"):
        return "is a download that was interrupted: finish it with: hf download NAME --local-dir FOLDER"
    return None


def describe_conversion(path: str) -> str:
    return f"convert them with: {import_command(path)}"


def describe_tokenizer(place: Path, error: str) -> str | None:
    """Why a folder's tokenizer cannot be loaded, where its files or the error tell; None otherwise."""
    if "trust_remote_code" in error:
        return f"the tokenizer of {place} {OWN_CODE}"
    if (place / "tokenizer.json").is_file():
        return None
    sentencepiece = next((name for name in SENTENCEPIECE if (place / name).is_file()), None)
    missing = [name for name in ("sentencepiece", "google.protobuf") if not is_installed(name)]
    if sentencepiece and missing:
        return (
            f"{place} has no tokenizer.json, and its {sentencepiece} needs a package to read it: "
            "pip install sentencepiece protobuf"
        )
    other = next((name for name in OTHER_TOKENIZERS if (place / name).is_file()), None)
    if other:
        return f"{place} has no tokenizer.json, only {other}: put the base's tokenizer.json next to its config.json"
    if sentencepiece or any((place / name).is_file() for name in ("vocab.json", "vocab.txt")):
        return None
    return f"no tokenizer.json in {place}: put the base's tokenizer files next to its config.json"


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def describe_pointers(place: Path) -> str | None:
    """What to do where files are pointers of git-lfs instead of their contents; None if they are not."""
    needed = [place / name for name in ("config.json", "tokenizer.json", INDEX)]
    needed += sorted(place.glob("model*.safetensors"))
    pointer = next((file for file in needed if is_pointer(file)), None)
    return pointer and describe_pointer(pointer)


def describe_pointer(file: Path) -> str:
    return f"holds a git-lfs pointer instead of {file.name}: run git lfs pull there"


def is_pointer(file: Path) -> bool:
    is_small = file.is_file() and file.stat().st_size < MAX_POINTER_BYTES
    return is_small and file.read_bytes().startswith(b"version https://git-lfs")
