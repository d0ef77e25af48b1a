"""`prompt.text`: where its parts stand, and what of it virtual tokens may start from."""

from pathlib import Path

import pytest

from ptune_dist.config.load import load_config, render_config
from ptune_dist.config.prompt_text import TextConfig
from ptune_dist.config.sweep import expand_sweep
from ptune_dist.errors import UserError
from tests.config.resolving import resolve

SMALL = """\
output_dir: runs/x
model: {path: some/base}
data: {train: rows.jsonl, template: "{{ text }}", target: " {{ label }}"}
"""


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        ({"task": "T", "input": "I", "output": "O"}, "T\nI\n<x>\nO"),
        ({"task": "T\n"}, "T\n<x>"),
        ({"output": "O"}, "<x>\nO"),
        ({"task": "T", "input": "I: {{ template }}", "output": "O"}, "T\nI: <x>\nO"),
        ({"task": "T", "output": "one word\n{{ template }}"}, "T\none word\n<x>"),
        ({"input": "{{ template }}!", "output": "O"}, "<x>!\nO"),
        ({"task": "T", "input": "{{template}}", "output": "O"}, "T\n<x>\nO"),
    ],
)
def test_the_parts_stand_around_the_template(parts, wanted):
    around = TextConfig(**parts).around()
    assert around.head() + "<x>" + around.tail() == wanted


def test_the_task_stands_apart_where_it_is_the_same_for_every_row():
    task, around = TextConfig(task="T", input="I: {{ template }}", output="O").split_task()
    assert (task, around.head(), around.tail()) == ("T", "I: ", "\nO")
    assert TextConfig(task="T {{ topic }}").split_task()[0] == ""
    assert TextConfig(task="T {{ template }}").split_task()[0] == ""


def load(tmp_path: Path, *overrides: str):
    path = tmp_path / "c.yaml"
    path.write_text(SMALL)
    return load_config(path, list(overrides), resolve=resolve)


def test_virtual_tokens_start_from_what_precedes_the_template_and_take_its_place(tmp_path):
    text = "prompt.text={task: T, input: I, output: O}"
    joined = load(tmp_path, "prompt.text={input: 'I: {{ template }}'}", "prompt.init=text").prompt
    assert joined.start_text == "I:"  # a row's text has no space before it that the last token could be
    beside = load(tmp_path, text).prompt
    assert (beside.around.head(), beside.around.tail(), beside.start_text) == ("T\nI\n", "\nO", None)
    instead = load(tmp_path, text, "prompt.init=text").prompt
    assert (instead.around.head(), instead.around.tail(), instead.start_text) == ("", "\nO", "T\nI\n")
    both = load(tmp_path, text, "prompt.init_text=Go").prompt
    assert (both.around.head(), both.start_text) == ("T\nI\n", "Go")


def test_a_run_reads_its_stored_config_alike(tmp_path):
    config = load(tmp_path, "prompt.text.task=T {{ text }}", "prompt.init_text=Go")
    stored = tmp_path / "stored.yaml"
    stored.write_text(render_config(config))
    assert load_config(stored, [], resolve=resolve).prompt == config.prompt


def test_members_may_have_texts_of_their_own(tmp_path):
    config = load(tmp_path, "sweep={prompt.text: [{task: A b}, {task: C, output: D}]}")
    members = expand_sweep(config, resolve)
    assert list(members) == ["text=A-b", "text=C+D"]
    assert [member.prompt.around.head() for member in members.values()] == ["A b\n", "C\n"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["prompt.text={task: ''}"], "prompt.text is empty: give task, input or output, or leave it out"),
        (["prompt.text={tusk: a}"], "unknown key prompt.text.tusk, did you mean prompt.text.task?"),
        (
            ["prompt.text={input: '{{ template }}', output: '{{ template }}'}"],
            "prompt.text.output: {{ template }} stands in prompt.text more than once",
        ),
        (["prompt.text={output: O}", "prompt.init=text"], "prompt.init: text needs a text before data.template"),
        (
            ["prompt.text={task: 'About {{ topic }}'}", "prompt.init=text"],
            "prompt.text.task: with prompt.init=text the virtual tokens start from it, and they know no columns",
        ),
        (["prompt.text={task: T}", "data.train=a.txt"], "prompt.text stands around an input, and a .txt file has none"),
        (
            ["prompt.text={task: 'T {{ x }}'}", "data={train: a.jsonl, messages: m}"],
            "prompt.text: with data.messages it is a system prompt, which has no columns",
        ),
        (
            ["prompt.text={task: 'T {{ template }}'}", "data={train: a.jsonl, messages: m}"],
            "prompt.text: data.messages has no template that {{ template }} could stand for",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path, overrides, says):
    if any(word.startswith("data={") for word in overrides):
        path = tmp_path / "c.yaml"
        path.write_text("output_dir: runs/x\nmodel: {path: some/base}\ndata: {train: a.jsonl, messages: m}\n")
        overrides = [word for word in overrides if not word.startswith("data={")]
        with pytest.raises(UserError) as caught:
            load_config(path, overrides, resolve=resolve)
    else:
        with pytest.raises(UserError) as caught:
            load(tmp_path, *overrides)
    assert says in str(caught.value) and "\n" not in str(caught.value)
