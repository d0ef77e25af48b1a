"""Weights from transformers' own loader, whole on every rank: for architectures whose names it must convert."""

import logging

import torch
import transformers
from transformers import PreTrainedModel

from ptune_dist.base.architecture import Architecture
from ptune_dist.base.multimodal import key_mapping, name_in_text
from ptune_dist.base.names import describe, is_harmless
from ptune_dist.base.source import describe_load_error, is_local_only
from ptune_dist.common.hub import split_revision
from ptune_dist.errors import UserError


class LoadedWeights:
    """Weights that transformers has loaded, with the interface of `weight_files.WeightFiles`."""

    bytes_read = 0

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self._tensors = tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read_flat(self, name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(self._tensors[name].reshape(-1)[start : start + len(out)])

    def read_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        return self._tensors[name][first:last]

    def read_columns(self, name: str, first: int, last: int) -> torch.Tensor:
        return self._tensors[name][:, first:last].T.contiguous()


def load_with_transformers(
    path: str, family: Architecture, dtype: torch.dtype, part_of: PreTrainedModel | None = None
) -> dict[str, torch.Tensor]:
    """Every tensor of a base by its name in the model. Raises UserError.

    `part_of`: the language model, without memory, where the files hold other parts too.
    """
    name, revision = split_revision(path)
    options = {"config": part_of.config, "key_mapping": key_mapping(part_of)} if part_of is not None else {}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        model, report = family.auto_class.from_pretrained(
            name,
            revision=revision or "main",
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=is_local_only(path),
            **options,
        )
    except Exception as error:  # safetensors, the hub and transformers each have their own errors
        raise UserError(describe_load_error(path, "weights", error)) from None
    finally:
        transformers.logging.set_verbosity(verbosity)
    extra = [name for name in report["unexpected_keys"] if not is_harmless(model, name, family)]
    if part_of is not None:
        extra = [name for name in extra if name_in_text(part_of, name) is not None]
    if extra:
        raise UserError(f"model.path: the weights of {path} do not fit its config.json: {describe({'extra': extra})}")
    reported = [*report["missing_keys"], *report["mismatched_keys"]]
    absent = {key if isinstance(key, str) else key[0] for key in reported}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in absent}
