"""One line, after a tenth of the steps, for a prompt whose loss has not fallen."""

import math

from ptune_dist.config.schema import Config
from ptune_dist.prompts.build import check_options, find_method
from ptune_dist.run.job import Job
from ptune_dist.run.progress import NUM_RECENT, Progress, Standing
from ptune_dist.run.training_defaults import DEFAULTS_ARE_FOR

SHARE = 0.1  # of the steps
FALL = 0.02  # of the loss
FEWEST_STEPS = 10  # in the share: with fewer, the rows of a batch decide
SMALL_LOSS = 0.01  # there is nothing left to learn
FAR = 2.0  # times the default, or a part of it: a rate that is likely the cause
START_FROM_TEXT = "start from an instruction for the task (prompt.init_text)"


def find_slow_starts(job: Job, progress: Progress) -> list[str]:
    """A warning for each live member that is due after this step and whose loss has not fallen."""
    if not job.reading.objective.has_falling_loss:
        return []
    lines = []
    for name in progress.live:
        config = job.members[name]
        found = describe_slow_start(config, progress.members[name], progress.step, job.reading.family.name)
        if found:
            lines.append(f"{name}: {found}" if job.config.sweep else found)
    return lines


def describe_slow_start(config: Config, standing: Standing, step: int, family: str) -> str:
    """What to say after step `step`, mostly nothing.

    The mean loss of some steps is compared with that of as many first ones: one step's rows differ from another's. A
    prompt from a file may have learned already, so it gets no line.
    """
    num_steps = math.ceil(SHARE * config.train.max_steps)
    is_due = step == config.train.num_warmup_steps + num_steps  # the rate is low before
    if not is_due or num_steps < FEWEST_STEPS or config.prompt.init == "file":
        return ""
    num_compared = min(NUM_RECENT, num_steps // 2)
    first = standing.first_losses[:num_compared]
    last = standing.recent_losses[-num_compared:]
    if len(first) < num_compared:  # resumed from a checkpoint of an earlier version
        return ""
    before = sum(first) / num_compared
    now = sum(last) / num_compared
    if before < SMALL_LOSS or now < (1 - FALL) * before:
        return ""
    remedies = ", or ".join(choose_remedies(config, family, is_rising=now > (1 + FALL) * before))
    return f"the loss has not fallen by {FALL:.0%} after {step} steps ({before:.4g}, now {now:.4g}): {remedies}"


def choose_remedies(config: Config, family: str, *, is_rising: bool) -> list[str]:
    """The two likeliest ones."""
    rate = config.train.peak_rate
    first = describe_far_rate(config, family)
    if not first and is_rising:
        first = f"lower train.learning_rate (it is {rate:g}), to {rate / 3:.2g} for example"
    elif not first:
        first = f"raise train.learning_rate (it is {rate:g}), to {rate * 3:.2g} for example"
    if "text" in find_method(config.prompt).starts and config.prompt.init != "text":
        return [first, START_FROM_TEXT]
    return [first, "look at the supervised part of some rows with `ptune-dist validate`"]


def describe_far_rate(config: Config, family: str) -> str:
    """What to do about a learning rate far from the method's default, empty for others."""
    method = find_method(config.prompt)
    default = method.choose_training(check_options(config.prompt), family).learning_rate
    rate = config.train.peak_rate
    is_far = rate > FAR * default or rate * FAR < default
    if config.train.optimizer != DEFAULTS_ARE_FOR or not is_far:
        return ""
    return f"set train.learning_rate to the method's default, {default:g} (it is {rate:g})"
