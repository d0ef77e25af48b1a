"""Which of several trained prompts a run starts from: the best on its first rows (SPoT, arXiv:2110.07904).

Every source is scored with the validation loss on the rows of the first steps, before any step, so a run that is
resumed does not score again.
"""

import math

from ptune_dist.data.batches import collate
from ptune_dist.data.training_rows import TrainingRows
from ptune_dist.distributed.world import World, sum_over_ranks
from ptune_dist.evaluation.generate import pad_id
from ptune_dist.run.job import Job

NUM_STEPS = 4  # whose rows are read


def choose_sources(job: Job, rows: TrainingRows, world: World) -> list[str]:
    """Have each member with several sources start from the best one; a line about each. Collective."""
    sources = job.sources
    if not sources:
        return []
    found: dict[str, dict[str, float]] = {name: {} for name in sources}
    for place in range(max(map(len, sources.values()))):
        tried = {name: list(files)[place] for name, files in sources.items() if place < len(files)}
        for name, file in tried.items():
            load_source(job, name, file)
        losses = score_members(job, rows, list(tried), world)
        for name, file in tried.items():
            found[name][file] = losses[name]
    lines = []
    for name, scores in found.items():
        ranked = sorted(scores, key=lambda file: scores[file])
        load_source(job, name, ranked[0])
        who = f"{name} starts" if job.config.sweep else "the prompt starts"
        others = ", ".join(f"{scores[file]:.4f} of {file}" for file in ranked[1:])
        lines.append(
            f"{who} from {ranked[0]}: loss {scores[ranked[0]]:.4f} on the first {NUM_STEPS} batches ({others})"
        )
    return lines


def load_source(job: Job, member: str, file: str) -> None:
    """Set a member's prompt to that of one of its sources; a trained head stays."""
    state = job.engine.prompts.members[member]
    prompt = job.engine.model.prompt(job.engine.members.index(member))
    state.load_tensors(prompt.take(state.tensors() | job.sources[member][file].state_dict()))
    job.engine.model.read_prompts()


def score_members(job: Job, rows: TrainingRows, names: list[str], world: World) -> dict[str, float]:
    """The validation loss of each member on the rows of its first steps. Collective."""
    engine = job.engine
    steps = [rows.of_step(step, names) for step in range(1, NUM_STEPS + 1)]
    chosen = {name: list(dict.fromkeys(example for own in steps for example in own[name])) for name in names}
    sums = dict.fromkeys(names, 0.0)
    for shares in engine.plan(rows.units(chosen, engine.members), rows.examples, job.micro_batch.tokens):
        losses = engine.row_losses(collate(rows.examples, shares, world.rank, pad_id(job.tokenizer))).double().tolist()
        readers = [member for _, some in shares[world.rank] for member in some]
        for loss, member in zip(losses, readers, strict=False):  # a rank that idles has a reader that is no row
            sums[engine.members[member]] += loss
    totals = sum_over_ranks(list(sums.values()), world)
    divide = engine.model.objective.divisor
    means = [total / divide(rows.examples.num_targets[chosen[name]]) for name, total in zip(names, totals, strict=True)]
    return {name: mean if math.isfinite(mean) else math.inf for name, mean in zip(names, means, strict=True)}
