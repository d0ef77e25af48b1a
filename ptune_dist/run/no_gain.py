"""One line at the end of a run whose prompt is no better than the base alone."""

from ptune_dist.config.schema import Config
from ptune_dist.metrics import METRICS
from ptune_dist.prompts.build import find_method
from ptune_dist.run.progress import Standing
from ptune_dist.run.slow_start import START_FROM_TEXT, describe_far_rate

FEW_PASSES = 3.0  # over the training rows: more steps are likelier to help than more rows
FEW_ROWS = 200  # of validation: two such scores differ by 0.1 and more by chance


def describe_no_gain(
    config: Config, standing: Standing, family: str, *, num_steps: int, num_rows: int, num_held_out: int
) -> str:
    """What to say of a member's best prompt, empty where it is better than the base or the base was not evaluated.

    They are compared by the metric that chooses the best prompt. The member was trained for `num_steps` on `num_rows`.
    """
    name = config.evaluate.best
    base = standing.without_prompt.get(name)
    trained = standing.best.get(name)
    if base is None or trained is None:
        return ""
    if trained > base if METRICS[name].higher_is_better else trained < base:
        return ""
    found = f"{name} {trained:.4f}, {base:.4f} without it, on {num_held_out:,} validation rows"
    few = "; so few rows leave that uncertain" if num_held_out < FEW_ROWS else ""
    remedies = ", or ".join(choose_remedies(config, family, num_steps, num_rows))
    intervals = f"`ptune-dist evaluate {config.output_dir} --baselines` gives intervals"
    return f"the trained prompt is no better than the base alone ({found}{few}): {remedies}; {intervals}"


def choose_remedies(config: Config, family: str, num_steps: int, num_rows: int) -> list[str]:
    """The three likeliest ones: more training, another way of training, words."""
    passes = num_steps * config.train.batch_size / num_rows
    if passes < FEW_PASSES:
        first = f"train for more steps ({num_steps:,} are {passes:.2g} passes over the {num_rows:,} training rows)"
    else:
        first = f"add training rows (there are {num_rows:,})"
    second = describe_far_rate(config, family) or "try another train.learning_rate or prompt.method"
    if "text" in find_method(config.prompt).starts and config.prompt.init not in ("text", "file"):
        return [first, second, START_FROM_TEXT]
    if config.prompt.text is None:
        return [first, second, "describe the task in words (prompt.text)"]
    return [first, second]
