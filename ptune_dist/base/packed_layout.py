"""How a packed weight lies in its file, from the shapes of its tensors and the base's `quantization_config`.

A layout that does not follow from these is refused: a wrong guess would be another base.
"""

from typing import Any

import torch

from ptune_dist.base.packed import Grouped, read_whole
from ptune_dist.base.weight_files import WeightFiles
from ptune_dist.errors import UserError

GIVE_FLOATS = "which is not read: give the float base"


def find_block(shape: tuple[int, ...], scales: tuple[int, ...], config: dict[str, Any], name: str) -> tuple[int, int]:
    """Rows and columns that share a scale; all of a matrix for a single scale. Raises UserError."""
    num_rows, width = shape[-2:]
    outer = shape[:-2]
    sizes = tuple(size for size in scales if size != 1)
    if torch.Size(scales).numel() == 1 or (outer and scales == outer):
        return num_rows, width
    if not outer and len(scales) == 1 and scales[0] == num_rows:
        return 1, width
    if not outer and len(scales) > 2 and len(sizes) == 2:
        scales = sizes
    if len(scales) == len(shape) and scales[:-2] == outer:
        hints = block_hints(config)
        down, across = list(scales)[-2:]
        rows = divide(num_rows, down, [rows for rows, _ in hints])
        columns = divide(width, across, [columns for _, columns in hints])
        if rows and columns:
            return rows, columns
    raise UserError(f"model.path: {name} {list(shape)} has scales {list(scales)}, {GIVE_FLOATS}")


def divide(size: int, count: int, hints: list[int]) -> int | None:
    """The size of each of `count` blocks; the last may be smaller if the config names the size. None if unknown."""
    if count in (1, size):
        return size // count
    named = {hint for hint in hints if -(-size // hint) == count}
    if len(named) == 1:
        return named.pop()
    found = size // count
    return found if found * count == size and found & (found - 1) == 0 else None


def block_hints(config: dict[str, Any]) -> list[tuple[int, int]]:
    """Sizes of blocks, rows and columns, that a config names."""
    groups = config.get("config_groups")
    parts = [config, config.get("quantization")]
    parts += [(group or {}).get("weights") for group in groups.values()] if isinstance(groups, dict) else []
    found: list[tuple[int, int]] = []
    for part in parts:
        part = part if isinstance(part, dict) else {}
        block = part.get("weight_block_size") or part.get("block_structure")
        if isinstance(block, list) and len(block) == 2:
            found.append((int(block[0]), int(block[1])))
        size = part.get("group_size")
        if isinstance(size, int) and size > 0:
            found.append((1, size))
    return found


def find_bits(files: WeightFiles, name: str, stem: str, config: dict[str, Any]) -> tuple[int, int, bool]:
    """Bits of the integers that a row packs, how many it has, and whether they cross words. Raises UserError."""
    groups = config.get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else []
    named = {(group.get("weights") or {}).get("num_bits") for group in groups}
    num_words = files.shapes[name][-1]
    width = int(read_whole(files, f"{stem}_shape")[-1]) if f"{stem}_shape" in files.shapes else None
    found: set[tuple[int, int, bool]] = set()
    for bits in (bits for bits in named if isinstance(bits, int) and 0 < bits <= 8):
        for is_dense in {True, 32 % bits == 0}:
            bits_of_words = 32 if is_dense else 32 // bits * bits  # that are used
            count = width if width is not None else num_words * bits_of_words // bits
            if -(-count * bits // bits_of_words) == num_words:
                found.add((bits, count, is_dense))
    if len(found) != 1:
        bits = ", ".join(sorted(map(str, named)))
        raise UserError(f"model.path: {name} packs integers of {bits or 'an unknown number of'} bits, {GIVE_FLOATS}")
    return found.pop()


def open_grouped(files: WeightFiles, prefix: str, config: dict[str, Any]) -> Grouped:
    """A weight of GPTQ or AWQ; how many bits it has follows from its shapes. Raises UserError."""
    shapes = files.shapes
    method = config["quant_method"]
    is_awq = method == "awq"
    missing = [leaf for leaf in ("qzeros", "scales") if len(shapes.get(prefix + leaf, ())) != 2]
    if missing:
        raise UserError(f"model.path: {prefix}qweight has no {missing[0]}, {GIVE_FLOATS}")
    num_words, num_columns = shapes[f"{prefix}qweight"]
    num_groups, num_outputs = shapes[f"{prefix}scales"]
    bits = int(config.get("bits") or config.get("w_bit") or 4)
    num_inputs = num_words if is_awq else num_words * 32 // bits
    order = shapes.get(f"{prefix}g_idx", (0,))[0]
    if not is_awq and order:  # single layers may have other bits than the config's
        num_inputs = order
        bits = num_words * 32 // order
    stored_outputs = num_columns * 32 // bits if is_awq else num_columns
    fits = stored_outputs == num_outputs and shapes[f"{prefix}qzeros"] == (num_groups, -(-num_outputs * bits // 32))
    is_int32 = all(files.dtype_of(prefix + leaf) == torch.int32 for leaf in ("qweight", "qzeros"))
    if bits not in ((4,) if is_awq else (2, 3, 4, 8)) or not fits or not is_int32 or num_inputs % num_groups:
        raise UserError(
            f"model.path: {prefix}qweight is {method} with {bits} bits in a layout of its own, {GIVE_FLOATS}"
        )
    version = config.get("checkpoint_format") or config.get("format")
    has_low_zeros = not is_awq and version != "gptq_v2"
    return Grouped((num_outputs, num_inputs), prefix, bits, num_inputs // num_groups, is_awq, has_low_zeros)
