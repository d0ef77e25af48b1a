"""The rows of several sources are those of each, one after the other, and their token ids are not copied."""

import numpy as np
import pytest

from ptune_dist.data import examples as examples_module
from ptune_dist.data.examples import Examples, Part, find_facts, join_parts, part_of
from ptune_dist.data.training_rows import join_examples


def examples_of(name: str, seed: int, *, contexts: bool, numbers: bool = False, num_rows: int = 7) -> Examples:
    """Random rows; contexts begin with the tokens 5 and 6."""
    rng = np.random.default_rng(seed)
    num_context = rng.integers(2, 5, num_rows) if contexts else np.zeros(num_rows, np.int64)
    num_targets = rng.integers(1, 4, num_rows)
    lengths = num_context + rng.integers(0, 3, num_rows) + num_targets
    ids = [
        np.concatenate([[5, 6][:count], rng.integers(0, 99, length)])[:length]
        for count, length in zip(num_context, lengths, strict=True)
    ]
    part = Part(
        np.concatenate(ids).astype(np.int32),
        lengths.astype(np.int32),
        num_targets.astype(np.int32),
        rng.integers(0, 2, num_rows).astype(bool),
        num_context.astype(np.int32),
        rng.random(num_rows) if numbers else None,
    )
    return join_parts([part], lambda index: f"{name} {index}")


def copied(parts: list[Examples]) -> Examples:
    """As `join_examples`, with everything in arrays of its own."""
    whole = join_parts([part_of(part) for part in parts], str)
    names = [part.where(i) for part in parts for i in range(len(part))]
    return Examples(
        whole.ids,
        whole.offsets,
        whole.num_targets,
        whole.is_truncated,
        names.__getitem__,
        whole.num_context,
        whole.numbers,
    )


@pytest.mark.parametrize("contexts", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("numbers", [False, True])
def test_examples_of_several_sources_are_those_of_each(monkeypatch, contexts, numbers):
    monkeypatch.setattr(examples_module, "CHUNK_ROWS", 4)
    parts = [
        examples_of("abc"[i], i, contexts=has, numbers=numbers, num_rows=5 + i)
        for i, has in enumerate([*contexts, contexts[0]])
    ]
    joined = join_examples(parts)
    wanted = copied(parts)
    assert not joined.ids.size, "token ids are copied"
    assert len(joined) == len(wanted)
    assert joined.lengths.tolist() == wanted.lengths.tolist()
    assert joined.longest_rows(3) == np.argsort(-wanted.lengths, kind="stable")[:3].tolist()
    some = [17, 0, 5, 6, 11, 4, 5]
    assert joined.lengths_of(some).tolist() == wanted.lengths_of(some).tolist()
    assert joined.widths_of(some).tolist() == wanted.widths_of(some).tolist()
    for i in range(len(wanted)):
        for take in ("context_ids", "rest_ids", "input_ids", "target_ids"):
            assert getattr(joined, take)(i).tolist() == getattr(wanted, take)(i).tolist()
        assert joined.number(i) == wanted.number(i) and joined.where(i) == wanted.where(i)
    facts = find_facts(wanted)
    for name in ("num_truncated", "has_contexts", "first_empty", "longest", "lead", "is_lead_whole"):
        assert getattr(joined.known, name) == getattr(facts, name), name
