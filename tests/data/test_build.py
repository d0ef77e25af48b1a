"""What the config's `data` section becomes, by the family of the base."""

import pytest

from ptune_dist.config import DataConfig
from ptune_dist.data.build import build_inputs, build_label_candidates, build_split
from ptune_dist.errors import UserError
from ptune_dist.tiny.make import build_tokenizer

TOKENIZER = build_tokenizer()
ROWS = '{"text": "ab", "label": "yes"}\n{"text": "cdefgh", "label": "no"}\n'


@pytest.fixture
def data(tmp_path):
    """Makes the section over a small file."""

    def make(content: str = ROWS, name: str = "a.jsonl", **options) -> DataConfig:
        (tmp_path / name).write_text(content)
        templates = {"template": "{{ text }}:", "target": "{{ label }}"} if name.endswith(".jsonl") else {}
        return DataConfig(train=str(tmp_path / name), **templates | options)

    return make


def decode(ids) -> str:
    return TOKENIZER.decode(ids)


def test_an_encoders_split_has_the_numbers_of_its_labels(data):
    split = build_split(data(labels=["no", "yes"]), TOKENIZER, which="train", family="encoder")
    assert [split.examples.target_ids(i).tolist() for i in (0, 1)] == [[1], [0]]


def test_plain_text_is_for_causal_bases(data):
    section = data("some text", "a.txt")
    assert len(build_split(section, TOKENIZER, which="train").examples) == 1
    with pytest.raises(UserError, match="data.train: .*a.txt is plain text, which a seq2seq base cannot be trained on"):
        build_split(section, TOKENIZER, which="train", family="seq2seq")


def test_the_first_examples_alone_are_read_where_so_many_are_asked_for(data):
    assert len(build_split(data(), TOKENIZER, which="train", max_examples=1).examples) == 1
    assert len(build_split(data(), TOKENIZER, which="train", max_examples=9).examples) == 2


def test_the_digest_changes_with_a_target_and_with_the_template(data):
    first = build_split(data(), TOKENIZER, which="train").digest()
    assert build_split(data(), TOKENIZER, which="train").digest() == first
    other_target = build_split(data(ROWS.replace("no", "on")), TOKENIZER, which="train").digest()
    other_template = build_split(data(template="{{ text }};"), TOKENIZER, which="train").digest()
    assert len({first, other_target, other_template}) == 3


@pytest.mark.parametrize("family", ["causal", "seq2seq", "encoder"])
def test_inputs_alone_are_those_that_training_saw(data, family):
    section = data(labels=["no", "yes"])
    split = build_split(section, TOKENIZER, which="train", family=family)
    inputs = build_inputs(section, split.rows, TOKENIZER, family)
    assert inputs == [split.examples.input_ids(i).tolist() for i in (0, 1)]
    assert decode(inputs[0]) == "ab:"


@pytest.mark.parametrize("family", ["causal", "encoder"])
def test_each_label_is_a_candidate_for_every_row(data, family):
    section = data(labels=["no", "yes"])
    split = build_split(section, TOKENIZER, which="train", family=family)
    candidates, right = build_label_candidates(section, split, TOKENIZER, family)
    assert right == [1, 0]
    for label, examples in enumerate(candidates):
        for row in (0, 1):
            assert examples.input_ids(row).tolist() == split.examples.input_ids(row).tolist()
            target = examples.target_ids(row).tolist()
            assert target == [label] if family == "encoder" else decode(target) == ["no", "yes"][label] + "<eos>"
