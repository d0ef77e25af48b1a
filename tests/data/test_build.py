"""The `data` section of the config, encoded for each family of bases."""

import hashlib
import re

import pytest

from ptune_dist.config.schema import DataConfig
from ptune_dist.data.build import build_inputs, build_label_candidates, build_split, build_templates, label_values
from ptune_dist.data.label_names import describe_unlisted
from ptune_dist.data.template import compile_template
from ptune_dist.errors import UserError
from ptune_dist.tiny.make import build_tokenizer
from tests.data.texts import encoding_of, tokenizer_with

TOKENIZER = build_tokenizer()
ROWS = '{"text": "ab", "label": "yes"}\n{"text": "cdefgh", "label": "no"}\n'


@pytest.fixture
def data(tmp_path):
    """Makes a section for a small file."""

    def make(content: str = ROWS, name: str = "a.jsonl", **options) -> DataConfig:
        (tmp_path / name).write_text(content)
        templates = {"template": "{{ text }}:", "target": "{{ label }}"} if name.endswith(".jsonl") else {}
        return DataConfig(train=str(tmp_path / name), **templates | options)

    return make


def decode(ids) -> str:
    return TOKENIZER.decode(ids)


def test_an_encoders_split_has_the_numbers_of_its_labels(data):
    split = build_split(
        data(labels=["no", "yes"]), encoding_of(TOKENIZER, family="encoder", labels=["no", "yes"]), which="train"
    )
    assert [split.examples.target_ids(i).tolist() for i in (0, 1)] == [[1], [0]]


def test_plain_text_is_for_causal_bases(data):
    section = data("some text", "a.txt")
    assert len(build_split(section, encoding_of(TOKENIZER), which="train").examples) == 1
    with pytest.raises(UserError, match="data.train: .*a.txt is plain text, which only a causal base"):
        build_split(section, encoding_of(TOKENIZER, family="seq2seq"), which="train")


def test_what_plain_text_continues_stands_as_it_is(data):
    section = data("ab\ncd", "a.txt", template=None, target=None)
    tokenizer = tokenizer_with("<bos> $A")
    rows = build_split(section, encoding_of(tokenizer), which="train").rows
    inputs = build_inputs(section, rows, encoding_of(tokenizer))
    assert [(context, tokenizer.decode(rest)) for context, rest in inputs] == [([], "ab"), ([], "cd")]
    other = build_split(data('{"txt": "a"}\n', template="{{ txt }}", target="b"), encoding_of(TOKENIZER), which="train")
    with pytest.raises(UserError, match="--input-file uses column 'text', which .*a.jsonl does not have"):
        build_inputs(section, other.rows, encoding_of(tokenizer))


def test_the_first_examples_alone_are_read_where_so_many_are_asked_for(data):
    assert len(build_split(data(), encoding_of(TOKENIZER), which="train", max_examples=1).examples) == 1
    assert len(build_split(data(), encoding_of(TOKENIZER), which="train", max_examples=9).examples) == 2


def test_the_digest_changes_with_a_target_and_with_the_template(data):
    first = build_split(data(), encoding_of(TOKENIZER), which="train").digest()
    assert build_split(data(), encoding_of(TOKENIZER), which="train").digest() == first
    other_target = build_split(data(ROWS.replace("no", "on")), encoding_of(TOKENIZER), which="train").digest()
    other_template = build_split(data(template="{{ text }};"), encoding_of(TOKENIZER), which="train").digest()
    assert len({first, other_target, other_template}) == 3


@pytest.mark.parametrize("family", ["causal", "seq2seq", "encoder"])
def test_inputs_alone_are_those_that_training_saw(data, family):
    section = data(labels=["no", "yes"])
    split = build_split(section, encoding_of(TOKENIZER, family=family, labels=["no", "yes"]), which="train")
    inputs = build_inputs(section, split.rows, encoding_of(TOKENIZER, family=family, labels=["no", "yes"]))
    assert inputs == [([], split.examples.input_ids(i).tolist()) for i in (0, 1)]
    assert decode(inputs[0][1]) == "ab:"


@pytest.mark.parametrize(
    ("family", "placement", "template", "parts"),
    [
        ("causal", "infix", "{{ text }}:", ("ab:", "")),
        ("seq2seq", "decoder", "{{ text }}:", ("ab:", "")),
        ("seq2seq", "encoder", "{{ text }}:", ("", "ab:")),
        ("causal", "template", "{{ text }}{{ prompt }}:", ("ab", ":")),
    ],
)
def test_a_placement_splits_inputs_alone_and_candidates_as_training_does(data, family, placement, template, parts):
    section = data(labels=["no", "yes"], template=template)
    encoding = encoding_of(TOKENIZER, family=family, placement=placement)
    split = build_split(section, encoding, which="train")
    wanted = [(split.examples.context_ids(i).tolist(), split.examples.rest_ids(i).tolist()) for i in (0, 1)]
    assert tuple(map(decode, wanted[0])) == parts
    assert build_inputs(section, split.rows, encoding) == wanted
    candidates, _ = build_label_candidates(section, split, encoding, 100)
    examples = candidates.examples
    assert candidates.rows.tolist() == [0, 1]
    assert [(examples.context_ids(i).tolist(), examples.rest_ids(i).tolist()) for i in (0, 1)] == wanted


def test_the_digest_changes_with_the_split_and_is_the_old_one_without_contexts(data):
    templates = ["{{ text }}:", "{{ prompt }}{{ text }}:", "{{ text }}{{ prompt }}:", "{{ text }}:{{ prompt }}"]
    placements = ["prefix", "template", "template", "template"]
    prefix, first, middle, last = (
        build_split(data(template=template), encoding_of(TOKENIZER, placement=placement), which="train")
        for template, placement in zip(templates, placements, strict=True)
    )
    assert prefix.digest() == first.digest() == hash_ids_and_offsets(prefix.examples)
    assert len({split.digest() for split in (prefix, middle, last)}) == 3
    assert build_split(data(), encoding_of(TOKENIZER, placement="infix"), which="train").digest() == last.digest()


def hash_ids_and_offsets(examples) -> str:
    """The digest that runs stored before contexts existed."""
    return hashlib.sha256(examples.ids.tobytes() + examples.offsets.tobytes()).hexdigest()[:16]


def test_a_prompt_without_its_place_is_refused_and_no_column_is_looked_for(data):
    assert build_templates(data(template="{{ prompt }}{{ text }}"), "template")[0].columns == ("text",)
    assert build_templates(data(template="{{ prompt }}{{ text }}"))[0].columns == ("prompt", "text")
    with pytest.raises(UserError, match="^data.template: placement template needs {{ prompt }} where the virtual"):
        build_split(data(), encoding_of(TOKENIZER, placement="template"), which="train")
    with pytest.raises(UserError, match="^data.target uses column 'prompt', which "):
        section = data(template="{{ prompt }}{{ text }}", target="{{ prompt }}")
        build_split(section, encoding_of(TOKENIZER, placement="template"), which="train")
    with pytest.raises(UserError, match="^data.template and data.target are needed"):
        build_split(data(target=None, template=None), encoding_of(TOKENIZER, placement="template"), which="train")


def test_plain_text_has_no_context_and_no_place_for_a_marker(data):
    section = data("some text", "a.txt")
    assert not build_split(section, encoding_of(TOKENIZER, placement="infix"), which="train").examples.num_context.any()
    with pytest.raises(UserError, match="data.train: .*a.txt is plain text, which has no template for {{ prompt }}"):
        build_split(section, encoding_of(TOKENIZER, placement="template"), which="train")


@pytest.mark.parametrize("family", ["causal", "encoder"])
def test_each_label_is_a_candidate_for_every_row(data, family):
    section = data(labels=["no", "yes"])
    split = build_split(section, encoding_of(TOKENIZER, family=family, labels=["no", "yes"]), which="train")
    encoding = encoding_of(TOKENIZER, family=family, labels=["no", "yes"])
    candidates, right = build_label_candidates(section, split, encoding, 100)
    assert right == [1, 0] and candidates.rows.tolist() == [0, 1] and candidates.labels == [(0, 1)] * 2
    for row, tree in enumerate(candidates.trees):
        assert candidates.examples.input_ids(row).tolist() == split.examples.input_ids(row).tolist()
        for label, path in enumerate(tree.paths):
            target = tree.targets[path].tolist()
            assert target == [label] if family == "encoder" else decode(target) == ["no", "yes"][label] + "<eos>"


@pytest.mark.parametrize("placement", ["prefix", "infix", "template"])
def test_a_long_label_leaves_a_row_less_of_its_input_and_a_template_may_show_the_label(data, placement):
    rows = '{"text": "abcdefgh", "label": "no"}\n{"text": "xy", "label": "yes"}\n{"text": "q", "label": "maybe"}\n'
    labels = ["no", "yes", "maybe", "on"]
    for template in ("{{ text }}{{ prompt }}:", "{{ label }}{{ text }}{{ prompt }}:"):
        section = data(rows, labels=labels, template=template if placement == "template" else "{{ text }}:")
        encoding = encoding_of(TOKENIZER, placement=placement, max_length=10)
        split = build_split(section, encoding, which="train")
        candidates, right = build_label_candidates(section, split, encoding, 1000)
        assert right == [0, 1, 2]
        found = {}
        for i, row in enumerate(candidates.rows.tolist()):
            parts = (candidates.examples.context_ids(i).tolist(), candidates.examples.rest_ids(i).tolist())
            tree = candidates.trees[i]
            for label, path in zip(candidates.labels[i], tree.paths, strict=True):
                assert (row, label) not in found
                found[row, label] = (*parts, tree.targets[path].tolist())
        for label, name in enumerate(labels):  # every row as it would be encoded with that label
            changed = "".join(
                re.sub(r'"label": "\w+"', f'"label": "{name}"', line) + "\n" for line in rows.splitlines()
            )
            changed_section = data(changed, "other.jsonl", labels=labels, template=section.template)
            other = build_split(changed_section, encoding, which="train").examples
            for row in range(3):
                parts = (other.context_ids(row), other.rest_ids(row), other.target_ids(row))
                assert found[row, label] == tuple(part.tolist() for part in parts)
        assert len(candidates.examples) > 3  # the first row has several inputs


def test_labels_whose_targets_are_the_same_are_refused(data):
    section = data(labels=["no", "yes"], target="{{ label | length > 1 }}")
    split = build_split(section, encoding_of(TOKENIZER), which="train")
    with pytest.raises(UserError, match="^data.labels: 'no' and 'yes' have the same target$"):
        build_label_candidates(section, split, encoding_of(TOKENIZER), 100)


@pytest.mark.parametrize(
    ("labels", "target", "values"),
    [
        (["0", "1"], "{{ ['no', 'yes'][label] }}", [0, 1]),
        (["0", "1"], "{{ {'0': 'no', '1': 'yes'}[label] }}", ["0", "1"]),
        (["true", "false"], "{{ 'yes' if label else 'no' }}", [True, False]),
        (["True", "False"], "{{ label }}", ["True", "False"]),
        (["0.5", "1"], "{{ label * 2 }}", [0.5, 1]),
        (["01", "1e3"], "{{ label }}", ["01", "1e3"]),
        (["yes", "no"], "{{ label }}", ["yes", "no"]),
    ],
)
def test_labels_without_rows_are_what_the_target_tells_apart(labels, target, values):
    compiled = compile_template(target, key="data.target")
    found = label_values(compiled, "label", labels)
    assert found == values and list(map(type, found)) == list(map(type, values))


def test_labels_that_a_target_does_not_tell_apart_are_refused():
    with pytest.raises(UserError, match="data.target does not render yes, no as texts that differ"):
        label_values(compile_template("{{ label | length > 1 }}", key="data.target"), "label", ["yes", "no"])


def test_labels_that_do_not_fit_in_one_pass_are_split_and_none_is_lost(data):
    section = data(labels=["no", "yes", "none", "yet"])
    encoding = encoding_of(TOKENIZER)
    split = build_split(section, encoding, which="train")
    candidates, _ = build_label_candidates(section, split, encoding, 8)
    assert candidates.rows.tolist() == [0, 0, 1, 1]
    assert candidates.labels == [(0, 2), (1, 3)] * 2
    tiny, _ = build_label_candidates(section, split, encoding, 1)
    assert sorted(tiny.labels[:4]) == [(0,), (1,), (2,), (3,)]


@pytest.mark.parametrize("value", ["cafe\u0301", "caf\u00e9\u200b", "\ufeffcafé", "ｃafé"])
def test_a_label_of_other_unicode_characters_is_told_so(value):
    line = describe_unlisted("a.jsonl line 1", "label", value, ["tea", "café"])
    assert "it differs from 'café' by Unicode characters" in line and f"{ascii(value)} is not 'caf\\xe9'" in line
