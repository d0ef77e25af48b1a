"""Any part of a tensor is read as safetensors would read it, and nothing else; damaged files are named."""

import json
import shlex
import struct
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ptune_dist.base import weight_files
from ptune_dist.base.weight_files import DTYPES, WeightFiles, open_weight_files
from ptune_dist.cli import main
from tests.base.bases import error_of, load, logits_of

SHAPES = {"matrix": (7, 5), "cube": (3, 4, 5), "vector": (11,), "scalar": (), "empty": (0, 4), "row": (1, 9)}


def numbers(shape, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(prod(shape))
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=generator).to(dtype)


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> WeightFiles:
    save_file(tensors, folder / "model.safetensors")
    return open_files(folder)


def open_files(folder: Path) -> WeightFiles:
    return open_weight_files(str(folder), local_only=True)


def read(files: WeightFiles, name: str, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(stop - start, dtype=dtype)
    files.read_flat(name, start, out)
    return out


def write_shards(folder: Path) -> dict[str, torch.Tensor]:
    """Two files and their index; returns the tensors."""
    tensors = {name: numbers(shape, torch.float32) for name, shape in SHAPES.items()}
    names = list(tensors)
    shards = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


# Reading


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_any_part_of_a_tensor_of_any_dtype_is_what_safetensors_loads(tmp_path, dtype):
    files = write(tmp_path, {name: numbers(shape, dtype) for name, shape in SHAPES.items()})
    for name, whole in load_file(tmp_path / "model.safetensors").items():
        assert files.shapes[name] == whole.shape
        flat = whole.reshape(-1)
        for start in range(len(flat) + 1):
            for stop in range(start, len(flat) + 1):
                assert torch.equal(read(files, name, start, stop, dtype), flat[start:stop])


def test_rows_and_columns_are_those_of_safetensors_slices(tmp_path):
    files = write(tmp_path, {name: numbers(shape, torch.bfloat16) for name, shape in SHAPES.items()})
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        for name in ("matrix", "cube", "row", "vector"):
            part = opened.get_slice(name)
            for first in range(SHAPES[name][0] + 1):
                for last in range(first, SHAPES[name][0] + 1):
                    assert torch.equal(files.read_rows(name, first, last), part[first:last])
        for first in range(5):
            for last in range(first + 1, 6):
                columns = files.read_columns("matrix", first, last)
                assert columns.is_contiguous() and torch.equal(columns, opened.get_slice("matrix")[:, first:last].T)


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 8, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_part_is_cast_as_torch_casts_it_however_it_is_cut_into_chunks(tmp_path, monkeypatch, dtype, chunk_bytes):
    monkeypatch.setattr(weight_files, "CHUNK_BYTES", chunk_bytes)
    for stored in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        whole = numbers((7, 5), stored)
        files = write(tmp_path, {"matrix": whole})
        assert torch.equal(read(files, "matrix", 3, 30, dtype), whole.view(-1)[3:30].to(dtype))


def test_a_part_lands_in_the_memory_that_is_meant_for_it(tmp_path):
    whole = numbers((7, 5), torch.float32)
    files = write(tmp_path, {"matrix": whole})
    memory = torch.zeros(12)
    files.read_flat("matrix", 4, memory[2:9])
    assert torch.equal(memory, torch.cat([torch.zeros(2), whole.view(-1)[4:11], torch.zeros(3)]))


def test_shards_are_read_as_one(tmp_path):
    tensors = write_shards(tmp_path)
    files = open_files(tmp_path)
    assert files.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert torch.equal(read(files, name, 0, tensor.numel(), torch.float32), tensor.reshape(-1))


def test_the_bytes_read_are_those_asked_for_and_no_more(tmp_path):
    files = write(tmp_path, {"matrix": numbers((7, 5), torch.float16), "vector": numbers((11,), torch.float64)})
    assert files.bytes_read == 0  # headers are not counted
    read(files, "matrix", 3, 10, torch.float16)
    assert files.bytes_read == 7 * 2
    read(files, "matrix", 0, 35, torch.float32)  # cast
    assert files.bytes_read == 7 * 2 + 35 * 2
    files.read_rows("vector", 2, 6)
    assert files.bytes_read == 7 * 2 + 35 * 2 + 4 * 8
    before = files.bytes_read
    files.read_columns("matrix", 1, 4)
    assert files.bytes_read - before == 7 * 3 * 2


def test_files_are_closed_when_they_are_no_longer_needed(tmp_path):
    files = write(tmp_path, {"matrix": numbers((7, 5), torch.float32)})
    files.read_rows("matrix", 0, 1)

    def num_opened() -> int:
        links = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
        return sum(link == tmp_path / "model.safetensors" for link in links)

    assert num_opened() == 1
    del files
    assert num_opened() == 0


# Errors


@pytest.fixture
def weights(tmp_path) -> Path:
    write(tmp_path, {"matrix": numbers((70, 50), torch.float32)})
    return tmp_path / "model.safetensors"


def rewrite_header(file: Path, change) -> None:
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.dumps(change(json.loads(content[8 : 8 + size]))).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])


@pytest.mark.parametrize("size", [0, 7, 8, 40, 5000, -1])
def test_a_file_that_ends_early_is_named(weights, size):
    weights.write_bytes(weights.read_bytes()[:size])
    assert f"the weights in {weights} are damaged" in error_of(open_files, weights.parent)


def test_a_file_that_continues_after_its_end_is_named(weights):
    weights.write_bytes(weights.read_bytes() + b"x")
    assert f"the weights in {weights} are damaged" in error_of(open_files, weights.parent)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"\xff" * 8 + content[8:],  # a header longer than any file
        lambda content: content[:8] + b"x" + content[9:],  # not JSON
        lambda content: content.replace(b"shape", b"shane"),
        lambda content: content.replace(b"[70,50]", b"[71,50]"),  # not the size that its bytes have
        lambda content: b"\x80\x02}" + content,  # a pickle
    ],
)
def test_a_file_with_a_corrupt_header_is_named(weights, damage):
    content = weights.read_bytes()
    assert damage(content) != content
    weights.write_bytes(damage(content))
    assert f"the weights in {weights} are damaged" in error_of(open_files, weights.parent)


def test_a_file_that_shrinks_while_it_is_read_is_named(weights):
    files = open_files(weights.parent)
    weights.write_bytes(weights.read_bytes()[:-40])
    message = error_of(files.read_rows, "matrix", 0, 70)
    assert str(weights) in message and "shorter" in message


def test_a_dtype_that_is_not_read_is_named_with_its_tensor(weights):
    rewrite_header(weights, lambda header: {"matrix": header["matrix"] | {"dtype": "C64", "shape": [70, 25]}})
    message = error_of(open_files, weights.parent)
    assert str(weights) in message and "matrix is stored as C64" in message


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    message = error_of(open_files, tmp_path)
    assert "b.safetensors" in message and "a.safetensors" not in message


@pytest.mark.parametrize(
    "content",
    [
        *["", "{", "[]", "{}", '{"weight_map": []}', b"\xff\xfe"],
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../a.safetensors"}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": null}}',
    ],
)
def test_an_index_that_is_none_is_named(tmp_path, content):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(index) in error_of(open_files, tmp_path)


def test_a_folder_without_weights_is_told_what_it_lacks(tmp_path):
    message = error_of(open_files, tmp_path)
    assert str(tmp_path) in message and "neither model.safetensors nor model.safetensors.index.json" in message


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_are_not_opened(tmp_path, file):
    (tmp_path / file).write_bytes(b"no pickle at all")
    message = error_of(open_files, tmp_path)
    assert "pickled" in message and "convert them with: ptune-dist import-base " in message


def test_the_command_for_pickled_weights_makes_a_folder_that_is_read(base, tmp_path, monkeypatch):
    wanted = logits_of(load(base))
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    _, _, command = error_of(load, base).partition("convert them with: ")
    program, *arguments = shlex.split(command)
    assert program == "ptune-dist"
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    converted = tmp_path / f"{base.name}-base"
    assert torch.equal(logits_of(load(converted)), wanted)
    assert (converted / "tokenizer.json").exists()


def test_a_buffer_is_read_into_again_only_once_it_has_been_copied(monkeypatch):
    log: list[str] = []

    class Event:
        def __init__(self):
            self.name = f"copy {len([entry for entry in log if entry.startswith('queued')])}"

        def record(self, _stream) -> None:
            log.append(f"queued {self.name}")

        def synchronize(self) -> None:
            log.append(f"waited for {self.name}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    buffers = weight_files.Buffers(2, is_pinned=False)
    places = []
    for number, num_bytes in enumerate((8, 8, 8, 16)):
        places.append(buffers.take(num_bytes).data_ptr())
        log.append(f"read {number}")
        buffers.copied(torch.device("cuda"))
    assert places[0] == places[2] != places[1]
    assert log[:4] == ["read 0", "queued copy 0", "read 1", "queued copy 1"]
    assert log[4:] == ["waited for copy 0", "read 2", "queued copy 2", "waited for copy 1", "read 3", "queued copy 3"]
