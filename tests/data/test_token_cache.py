"""Token ids on disk are those that every rank would build, and whatever is wrong with them is found."""

import json
import multiprocessing
import os
import resource
import signal
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from ptune_dist.common import progress_line
from ptune_dist.config.schema import DataConfig
from ptune_dist.data import build, cache_entry, encode, split_rows, token_cache, workers
from ptune_dist.data.batches import epoch_order, part_of_order, step_examples
from ptune_dist.data.build import build_split
from ptune_dist.data.examples import find_facts
from ptune_dist.errors import UserError
from tests.data.texts import encoding_of, tokenizer_with

TOKENIZER = tokenizer_with("<bos> $A")
NUM_ROWS = 300
CASES = [
    ("causal", "prefix", "{{ text }}:"),
    ("causal", "infix", "say {{ text }}:"),
    ("causal", "template", "say {{ text }}{{ prompt }}:"),
    ("seq2seq", "encoder", "{{ text }}:"),
    ("seq2seq", "decoder", "{{ text }}:"),
    ("encoder", "prefix", "{{ text }}"),
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few rows count as many."""
    monkeypatch.setattr(token_cache, "SMALLEST_BYTES", 1)
    monkeypatch.setattr(token_cache, "WAIT_S", 0.01)
    monkeypatch.setattr(token_cache, "_in_use", [])
    monkeypatch.setattr(workers, "FEWEST_ROWS", NUM_ROWS)
    monkeypatch.setattr(workers, "CHUNK_ROWS", 70)
    monkeypatch.setattr(workers, "count_cores", lambda: 2)


@pytest.fixture
def section(tmp_path):
    path = tmp_path / "a.jsonl"
    write_rows(path)

    def make(**options) -> DataConfig:
        given = {"template": "{{ text }}:", "target": "{{ label }}", "cache_dir": str(tmp_path / "cache")}
        return DataConfig(train=str(path), **given | options)

    return make


def write_rows(path: Path, *, bad: int | None = None) -> None:
    rows = [
        {"text": "abc"[: i % 4] * (i % 9) + str(i), "label": "" if i == bad else "no yes".split()[i % 2]}
        for i in range(NUM_ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(section, **options):
    split = build_split(section, encoding_of(TOKENIZER, **options), which="train")
    assert split is not None
    return split


def arrays_of(examples) -> list:
    arrays = (examples.ids, examples.offsets, examples.num_targets, examples.is_truncated, examples.num_context)
    return [array.tolist() for array in arrays] + [None if examples.numbers is None else examples.numbers.tolist()]


def forbid_reading(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the data is read again")

    monkeypatch.setattr(split_rows, "load_rows", refuse)
    monkeypatch.setattr(token_cache, "hash_file", refuse)


@pytest.mark.parametrize(("family", "placement", "template"), CASES)
def test_what_a_restart_finds_is_what_one_process_builds(section, monkeypatch, family, placement, template):
    options = {"family": family, "placement": placement, "labels": ["no", "yes"], "max_length": 12}
    alone = train(section(template=template, cache_dir=None, labels=["no", "yes"]), **options)
    built = train(section(template=template, labels=["no", "yes"]), **options)
    forbid_reading(monkeypatch)
    found = train(section(template=template, labels=["no", "yes"]), **options)
    for split in (built, found):
        assert arrays_of(split.examples) == arrays_of(alone.examples)
        assert split.examples.known == find_facts(alone.examples)
        assert isinstance(split.examples.ids.base, np.memmap)
    assert found.rows.first(1).read(0, 1) == alone.rows.read(0, 1) and found.rows.columns() == alone.rows.columns()


def test_numbers_and_plain_text_are_found_too(section, tmp_path, monkeypatch):
    path = tmp_path / "n.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "label": i / 8}) + "\n" for i in range(NUM_ROWS)))
    text = tmp_path / "t.txt"
    text.write_text("some words\n" * 50)
    cases = [
        ({"train": str(path)}, {"objective_target": "number"}),
        ({"train": str(text), "template": None, "target": None}, {}),
    ]
    for given, options in cases:
        data = section().model_copy(update=given)
        alone = train(data.model_copy(update={"cache_dir": None}), **options)
        train(data, **options)
        with monkeypatch.context() as patch:
            forbid_reading(patch)
            found = train(data, **options)
        assert arrays_of(found.examples) == arrays_of(alone.examples)
        assert found.examples.where(1) == alone.examples.where(1)


def test_another_content_option_or_tokenizer_is_another_entry(section, tmp_path):
    found = [train(section()), train(section(template="{{ text }}?")), train(section(), max_length=5)]
    other = encoding_of(tokenizer_with("$A"))
    found.append(build_split(section(), other, which="train"))
    write_rows(tmp_path / "a.jsonl", bad=None)
    text = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(text.replace("299", "298"))
    found.append(train(section()))
    assert len({split.digest() for split in found}) == 5


def test_a_file_that_was_only_touched_is_not_encoded_again(section, tmp_path, monkeypatch):
    train(section())
    os.utime(tmp_path / "a.jsonl", (1, 1))
    monkeypatch.setattr(split_rows, "load_rows", None)
    train(section())


@pytest.mark.parametrize("name", ["ids", "header.json", "offsets", "in_use"])
def test_a_damaged_entry_is_built_again(section, tmp_path, capsys, name):
    before = arrays_of(train(section()).examples)
    (entry,) = [path.parent for path in (tmp_path / "cache").glob("*/header.json")]
    if name == "in_use":
        (entry / name).unlink()
    else:
        (entry / name).write_bytes((entry / name).read_bytes()[:-1])
    assert arrays_of(train(section()).examples) == before
    assert "it is built again" in capsys.readouterr().err
    train(section())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["ids", "offsets", "num_targets", "is_truncated", "header.json"])
def test_damaged_bytes_are_found_and_cost_one_line(section, tmp_path, capsys, name):
    before = arrays_of(train(section()).examples)
    (entry,) = [path.parent for path in (tmp_path / "cache").glob("*/header.json")]
    content = bytearray((entry / name).read_bytes())
    content[len(content) // 2] ^= 1
    (entry / name).write_bytes(content if name != "header.json" else b"")
    capsys.readouterr()
    assert arrays_of(train(section()).examples) == before
    assert capsys.readouterr().err == f"warning: data.cache_dir: {entry} is damaged: it is built again\n"


def test_of_a_large_file_blocks_at_equal_distances_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_entry, "BLOCK_BYTES", 4)
    content = bytearray(range(30))
    sums = cache_entry.BlockSums()
    for start, end in ((0, 3), (3, 12), (12, 30)):
        sums.add(memoryview(content)[start:end])
    assert sums.all() == [zlib.crc32(content[at : at + 4]) for at in range(0, 30, 4)]
    found = {None: [], 12: []}
    for most_bytes, damaged in found.items():
        for at in range(30):
            changed = bytearray(content)
            changed[at] ^= 1
            (tmp_path / "ids").write_bytes(changed)
            try:
                cache_entry.compare_checksums(tmp_path / "ids", sums.all(), most_bytes)
            except ValueError:
                damaged.append(at)
    assert found == {None: list(range(30)), 12: [*range(4), *range(12, 16), *range(28, 30)]}


def test_a_mistake_in_a_row_is_named_as_without_the_cache(section, tmp_path):
    write_rows(tmp_path / "a.jsonl", bad=271)
    said = []
    for cache_dir in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        with pytest.raises(UserError) as caught:
            train(section(cache_dir=cache_dir))
        said.append(str(caught.value))
    assert len(set(said)) == 1 and "line 272" in said[0]


def build_slowly(section, log: Path, seconds: float) -> None:
    encode = build.encode_split

    def slow(*arguments):
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(seconds)
        return encode(*arguments)

    build.encode_split = slow
    os._exit(0 if train(section).examples.ids.size else 1)


def test_one_of_two_builds_and_a_killed_builder_leaves_the_work_to_the_other(section, tmp_path):
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    two = [context.Process(target=build_slowly, args=[section(), log, 0.3]) for _ in range(2)]
    for process in two:
        process.start()
    for process in two:
        process.join(30)
    assert [process.exitcode for process in two] == [0, 0] and log.read_text() == "built\n"
    other = section(template="other {{ text }}")
    killed = context.Process(target=build_slowly, args=[other, log, 30])
    killed.start()
    while log.read_text() != "built\nbuilt\n":
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join(30)
    train(other)


def test_the_least_recently_used_leaves_and_what_is_in_use_stays(section, tmp_path):
    cache = tmp_path / "cache"
    train(section())
    (first,) = [path.parent for path in cache.glob("*/header.json")]
    token_cache.evict(cache, 1)
    assert first.exists(), "this process maps it"
    for file in token_cache._in_use:
        file.close()
    train(section(template="other {{ text }}", cache_gib=1e-9))
    assert not first.exists()
    assert len(list(cache.glob("*/header.json"))) == 1


def test_a_full_or_a_read_only_disk_costs_memory_and_a_line(section, tmp_path, capsys):
    wanted = arrays_of(train(section(cache_dir=None)).examples)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        found = arrays_of(train(section()).examples)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert found == wanted
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line.startswith(f"warning: data.cache_dir: {tmp_path / 'cache'}: File too large: the token ids of ")
    (tmp_path / "file").write_text("")
    assert arrays_of(train(section(cache_dir=str(tmp_path / "file" / "x"))).examples) == wanted
    assert "Not a directory" in capsys.readouterr().err


def test_little_data_is_not_kept(section, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "SMALLEST_BYTES", 1 << 20)
    train(section())
    assert not (tmp_path / "cache").exists()


def test_the_order_of_rows_is_that_of_a_permutation(monkeypatch):
    for num, seed, epoch in ((1, 0, 0), (10, 3, 1), (100_000, 7, 2)):
        wanted = np.random.default_rng([seed, epoch]).permutation(num)
        assert np.array_equal(epoch_order(num, seed, epoch), wanted)
    num = 150_000  # three parts
    part_of_order.cache_clear()
    whole = np.concatenate([np.random.default_rng([5, epoch]).permutation(num) for epoch in range(2)])
    for step in (1, 655, 656, 1499, 1500, 1501):
        chosen = step_examples(step, batch_size=100, num_examples=num, seed=5)
        assert chosen == whole[(step - 1) * 100 : step * 100].tolist()


def test_who_waits_says_so_on_the_first_rank_of_a_node(section, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress_line, "FIRST_LINE_S", 0.05)
    monkeypatch.setattr(progress_line, "REPORT_S", 0.05)
    context = multiprocessing.get_context("fork")
    for rank, other in (("0", "one {{ text }}"), ("1", "two {{ text }}")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        log = tmp_path / f"log{rank}"
        builder = context.Process(target=build_slowly, args=[section(template=other), log, 0.5])
        builder.start()
        while not log.exists():
            time.sleep(0.01)
        train(section(template=other))
        builder.join(30)
        lines = [line for line in capsys.readouterr().err.splitlines() if "waiting for another process" in line]
        assert bool(lines) == (rank == "0")


def test_plain_text_is_encoded_alike_by_one_and_by_several_processes(section, tmp_path, monkeypatch):
    text = tmp_path / "t.txt"
    text.write_text("".join(f"line {i}\n" for i in range(2 * NUM_ROWS)))
    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", 100)
    data = section(template=None, target=None).model_copy(update={"train": str(text)})
    several = train(data)
    monkeypatch.setattr(workers, "count_cores", lambda: 1)
    alone = train(data.model_copy(update={"cache_dir": None}))
    assert arrays_of(several.examples) == arrays_of(alone.examples)
    assert len(alone.examples) > 5


def test_few_parts_are_computed_ahead_of_their_use(monkeypatch):
    asked = []
    found = workers.map_by_all_cores(str, (asked.append(i) or i for i in range(100)), num_rows=NUM_ROWS)
    assert next(found) == "0" and len(asked) <= 4
    assert [next(found) for _ in range(3)] == ["1", "2", "3"] and len(asked) <= 7
    found.close()


@pytest.mark.parametrize("options", [{"validation": 0.25}, {"references": "label", "target": "{{ label }}"}])
def test_drawn_rows_and_alternatives_are_found_as_they_are_built(tmp_path, options):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"t{i}", "label": [f"a{i}", f"b{i % 3}"][: 1 + i % 2]} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"template": "{{ text }}", "target": "{{ label | join(' ') }}", "validation": str(path)} | options

    def build_both(cache_dir: Path | None, **more: object) -> list[build.Split]:
        data = DataConfig(train=str(path), cache_dir=None if cache_dir is None else str(cache_dir), **common, **more)
        return [build_split(data, encoding_of(TOKENIZER), which=which) for which in ("train", "validation")]

    alone = build_both(None)
    for _ in range(2):
        for split, wanted in zip(build_both(tmp_path / "cache"), alone, strict=True):
            assert isinstance(split.examples.ids.base, np.memmap)
            assert arrays_of(split.examples) == arrays_of(wanted.examples)
            assert split.digest() == wanted.digest() and split.num_rows == wanted.num_rows
            assert split.rows.read(0, 40) == wanted.rows.read(0, 40)
    other = build_both(tmp_path / "cache", split_seed=1, max_examples=20)
    assert arrays_of(other[0].examples) != arrays_of(alone[0].examples)
