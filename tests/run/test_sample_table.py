"""What a run prints at its end."""

from rich.cells import cell_len
from rich.console import Console

from ptune_dist.run.sample_table import build_table, shorten
from ptune_dist.run.summary import describe_gain

SHORT = {"input": "upper cat =", "wanted": "CAT", "untrained": "a", "trained": "CAT"}


def render(samples: list[dict[str, str]], width: int = 100) -> list[str]:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(build_table(samples, width))
    return capture.get().splitlines()


def test_short_texts_take_one_line_each():
    assert len(render([SHORT] * 3)) == 3 + 4


def test_a_long_text_takes_at_most_two_lines():
    text = "<|user|> " + "some context of a question " * 60 + "Who? <|end|>"
    lines = render([SHORT | {"input": text}] * 3)
    assert len(lines) <= 3 * 6 + 2
    assert sum("<|user|>" in line for line in lines) == sum("Who? <|end|>" in line for line in lines) == 3
    assert all(len(line) <= 100 for line in lines)
    assert shorten("x" * 400, 60).count("x") < 60


def test_wide_characters_count_twice():
    assert cell_len(shorten("文" * 400, 61)) <= 61
    assert shorten("文" * 30, 60) == "文" * 30
    lines = render([SHORT | {"input": "文字 " * 300}] * 2)
    assert len(lines) <= 2 * 6 + 2


def test_the_last_line_names_the_best_step_where_later_prompts_were_worse():
    found = {"before": {"f1": 0.6}, "validation": {"f1": 0.9}, "last": {"f1": 0.9}, "best_step": 8}
    assert describe_gain(found, "f1") == "f1 0.6000 before training, 0.9000 after"
    found["last"] = {"f1": 0.5}
    assert describe_gain(found, "f1") == "f1 0.6000 before training, best at step 8: 0.9000, 0.5000 at the end"


def test_a_metric_that_was_added_on_resume_stands_beside_the_gain_in_loss():
    found = {"before": {"loss": 2.0}, "validation": {"loss": 1.0, "f1": 0.9}, "best_step": 8}
    assert describe_gain(found, "f1") == "loss 2.0000 before training, 1.0000 after, f1 0.9000"
    assert describe_gain(found | {"before": {}}, "f1") == ""
    found["validation"] = {"loss": 1.0, "accuracy": 0.5}  # finished before the metric was asked for
    assert describe_gain(found, "f1") == "loss 2.0000 before training, 1.0000 after"
