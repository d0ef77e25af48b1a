"""Texts around the template: every row is read with them, in training and when it is asked, and a cut leaves them."""

import json

import pytest

from ptune_dist.config.prompt_text import TextConfig
from ptune_dist.config.schema import DataConfig
from ptune_dist.data.build import Split, build_inputs, build_label_candidates, build_split
from ptune_dist.data.cache_key import describe_options
from ptune_dist.data.chat import Chat
from ptune_dist.data.encode import Encoding
from ptune_dist.errors import UserError
from tests.data.test_chat import TALK, load_chat_tokenizer
from tests.data.texts import encoding_of, tokenizer_with

TOKENIZER = tokenizer_with("<bos> $A")
ROWS = [{"text": "ab", "topic": "x", "label": "yes"}, {"text": "cd", "topic": "y", "label": "no"}]
AROUND = TextConfig(task="About {{ topic }}.", input="I: {{ template }}", output="O:").around()


@pytest.fixture
def data(tmp_path):
    """Makes a section for a small file."""

    def make(rows: list[dict] = ROWS, **options) -> DataConfig:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"template": "<{{ text }}>", "target": "{{ label }}"}
        return DataConfig(train=str(tmp_path / "a.jsonl"), **given | options)

    return make


def read(data: DataConfig, encoding: Encoding) -> Split:
    split = build_split(data, encoding, which="train")
    assert split is not None
    return split


def parts_of(split: Split, index: int = 0) -> tuple[str, str]:
    return (
        TOKENIZER.decode(split.examples.context_ids(index)),
        TOKENIZER.decode(split.examples.rest_ids(index)),
    )


@pytest.mark.parametrize(
    ("family", "placement", "context", "rest"),
    [
        ("causal", "prefix", "", "<bos>About x.\nI: <ab>\nO:"),
        ("causal", "infix", "<bos>About x.\nI: <ab>\nO:", ""),
        ("seq2seq", "encoder", "", "<bos>About x.\nI: <ab>\nO:"),
        ("seq2seq", "decoder", "<bos>About x.\nI: <ab>\nO:", ""),
        ("encoder", "prefix", "", "<bos>About x.\nI: <ab>\nO:"),
    ],
)
def test_every_family_and_placement_reads_the_texts_in_training_and_when_asked(data, family, placement, context, rest):
    section = data(labels=["yes", "no"])
    encoding = encoding_of(TOKENIZER, family=family, placement=placement, labels=section.labels, around=AROUND)
    split = read(section, encoding)
    assert parts_of(split) == (context, rest)
    assert parts_of(split, 1)[placement in ("prefix", "encoder")].startswith("<bos>About y.")
    asked = build_inputs(section, split.rows, encoding)
    assert [(c, r) for c, r in asked] == [
        (split.examples.context_ids(i).tolist(), split.examples.rest_ids(i).tolist()) for i in range(2)
    ]
    if family != "encoder":
        candidates, _ = build_label_candidates(section, split, encoding, 512)
        assert TOKENIZER.decode(candidates.examples.input_ids(0)) == context + rest


def test_the_marker_of_placement_template_stays_in_the_template(data):
    section = data(template="<{{ text }}{{ prompt }}>")
    encoding = encoding_of(TOKENIZER, placement="template", around=AROUND)
    assert parts_of(read(section, encoding)) == ("<bos>About x.\nI: <ab", ">\nO:")


def test_whitespace_control_of_the_template_leaves_the_line_breaks_between_texts(data):
    around = TextConfig(task="T", output="O").around()
    encoding = encoding_of(TOKENIZER, around=around)
    split = read(data(template="{%- if text -%} {{- text -}} {%- endif -%}\n"), encoding)
    assert parts_of(split)[1] == "<bos>T\nab\nO"


def test_a_mistake_names_the_key_of_the_text(data):
    def error_of(**parts: str) -> str:
        with pytest.raises(UserError) as caught:
            read(data(), encoding_of(TOKENIZER, around=TextConfig(**parts).around()))
        return str(caught.value)

    assert "prompt.text.output uses column 'tpic'" in error_of(task="T", output="{{ tpic }}")
    assert error_of(task="{% if %}").startswith("prompt.text.task: line 1 of the template")
    with pytest.raises(UserError, match="a.jsonl line 2: column 'topic', which prompt.text.task uses, is missing"):
        rows = [ROWS[0], {**ROWS[1], "topic": None}]
        read(data(rows), encoding_of(TOKENIZER, around=TextConfig(task="{{ topic }}").around()))


def test_a_long_row_loses_its_own_text_and_not_what_every_row_begins_with(data):
    around = TextConfig(task="Task.", output="O:").around()
    rows = [{"text": "a" * 30 + "b" * 10, "label": "yes"}]
    encoding = encoding_of(TOKENIZER, around=around, max_length=30)
    split = read(data(rows), encoding)
    room = 30 - len("yes") - 2 - len("Task.\n") - len(">\nO:")  # beside <bos> and <eos>
    assert parts_of(split)[1] == "<bos>Task.\n" + ("a" * 30 + "b" * 10)[-room:] + ">\nO:"
    assert split.examples.num_truncated == 1
    lead = encoding_of(TOKENIZER, around=around, max_length=30, lead="lead\n\n")
    assert parts_of(read(data(rows), lead))[1].startswith("<bos>lead\n\nTask.\n")
    right = encoding_of(TOKENIZER, around=around, max_length=30, truncation_side="right")
    assert parts_of(read(data(rows), right))[1] == "<bos>Task.\n<" + "a" * (room + len(">\nO:") - 1)


def test_a_chat_has_the_text_in_the_users_turn_and_earlier_turns_before_it(data):
    tokenizer = load_chat_tokenizer()
    chat = Chat(tokenizer, "data.chat", earlier=(("q", "A"),))
    section = data(chat=True)
    encoding = encoding_of(tokenizer, around=AROUND, chat=chat)
    split = read(section, encoding)
    asked = (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nAbout x.\nI: <ab>\nO:<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(split.examples.input_ids(0)) == asked
    ((context, rest), _) = build_inputs(section, split.rows, encoding)
    assert context + rest == split.examples.input_ids(0).tolist()
    cut = read(section, encoding_of(tokenizer, around=AROUND, chat=chat, max_length=len(split.examples.ids) // 2 - 4))
    kept = asked.partition(" x.\n")[0]
    assert tokenizer.decode(cut.examples.input_ids(0)).startswith(kept) and cut.examples.num_truncated


def test_conversations_have_the_text_in_their_system_prompt(data):
    tokenizer = load_chat_tokenizer()
    own = [{"role": "system", "content": "own"}, *TALK[:2]]
    section = data([{"talk": TALK[:2]}, {"talk": own}], messages="talk", template=None, target=None)
    encoding = encoding_of(tokenizer, chat=Chat(tokenizer, "data.messages", text="T\nO"))
    split = read(section, encoding)
    found = [tokenizer.decode(split.examples.input_ids(i)) for i in (0, 1)]
    assert found[0].startswith("<|im_start|>system\nT\nO<|im_end|>\n<|im_start|>user\none")
    assert found[1].startswith("<|im_start|>system\nown\n\nT\nO<|im_end|>\n<|im_start|>user\none")


def test_token_ids_on_disk_are_those_of_the_same_texts(data):
    section = data()
    tokenizer = load_chat_tokenizer()
    encodings = [
        encoding_of(tokenizer),
        encoding_of(tokenizer, around=AROUND),
        encoding_of(tokenizer, around=AROUND._replace(joins=False)),
        encoding_of(tokenizer, lead="examples"),
        encoding_of(tokenizer, chat=Chat(tokenizer, "data.chat")),
        encoding_of(tokenizer, chat=Chat(tokenizer, "data.chat", earlier=(("q", "A"),))),
        encoding_of(tokenizer, chat=Chat(tokenizer, "data.chat", text="T")),
    ]
    keys = {describe_options(section, encoding, [], ("train", 0, ""), []) for encoding in encodings}
    assert len(keys) == len(encodings)
