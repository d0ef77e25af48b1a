"""A chat in a terminal: what is asked is the run's own row or conversation, and Ctrl-C costs one answer alone."""

import io
import json
import signal
import threading
import time
from pathlib import Path

import pytest

import ptune_dist
from ptune_dist.answering.interactive import Conversation, Shown, interrupts_as_exceptions, talk
from ptune_dist.cli import main
from ptune_dist.run.folder import read_run_config
from ptune_dist.run.reading import build_reading
from ptune_dist.run.resolve import resolve
from ptune_dist.tiny.make import build_tokenizer
from tests.conftest import TINY, build_tiny_base

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny base with a chat template."""
    folder = build_tiny_base("llama", tmp_path_factory.mktemp("base") / "llama")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def train_run(folder: Path, data: dict, base: Path, rows: list[dict]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"max_steps": 1, "batch_size": 1}
    prompt = {"num_virtual_tokens": 2}
    content = {"output_dir": folder / "run", "model": {"path": base}, "prompt": prompt, "train": train}
    ptune_dist.train(content | {"data": {"train": file} | data, "evaluate": {"max_new_tokens": 4}})
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory, base) -> Path:
    """A run of wrapped rows."""
    data = {"template": "Say {{ word }}.", "target": "{{ answer }}", "chat": True, "system": "Be brief."}
    return train_run(tmp_path_factory.mktemp("chat"), data, base, [{"word": "a", "answer": "b"}])


def read_text(reading, rows) -> str:
    from ptune_dist.commands import build_run_inputs

    ((context, rest),) = build_run_inputs(reading, rows)
    return reading.tokenizer.decode([*context, *rest])


def test_later_turns_hold_what_was_said_before(run):
    conversation = Conversation(build_reading(read_run_config(run, resolve=resolve)))
    start = "<system>Be brief.<eos><user>Say one.<eos>"
    assert read_text(*conversation.ask("one")).endswith(start + "<assistant>")
    conversation.hear("1")
    expected = start + "<assistant>1<eos><user>Say two.<eos><assistant>"
    assert read_text(*conversation.ask("two")).endswith(expected)


def test_a_run_without_chats_answers_each_line_by_itself(tmp_path):
    data = {"template": "{{ word }} =", "target": " {{ answer }}"}
    folder = train_run(tmp_path, data, TINY / "causal", [{"word": "a", "answer": "A"}])
    conversation = Conversation(build_reading(read_run_config(folder, resolve=resolve)))
    conversation.ask("one")
    conversation.hear("ONE")
    assert read_text(*conversation.ask("two")) == "two ="


def test_lines_are_answered_as_generate_does_until_an_empty_one(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\nnot read\n"))
    assert main(["generate", str(run), "--interactive"]) == 0
    shown = capsys.readouterr().out
    assert shown.strip() == ptune_dist.load(run).generate("one")[0]
    assert main(["generate", str(run), "--interactive", "--output", "x"]) == 2
    assert main(["generate", str(run), "--interactive", "--labels", "ONE,TWO"]) == 2
    assert "--labels: a chat" in capsys.readouterr().err


def test_ctrl_c_stops_an_answer_and_the_chat_continues(run, capsys, monkeypatch):
    conversation = Conversation(build_reading(read_run_config(run, resolve=resolve)))
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    asked = []

    def answer(reading, rows, show) -> str:
        asked.append(read_text(reading, rows))
        if len(asked) == 1:
            show("a part")
            threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
            time.sleep(5)
        return "whole"

    with interrupts_as_exceptions():
        talk(conversation, answer)
    assert capsys.readouterr().out == "a part\nwhole\n\n"
    assert "a part" in asked[1] and len(asked) == 2


def test_an_answer_grows_by_whole_characters(capsys):
    shown = Shown()
    for text in (" ", " caf\ufffd", " café", " café au lait", "café au lait"):
        shown.show(text)
    assert capsys.readouterr().out == shown.text == "café au lait"
