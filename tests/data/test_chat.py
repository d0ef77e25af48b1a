"""Chats: every turn of the assistant is learned and nothing else, as the base's chat template writes it."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ptune_dist.config.load import load_config
from ptune_dist.config.schema import DataConfig
from ptune_dist.data.build import Split, build_inputs, build_split
from ptune_dist.data.chat import Chat
from ptune_dist.data.encode import Encoding
from ptune_dist.data.framing import Framing, TextTargets
from ptune_dist.data.sources import load_rows
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.errors import UserError
from tests.conftest import TINY, write_config

CHATML = (
    "{% if tools %}<tools>{{ tools | length }}</tools>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNSTABLE = "{% for m in messages %}[{{ loop.index }} of {{ messages | length }}] {{ m.content }} {% endfor %}"
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}\
{{ m.content }}{% endfor %}"
TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "ONE"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "TWO"},
]


def load_chat_tokenizer(template: str = CHATML) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(TINY / "causal")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    tokenizer.eos_token = "<|im_end|>"  # as `end_turns` sets it
    return tokenizer


def build(tmp_path: Path, rows: list[dict], written: str = CHATML, **keys) -> tuple[Split, Encoding]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(train=str(file), **keys)
    tokenizer = load_chat_tokenizer(written)
    chat = Chat(tokenizer, "data.chat" if data.chat else "data.messages", data.system)
    framing = Framing(ends_input=False, is_bare=True)
    encoding = Encoding(tokenizer, framing, TextTargets(tokenizer, append_eos=data.append_eos), 512, chat=chat)
    split = build_split(data, encoding, which="train")
    assert split is not None
    return split, encoding


def texts_of(split: Split, encoding: Encoding) -> list[tuple[str, str]]:
    decode = encoding.tokenizer.decode
    return [
        (decode(split.examples.input_ids(i)), decode(split.examples.target_ids(i))) for i in range(len(split.examples))
    ]


def test_every_turn_of_the_assistant_is_supervised_and_nothing_else(tmp_path):
    split, encoding = build(tmp_path, [{"talk": TALK}, {"talk": TALK[:2]}], messages="talk")
    asked = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    later = asked + "ONE<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    assert texts_of(split, encoding) == [(asked, "ONE<|im_end|>"), (later, "TWO<|im_end|>"), (asked, "ONE<|im_end|>")]
    assert (split.num_rows, len(split.examples)) == (2, 3)
    # the supervised tokens of a conversation, by offsets in the template's own text of all of it
    whole = encoding.tokenizer(CHATML_TEXT, add_special_tokens=False)["input_ids"]
    for i in range(2):
        ids = np.concatenate([split.examples.input_ids(i), split.examples.target_ids(i)])
        assert ids.tolist() == whole[: len(ids)]


CHATML_TEXT = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK)


def test_the_turns_of_a_conversation_are_read_in_one_step(tmp_path):
    split, _ = build(tmp_path, [{"talk": TALK}, {"talk": TALK[:2]}, {"talk": TALK}], messages="talk")
    rows = TrainingRows({"prompt": split}, batch_size=1, seeds={"prompt": 0})
    steps = [rows.of_step(step, ["prompt"])["prompt"] for step in (1, 2, 3)]
    assert sorted(steps) == [[0, 1], [2], [3, 4]]
    assert rows.count_rows("prompt") == 3


def test_other_formats_system_prompt_and_tools(tmp_path):
    rows = [
        {"talk": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "ONE"}], "tools": None},
        {"talk": json.dumps([{"role": "system", "content": "own"}, *TALK[:2]]), "tools": json.dumps([{"name": "f"}])},
    ]
    split, encoding = build(tmp_path, rows, messages="talk", system="Be kind.", tools="tools")
    found = [text for text, _ in texts_of(split, encoding)]
    assert found[0].startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\none<|im_end|>")
    assert found[1].startswith("<tools>1</tools>\n<|im_start|>system\nown<|im_end|>\n<|im_start|>user\none")


def test_template_and_target_become_turns_and_an_input_is_asked_alike(tmp_path):
    keys = {"template": "{{ q }}?", "target": " {{ a }}", "chat": True, "system": "S"}
    split, encoding = build(tmp_path, [{"q": "one", "a": "ONE"}], **keys)
    before = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n"
    assert texts_of(split, encoding) == [(before, "ONE<|im_end|>")]
    data = DataConfig(train="-", **keys)
    rows = load_rows(str(tmp_path / "rows.jsonl"), key="--input-file", default_split="test")
    ((context, rest),) = build_inputs(data, rows, encoding)
    assert context + rest == split.examples.input_ids(0).tolist()


def test_a_conversation_is_asked_as_it_was_trained(tmp_path):
    split, encoding = build(tmp_path, [{"talk": TALK}], messages="talk")
    data = DataConfig(train="-", messages="talk")
    rows = load_rows(str(tmp_path / "rows.jsonl"), key="--input-file", default_split="test")
    ((context, rest),) = build_inputs(data, rows, encoding)  # its last answer is left out
    assert context + rest == split.examples.input_ids(1).tolist()


@pytest.mark.parametrize(
    "row, says",
    [
        ({"talk": "text"}, "column 'talk' is not a list of messages"),
        ({"talk": []}, "column 'talk' is not a list of messages"),
        ({"talk": [{"role": "user"}]}, "column 'talk' is not a list of messages"),
        ({"talk": TALK[:1]}, "column 'talk' has no assistant's turn to learn"),
        ({"talk": [TALK[0], {"role": "assistant", "content": " "}]}, "an assistant's turn is empty"),
        ({"other": 1}, "data.messages is column 'talk', which"),
        ({"talk": TALK, "tools": "{"}, "data.tools: column 'tools' is not JSON"),
        ({"talk": TALK, "tools": "3"}, "data.tools: column 'tools' is not a list of tools"),
    ],
)
def test_what_is_no_conversation_is_one_line(tmp_path, row, says):
    with pytest.raises(UserError) as caught:
        build(tmp_path, [row], messages="talk", tools="tools" if "tools" in row else None)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert "which" in says or f"{tmp_path}/rows.jsonl line 1: " in str(caught.value)


@pytest.mark.parametrize(
    "template, keys, says",
    [
        (UNSTABLE, {}, "is not prefix-stable: what precedes an answer changes once the answer follows"),
        (NO_SYSTEM, {"system": "S"}, "the base's chat template cannot write this row: no system role"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(tmp_path, template, keys, says):
    with pytest.raises(UserError) as caught:
        build(tmp_path, [{"talk": TALK}], template, messages="talk", **keys)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_is_asked_for_what_ends_a_turn():
    assert Chat(load_chat_tokenizer(), "data.chat").find_end(has_tools=True) == "<|im_end|>"
    without_tools = Chat(
        load_chat_tokenizer(CHATML.partition("{% for")[1] + CHATML.partition("{% for")[2]), "data.chat"
    )
    with pytest.raises(UserError, match=r"^data.tools: the base's chat template writes no tools: leave it out$"):
        without_tools.find_end(has_tools=True)
    tokenizer = load_chat_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"^data.chat: the base's tokenizer has no chat template: "):
        Chat(tokenizer, "data.chat").find_end()


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["data.messages=talk"], "data.template and data.messages are both given: leave one out"),
        (["data.system=S"], "data.system needs data.chat or data.messages"),
        (["data.tools=t"], "data.tools needs data.messages"),
        (
            ["data.chat=true", "data.messages=m", "data.template=null", "data.target=null"],
            "data.chat is for data.templ",
        ),
        (["data.chat=true", "data.train=a.txt"], "data.chat needs an input and a target, and a .txt file has none"),
        (["data.on_error=ignore"], "data.on_error: "),
    ],
)
def test_keys_that_do_not_go_together_are_one_line(tmp_path, overrides, says):
    with pytest.raises(UserError) as caught:
        load_config(write_config(tmp_path / "config.json"), overrides)
    assert says in str(caught.value) and "\n" not in str(caught.value)
