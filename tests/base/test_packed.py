"""Weights that other packages packed are read as the numbers that these packages dequantize; see packed/write.py."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ptune_dist.base.checkpoint_formats import check_method, dequantize
from ptune_dist.base.packed_layout import find_block
from ptune_dist.base.weight_files import WeightFiles, read_header
from tests.base.bases import error_of

FILES = sorted((Path(__file__).parent / "packed").glob("*.safetensors"))
NAME = "x.weight"


def open_packed(file: Path):
    with safe_open(file, framework="pt") as opened:
        config = json.loads(opened.metadata()["quantization_config"])
        expected = opened.get_tensor("expected")
    return dequantize(WeightFiles(dict(read_header(file))), config, str(file)), expected


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_a_weight_is_what_its_own_package_dequantizes_whole_and_in_part(file):
    files, expected = open_packed(file)
    assert files.shapes[NAME] == tuple(expected.shape) and files.holds_floats(NAME)
    num_rows = len(expected)
    whole = files.read_rows(NAME, 0, num_rows)
    assert torch.allclose(whole, expected, rtol=1e-6, atol=1e-8)
    for first, last in [(0, 1), (3, 5), (num_rows - 7, num_rows)]:
        assert torch.equal(files.read_rows(NAME, first, last), whole[first:last])
    out = torch.empty(expected.numel() // 2 - 3)
    files.read_flat(NAME, 5, out)
    assert torch.equal(out, whole.reshape(-1)[5 : 5 + len(out)])


GROUPS_OF_32 = {"config_groups": {"group_0": {"weights": {"group_size": 32}}}}
BLOCKS = {"weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    "shape, scales, config, block",
    [
        ((192, 320), (2, 3), BLOCKS, (128, 128)),  # the last block of either is smaller
        ((64, 96), (64, 3), GROUPS_OF_32, (1, 32)),
        ((64, 96), (64,), {}, (1, 96)),
        ((64, 96), (64, 1), {}, (1, 96)),
        ((64, 96), (1,), {}, (64, 96)),
        ((64, 96), (2, 1, 3, 1), {}, (32, 32)),
        ((4, 64, 96), (4, 1, 96), {}, (64, 1)),
        ((4, 64, 96), (4,), {}, (64, 96)),
    ],
)
def test_blocks_follow_from_the_shape_of_the_scales_and_the_config(shape, scales, config, block):
    assert find_block(shape, scales, config, "x") == block


@pytest.mark.parametrize(
    "shape, scales, config",
    [
        ((192, 320), (2, 3), {}),  # blocks of 96 or of 128 rows
        ((192, 320), (2, 4), BLOCKS),
        ((64, 96), (96,), {}),
        ((4, 64, 96), (4, 64), {}),  # for each row, or for a block of each matrix?
        ((4, 64, 96), (64, 3), {}),
    ],
)
def test_scales_whose_blocks_are_unknown_are_refused(shape, scales, config):
    assert f"x {list(shape)} has scales {list(scales)}, which is not read" in error_of(
        find_block, shape, scales, config, "x"
    )


@pytest.mark.parametrize(
    "config, what",
    [
        ({"quant_method": "awq", "version": "gemv"}, "awq with version gemv"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "gptq with checkpoint_format marlin"),
        ({"quant_method": "gptq", "pack_dtype": "int16"}, "gptq with pack_dtype int16"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format marlin-24"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparse-24-bitmask",
        ),
        ({"quant_method": "compressed-tensors", "transform_config": {"a": 1}}, "with transforms"),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "W4A16_AWQ"}}, "quant_algo W4A16_AWQ"),
        ({"quant_method": "hqq"}, "hqq"),
    ],
)
def test_an_option_that_changes_what_is_stored_is_refused_by_name(config, what):
    assert f"{what}, which is not read" in error_of(check_method, config, "base")


def test_gptq_that_does_not_fit_its_bits_is_refused():
    file = next(file for file in FILES if file.stem == "gptq_4")
    stored = WeightFiles({name: tensor for name, tensor in read_header(file) if name != "x.g_idx"})
    config = {"quant_method": "gptq", "bits": 8}
    assert "x.qweight is gptq with 8 bits in a layout of its own" in error_of(dequantize, stored, config, "base")
