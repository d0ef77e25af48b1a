"""A text on the command line is the word itself; a template in a file is never cut in silence; empty is told."""

import pytest

from ptune_dist.config.load import load_config
from ptune_dist.errors import UserError
from tests.config.test_config import SMALL, error_of, write  # noqa: F401 -- a fixture


@pytest.mark.parametrize(
    "text",
    [
        " {{ label }}", "Question: {{ q }}", "a # b", "# a", "a\n\nb\n", "  x ", "- a", "&a b", "*x", "!x {{ a }}",
        "? {{ text }}", "a: b", "---", "{{ a }} # {{ b }}", "[INST] {{ text }} [/INST]", "'a' or 'b'", '"a" {{ b }}',
        "yes", "1e-3", "010", r"a\nb",
    ],
)  # fmt: skip
def test_a_text_on_the_command_line_is_the_word_itself(write, text):  # noqa: F811
    config = load_config(write(SMALL), [f"data.target={text}", f"data.template={text}"])
    assert (config.data.target, config.data.template) == (text, text)


def test_quotes_and_null_on_the_command_line_are_those_of_yaml(write):  # noqa: F811
    overrides = ["data.template='it''s'", 'data.target="a\\nb"', "data.validation=null", "data.labels=[a # b, c]"]
    with pytest.raises(UserError, match="data.labels: a list is needed"):  # a comment ends the list
        load_config(write(SMALL), overrides)
    config = load_config(write(SMALL), overrides[:3])
    assert (config.data.template, config.data.target, config.data.validation) == ("it's", "a\nb", None)


def test_bytes_that_are_no_text_are_refused(write):  # noqa: F811
    assert error_of(write(SMALL), "data.target=a\udcff") == "command line: data.target: not UTF-8 text"


@pytest.mark.parametrize(
    "template", ["Question #1: {{ text }}", "Is this #good? {{ text }}", "Q # {% if a %}x{% endif %}"]
)
def test_a_template_whose_end_yaml_takes_for_a_comment_is_refused(write, template):  # noqa: F811
    path = write(SMALL.replace('"{{ text }}"', template))
    assert error_of(path) == f"{path} line 5: not valid YAML: what follows # is a comment: put the template in quotes"
    commented = load_config(write(SMALL.replace('"{{ text }}"', '"Q {{ text }}"  # {{ text }} is a column')))
    assert commented.data.template == "Q {{ text }}"


def test_a_section_whose_keys_are_all_comments_has_its_defaults(write):  # noqa: F811
    sections = "train:\n  # max_steps: 5\nprompt:\nevaluate: ~\ncheckpoint:\n"
    assert load_config(write(SMALL + sections)) == load_config(write(SMALL))
    assert error_of(write(SMALL.replace("{path: some/base}", ""))).endswith("c.yaml: model is missing")


@pytest.mark.parametrize("key", ["model.path", "data.train"])
def test_an_empty_path_is_not_the_current_folder(write, key):  # noqa: F811
    assert error_of(write(SMALL), f"{key}=''") == f"command line: {key}: a path or a name is needed, and it is empty"


@pytest.mark.parametrize("number, value", [("1e3", 1000), ("2E+2", 200), ("5.e1", 50)])
def test_numbers_with_an_exponent_are_numbers_in_a_file_too(write, number, value):  # noqa: F811
    content = f"train: {{max_steps: {number}}}\ndeepspeed: {{a: {number}}}\n"
    config = load_config(write(SMALL + content))
    assert (config.train.max_steps, config.deepspeed) == (value, {"a": value})


@pytest.mark.parametrize(
    "override, says",
    [
        ("data.labels=[~, a]", "data.labels.0: a text is needed, and none is given; put null or ~ in quotes"),
        ("output_dir=", "output_dir: a text is needed, and none is given"),
        ("data.template={text}", "a column of a template stands in two braces: {{ column }}"),
        ("data.labels=yes,no", "data.labels: a list is needed, such as [a, b], got 'yes,no'"),
        ("train=5", "train: a section with keys of its own is needed, got 5"),
        ("train={betas: 0.9, 0.95}", "unknown key train.0.95: a comma begins a new key"),
        (".a=1", "'.a=1' is not key.path=value"),
        ("train..max_steps=1", "'train..max_steps=1' is not key.path=value"),
        ("train.max_steps=010", "command line: train.max_steps: 010 is not a decimal number"),
    ],
)
def test_a_wrong_value_is_told_in_plain_words(write, override, says):  # noqa: F811
    assert says in error_of(write(SMALL), override)
