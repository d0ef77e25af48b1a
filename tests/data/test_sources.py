"""Every kind of source gives its rows unchanged, and every error is one line that names the file and the line."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from ptune_dist.data.build import check_template_columns
from ptune_dist.data.json_values import dump_json
from ptune_dist.data.sources import load_rows, split_hub_name
from ptune_dist.data.template import compile_template
from ptune_dist.errors import UserError
from tests.processes import python_path

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


def load(source, key="data.train", default_split="train"):
    return load_rows(str(source), key=key, default_split=default_split)


def rows_of(source, **options) -> list[dict]:
    rows = load(source, **options)
    return rows.read(0, len(rows))


def column_of(source, column="text", **options) -> list:
    return [row[column] for row in rows_of(source, **options)]


def error_of(source, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# The rows


def test_jsonl_rows_and_their_lines_with_blank_lines_counted(write):
    path = write("a.jsonl", '\n{"text": "a", "label": 1}\n\n  \n{"text": "b", "label": 2}\n')
    rows = load(path)
    assert rows.read(0, 9) == [{"text": "a", "label": 1}, {"text": "b", "label": 2}]
    assert (rows.name, rows.kind, len(rows), rows.columns()) == (path, "rows", 2, ["text", "label"])
    assert [rows.where(0), rows.where(1)] == [f"{path} line 2", f"{path} line 5"]


def test_json_strings_stay_strings_even_when_they_look_like_dates_or_numbers(write):
    values = ["2024-01-01", "2024-01-01T00:00:00Z", "007", "1e5", "null", "NaN", "true", ""]
    path = write("a.jsonl", "".join(f'{{"text": "{value}"}}\n' for value in values))
    assert column_of(path) == values


def test_json_array_over_many_lines_knows_the_line_of_each_row(write):
    path = write("a.json", ' \n[\n  {"text": "a\\n[b"},\n  {\n    "text": "c"\n  }, {"text": "d"}\n]\n')
    rows = load(path)
    assert column_of(rows.name) == ["a\n[b", "c", "d"]
    assert [rows.where(i).rsplit(" ", 1)[1] for i in range(3)] == ["3", "4", "6"]


def test_json_file_may_hold_one_object_per_line(write):
    rows = load(write("a.json", '{"text": "a"}\n{"text": "b"}\n'))
    assert column_of(rows.name) == ["a", "b"]
    assert rows.where(1).endswith("a.json line 2")


def test_columns_may_come_late_and_values_may_be_null_or_nested(write):
    lines = ['{"a": null, "m": {"x": 1}}'] * 20_000 + ['{"a": "z", "m": {"y": ["q"]}, "late": 1.5}']
    rows = load(write("a.jsonl", "\n".join(lines)))
    assert rows.columns() == ["a", "m", "late"]
    assert rows.read(0, 1) == [{"a": None, "m": {"x": 1}}]
    assert rows.read(20_000, 20_001) == [{"a": "z", "m": {"y": ["q"]}, "late": 1.5}]


def test_csv_values_are_all_text(write):
    rows = load(write("a.csv", "id,text,label\n007,NA,None\n1.50,,nan\n"))
    assert rows.read(0, 2) == [{"id": "007", "text": "NA", "label": "None"}, {"id": "1.50", "text": "", "label": "nan"}]


def test_csv_lines_count_the_header_blank_lines_and_line_breaks_in_quotes(write):
    path = write("a.csv", 'text,label\r\n"one\r\ntwo, ""three""",x\r\n\r\nfour,y\r\n')
    rows = load(path)
    assert column_of(rows.name) == ['one\r\ntwo, "three"', "four"]
    assert [rows.where(0), rows.where(1)] == [f"{path} line 2", f"{path} line 5"]


def test_tsv_splits_at_tabs_alone(write):
    assert rows_of(write("a.tsv", "text\tlabel\na, b\tc\n"))[0] == {"text": "a, b", "label": "c"}


def test_csv_field_may_be_long(write):
    assert len(column_of(write("a.csv", "text\n" + "x" * 300_000 + "\n"))[0]) == 300_000


def test_txt_gives_lines_with_their_line_breaks(write):
    path = write("a.TXT", "one\n\ntwo\u2028still two\nthree")
    rows = load(path)
    assert rows.kind == "text"
    assert rows.columns() == ["text"]
    assert column_of(rows.name) == ["one\n", "\n", "two\u2028still two\n", "three"]
    assert rows.where(3) == f"{path} line 4"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.json", "a.csv", "a.tsv", "a.txt"])
def test_byte_order_mark_is_skipped(write, name):
    content = {"a.jsonl": '{"text": "a"}', "a.json": '[{"text": "a"}]', "b.json": '{"text": "a"}', "a.txt": "a"}
    rows = load(write(name, b"\xef\xbb\xbf" + content.get(name, "text\na\n").encode()))
    assert rows.read(0, 1) == [{"text": "a"}]


def test_parquet_rows_in_a_folder_with_glob_characters(tmp_path):
    (tmp_path / "x[1]*").mkdir()
    path = tmp_path / "x[1]*" / "a?.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), path)
    rows = load(path)
    assert column_of(rows.name) == ["a", "b"]
    assert rows.where(1) == f"{path} row 2 (the first is row 1)"


def test_parquet_numbers_print_in_the_precision_of_their_column(tmp_path):
    kinds = {"half": pyarrow.float16(), "single": pyarrow.float32(), "double": pyarrow.float64()}
    columns = {name: pyarrow.array([0.1, None, 1e20 if name != "half" else 2.5], kind) for name, kind in kinds.items()}
    columns["inside"] = pyarrow.array([{"x": [0.3, None]}] * 3, pyarrow.struct([("x", pyarrow.list_(kinds["single"]))]))
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    rows = rows_of(tmp_path / "a.parquet")
    assert str(rows[0]) == "{'half': 0.1, 'single': 0.1, 'double': 0.1, 'inside': {'x': [0.3, None]}}"
    assert rows[1]["single"] is None
    assert [str(value) for value in rows[2].values()][:3] == ["2.5", "1e+20", "1e+20"]


def test_parquet_column_of_maps_is_left_out_and_named_where_it_is_used(tmp_path):
    maps = pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "m": maps}), path)
    rows = load(path)
    assert rows.read(0, 1) == [{"text": "a"}]
    check_template_columns(compile_template("{{ text }}", key="data.template"), rows)
    with pytest.raises(UserError, match="data.template uses column 'm' of .*a.parquet, whose type map<"):
        check_template_columns(compile_template("{{ m.k }}", key="data.template"), rows)
    pyarrow.parquet.write_table(pyarrow.table({"m": maps}), tmp_path / "b.parquet")
    assert "no column has a type that can be read" in error_of(tmp_path / "b.parquet")


def test_saved_folder_of_one_dataset_and_of_splits(tmp_path):
    one = datasets.Dataset.from_dict({"text": ["a"]})
    one.with_format("numpy").save_to_disk(tmp_path / "one")
    splits = datasets.DatasetDict({"train": one, "validation": datasets.Dataset.from_dict({"text": ["v", "w"]})})
    splits.save_to_disk(tmp_path / "many")
    assert rows_of(tmp_path / "one") == [{"text": "a"}]
    assert type(column_of(tmp_path / "one")[0]) is str
    assert len(load(tmp_path / "many")) == 1
    assert column_of(tmp_path / "many", default_split="validation") == ["v", "w"]
    assert len(load(f"{tmp_path / 'many'}:validation")) == 2
    message = error_of(tmp_path / "many", default_split="test")
    assert "no split 'test', only train, validation" in message
    assert message.startswith("data.train: ")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt", ".parquet"])
def test_edited_file_is_read_anew_even_with_its_old_size_and_time(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"

    def write_value(value):
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": [value]}), path)
        else:
            path.write_text({".jsonl": f'{{"text": "{value}"}}', ".csv": f"text\n{value}\n", ".txt": value}[suffix])

    write_value("old")
    before = path.stat()
    assert column_of(path) == ["old"]
    write_value("new")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert column_of(path) == ["new"]


def test_loading_prints_nothing(tmp_path, capfd):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    load(path)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not parquet PAR1")
    error_of(tmp_path / "bad.parquet")
    assert capfd.readouterr() == ("", "")


def test_several_processes_load_the_same_parquet_file_at_once(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"row {i}" for i in range(20_000)]}), path)
    start = tmp_path / "start"
    program = (
        "import os, sys, time; from ptune_dist.data.sources import load_rows\n"
        "while not os.path.exists(sys.argv[2]): time.sleep(0.005)\n"
        "rows = load_rows(sys.argv[1], key='data.train', default_split='train'); "
        "print(len(rows), *rows.read(19999, 20000))"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": python_path(ROOT)}
    command = [sys.executable, "-c", program, str(path), str(start)]
    children = [subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) for _ in range(3)]
    start.touch()
    for child in children:
        out, err = child.communicate(timeout=120)
        assert (child.returncode, out.strip(), err) == (0, "20000 {'text': 'row 19999'}", "")


# Errors in a source


def test_missing_file_names_the_nearest_one(write, tmp_path):
    near = write("train.jsonl", "{}")
    message = error_of(tmp_path / "trian.jsonl")
    assert message == f"data.train: no file {tmp_path}/trian.jsonl; did you mean {near}?"
    assert f"looked in {tmp_path}" in error_of(tmp_path / "quite-other.csv", key="data.validation")


@pytest.mark.parametrize("source", ["./rows", "/no/such/rows", "no/such/rows.jsonl", "rows.jsonl", "a/b/c", "a b"])
def test_what_looks_like_a_path_is_a_missing_file_and_not_a_hub_name(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"no file {source}" in error_of(source)


def test_missing_folder_is_named(tmp_path):
    assert f"there is no folder {tmp_path}/none" in error_of(tmp_path / "none" / "a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.json", "a.csv", "a.tsv", "a.txt"])
@pytest.mark.parametrize("content", ["", "\n\n", "header only"])
def test_file_without_rows(write, name, content):
    if content == "header only":
        content = {"a.csv": "text,label\n", "a.tsv": "text\tlabel\n", "b.json": " [ ] "}.get(name, "")
    message = error_of(write(name, content))
    assert "has no rows" in message or "has no text" in message
    assert name in message


def test_parquet_and_saved_folder_without_rows(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "saved")
    assert "a.parquet has no rows" in error_of(tmp_path / "a.parquet")
    assert "saved has no rows" in error_of(tmp_path / "saved")


def test_row_that_is_not_json_names_line_and_what_was_found(write):
    message = error_of(write("a.jsonl", '{"a": 1}\n\nhello, this is a line that runs on and on and on\n'))
    assert "a.jsonl line 3: not JSON" in message
    assert "'hello, this is a line that runs on an...'" in message
    assert "one object on each line" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[\n{"a": 1},\n{"a": oops}\n]', "line 3: not JSON (Expecting value), found 'oops}'"),
        ('[\n{"a": 1}\n{"a": 2}\n]', "line 3: not JSON: found '{\"a\": 2}' where ',' or ']'"),
        ('[\n{"a": 1}\n\n', "line 4: not JSON: found the end of the file where ',' or ']'"),
        ('[\n{"a": 1},\n]', "line 3: not JSON (Expecting value), found ']'"),
        ('[{"a": 1}]\nmore', "line 2: not JSON: found 'more' after the end of the array"),
        ("[", "line 1: not JSON (Expecting value), found the end of the file"),
        ('{\n  "data": []\n}', "has no rows"),
        ('{\n  "a": [{"x": 1}], "b": [{"x": 1}]\n}', "one object with several lists (a, b)"),
        ('[\n{"a": 1},\n"text"]', "line 3: a row must be a JSON object"),
        ("[" * 100_000, "line 1: not JSON (it is nested too deeply)"),
    ],
)
def test_damaged_json_file_names_the_line(write, content, expected):
    assert expected in error_of(write("a.json", content))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("3", "a number"),
        ('"x"', "text"),
        ("null", "null"),
        ("true", "true or false"),
        ("[1]", "a list"),
        ("{}", "empty"),
    ],
)
def test_json_row_that_is_not_an_object(write, line, found):
    message = error_of(write("a.jsonl", f'{{"a": 1}}\n{line}\n'))
    assert "a.jsonl line 2: a row must be a JSON object" in message
    assert found in message


def test_array_in_a_jsonl_file_is_told_its_extension(write):
    assert "an array of rows is a .json file" in error_of(write("a.jsonl", '[{"a": 1}]'))


def test_a_row_keeps_its_own_values_whatever_other_rows_hold(write):
    lines = [
        '{"a": 18}',
        '{"a": 7.5}',
        '{"a": "x"}',
        '{"a": [1, "x", {"b": null}]}',
        '{"z": {"y": 1, "b": 2}, "a": true}',
    ]
    rows = rows_of(write("a.jsonl", "\n".join(lines)))
    assert [json.dumps(row) for row in rows] == lines


def test_numbers_print_as_they_are_written(write):
    literals = ["18", "7.50", "1e3", "1" + "0" * 30, "-0.0", "-0", "0.1", "1E+2", "NaN", "-Infinity", "1e999"]
    rows = pickle.loads(pickle.dumps(load(write("a.jsonl", "".join(f'{{"a": {text}}}\n' for text in literals)))))
    values = [row["a"] for row in rows.read(0, len(rows))]
    assert [str(value) for value in values] == literals
    assert [f"{value}" for value in values] == literals
    assert [dump_json(["x", value]) for value in values] == [f'["x", {text}]' for text in literals]
    assert values[1] + values[2] == 1007.5
    assert values[5] == 0


def test_half_of_a_surrogate_pair_and_a_key_that_occurs_twice_are_refused(write):
    message = error_of(write("a.jsonl", '{"b": "\\ud83d\\ude00"}\n{"a": ["\\ud800"]}\n'))
    assert "line 2: column 'a' contains half of a surrogate pair" in message
    assert "line 2: not JSON (the key 'a' occurs twice" in error_of(write("b.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n'))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.json", "a.csv", "a.tsv", "a.txt"])
def test_undecodable_bytes_name_the_line_and_the_fix(write, name):
    content = {"a.jsonl": b'{"text": "a"}\n', "a.json": b'{"text": "a"}\n', "b.json": b"[\n"}
    message = error_of(write(name, content.get(name, b"text\n") + b'{"text": "caf\xe9"}\n'))
    assert f"{name} line 2: these bytes are not UTF-8 text; save the file as UTF-8" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a,b\n1,2\n\n3,4,5\n", "line 4: 3 fields where the header has 2"),
        ("a,b\n1\n", "line 2: 1 fields where the header has 2"),
        ('a,b\n1,2\n"3,4\n5,6\n', "line 3: unexpected end of data"),
        ('a,b\n1,2\n"3"x,4\n', "line 3: ',' expected after '\"'"),
        ("a,,b\n1,2,3\n", "line 1: column 2 has no name"),
        ("a,b,a\n1,2,3\n", "line 1: the header names column 'a' twice"),
    ],
)
def test_damaged_csv_names_the_line(write, content, expected):
    assert "a.csv " + expected in error_of(write("a.csv", content))


def test_unknown_extension_lists_the_known_ones(write):
    message = error_of(write("a.xlsx", "x"))
    assert "unknown type (.xlsx)" in message
    assert ".jsonl" in message
    assert "no extension" in error_of(write("rows", "x"))


def test_damaged_parquet_and_folders_that_are_not_saved_datasets(write, tmp_path):
    assert "a.parquet cannot be read as parquet" in error_of(write("a.parquet", "not parquet"))
    assert "not one written by save_to_disk of `datasets`" in error_of(tmp_path)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{")
    assert "saved cannot be loaded" in error_of(tmp_path / "saved")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_says_why(write):
    path = write("a.jsonl", "{}")
    os.chmod(path, 0)
    assert "cannot be read: Permission denied" in error_of(path)


def test_file_that_shrank_since_it_was_loaded_still_has_names_for_rows(write):
    path = write("a.jsonl", '{"a": 1}\n{"a": 2}\n')
    rows = load(path)
    write("a.jsonl", '{"a": 1}\n')
    assert rows.where(1) == f"{path} row 2 (the first is row 1)"


# Hub names


def test_hub_names_are_taken_apart():
    assert split_hub_name("glue", "train") == ("glue", None, "train")
    assert split_hub_name("nyu-mll/glue@sst2:validation", "train") == ("nyu-mll/glue", "sst2", "validation")
    assert split_hub_name("user/set-1.5:test", "train") == ("user/set-1.5", None, "test")


@pytest.mark.parametrize("source", ["user/rows", "user/set-1.5@config:test", "data/train"])
def test_hub_name_without_a_network_is_refused_at_once(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    message = error_of(source)
    assert time.monotonic() - began < 10
    assert message.startswith(f"data.train: {source} ")
    assert "there is no network, or the name is wrong" in message


@pytest.mark.parametrize(
    ("source", "advice"),
    [
        ("s3://bucket/a.jsonl", "rows are read from files: copy it to a file first"),
        ("gs://bucket/a.parquet", "rows are read from files: copy it to a file first"),
        ("https://example.org/a.jsonl", "rows are read from files: copy it to a file first"),
        ("file:///data/a.jsonl", "files are named by their paths: write /data/a.jsonl"),
        ("hf://datasets/stanfordnlp/sst2", "datasets on the hub are named by their names: write stanfordnlp/sst2"),
        ("https://huggingface.co/datasets/a/b", "datasets on the hub are named by their names: write a/b"),
    ],
)
def test_a_url_is_told_what_to_write(source, advice):
    assert error_of(source) == f"data.train: {source} is a URL, and {advice}"


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert error_of(str(tmp_path / "pipe.jsonl")).endswith(
        "pipe.jsonl is a pipe or a device, and rows are read several times: save them as a file"
    )
