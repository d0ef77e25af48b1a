"""What each supervised token is predicted from, read back from the layout of a pass: exactly the text before it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ptune_dist.data.batches import Batch, HeldPart
from ptune_dist.data.label_tree import build_label_tree
from ptune_dist.model.attention import KeysValues
from ptune_dist.model.layout import Layout, Outside, collect_outside, lay_out, lay_out_labels, plan_outside
from ptune_dist.model.layout import shares_context as shares
from ptune_dist.model.packing import ALIGNMENT, pack
from tests.numerics.passes import draw_batch, draw_tokens

CASES = ["prefix", "infix", "shared", "template"]
VECTORS = [(4, 7), (0, 7), (3, 0)]  # virtual tokens of two members that stand in the sequence
PREFIXES = [(0, 0), (5, 0), (2, 3)]  # positions of their own keys/values
LABELS = [[7, 8, 9, 0], [7, 8, 9, 4, 0], [7, 8], [7, 11, 0], [5], [20, 21, 22, 0], [7, 8, 9, 5, 6, 0]]
CPU = torch.device("cpu")
NUM_LEAD = 9  # of `draw_batch`


def draw(case: str) -> Batch:
    """Rows whose contexts are held in two parts, the first of which all share; every row has an input token."""
    batch, lead = draw_batch(case)
    assert len(lead) == NUM_LEAD
    if case == "infix":
        batch.rests[:] = [draw_tokens(np.random.default_rng(row), 1 + row) for row in range(len(batch.rests))]
    if case == "template":
        batch.rests[:] = [rest if len(rest) else np.array([9], np.int32) for rest in batch.rests]
    parts = []
    for row, context in enumerate(batch.contexts):
        own = len(context) - NUM_LEAD
        found = [HeldPart("lead", NUM_LEAD)] if len(context) else []
        parts.append((*found, *([HeldPart(("row", row), own)] if own > 0 else [])))
    return Batch(batch.contexts, batch.rests, batch.targets, batch.readers, 1, held_parts=parts)


def read_back(layout: Layout, outside: Outside, batch: Batch, num_vectors, runs) -> list[list]:
    """For each live position, all that it reads and itself, in order: what `expect` writes of a text."""
    num_virtual = sum(num_vectors)
    virtual = [("virtual", member, i) for member, count in enumerate(num_vectors) for i in range(count)]
    live = [virtual[s] if s < num_virtual else int(layout.tokens[s - num_virtual]) for s in layout.source.tolist()]
    found: list[list] = [[] for _ in live]
    for segment in [*layout.segments, *runs]:
        before: list = []
        for source in (outside.sources[number] for number in segment.contexts):
            if source.member is not None:
                before += [("prefix", source.member, i) for i in range(source.length)]
            else:
                first = sum(part.length for part in batch.held_parts[source.row][: source.part])
                before += batch.contexts[source.row][first : first + source.length].tolist()
        for start, length in segment.parents:
            before += live[start : start + length]
        assert len(before) == segment.offset
        for number in range(segment.start, segment.start + segment.length):
            assert not found[number], "a position belongs to one segment"
            found[number] = [*before, *live[segment.start : number + 1]]
    for number, text in enumerate(found):
        assert layout.position_ids[number] == len(text) - 1
    return found


def expect(batch: Batch, row: int, member: int, num_vectors, num_prefix) -> list:
    """The whole input of a reader."""
    prefix = [("prefix", member, i) for i in range(num_prefix[member])]
    virtual = [("virtual", member, i) for i in range(num_vectors[member])]
    return [*batch.contexts[row].tolist(), *prefix, *virtual, *batch.rests[row].tolist()]


@pytest.mark.parametrize("num_prefix", PREFIXES)
@pytest.mark.parametrize("num_vectors", VECTORS)
@pytest.mark.parametrize("case", CASES)
def test_each_target_is_predicted_from_its_own_text_before_it(case, num_vectors, num_prefix):
    batch = draw(case)
    outside = plan_outside(batch, num_prefix)
    layout = lay_out(batch, list(num_vectors), outside)
    texts = read_back(layout, outside, batch, num_vectors, [])
    wanted = []
    for number, (row, member) in enumerate(batch.readers):
        target = batch.targets[row].tolist()
        before = expect(batch, row, member, num_vectors, num_prefix)
        wanted += [(number, token, [*before, *target[:place]]) for place, token in enumerate(target)]
    places = layout.predicts.tolist()
    found = zip(layout.reader.tolist(), layout.targets.tolist(), [texts[place] for place in places], strict=True)
    assert list(found) == wanted
    assert all(segment.member == member_of(segment, layout, batch) for segment in layout.segments)
    num_read = sum(len(batch.rests[row]) + len(batch.targets[row]) - 1 for row, _ in batch.readers)
    copies = 1 if shares(batch) else None
    members = [member for _, member in batch.readers]
    num_virtual = sum(num_vectors[member] * (copies or members.count(member)) for member in (0, 1))
    assert len(layout.source) == num_read + num_virtual  # nothing is computed twice


def member_of(segment, layout: Layout, batch: Batch) -> int:
    """Whose targets are predicted from a segment or from what reads it."""
    run = (segment.start, segment.length)
    readers = [s for s in layout.segments if s is segment or run in s.parents]
    live = [n for s in readers for n in range(s.start, s.start + s.length)]
    (member,) = {batch.readers[reader][1] for reader in layout.reader[np.isin(layout.predicts, live)].tolist()}
    return member


@pytest.mark.parametrize("case", ["prefix", "infix", "shared"])
def test_without_input_the_first_target_is_predicted_from_the_last_virtual_token(case):
    batch = draw(case)
    batch.rests[:] = [np.zeros(0, np.int32)] * len(batch.rests)
    outside = plan_outside(batch, (0, 2))
    layout = lay_out(batch, [4, 7], outside)
    texts = read_back(layout, outside, batch, (4, 7), [])
    for number, (row, member) in enumerate(batch.readers):
        first = layout.predicts[layout.reader == number][0]
        assert texts[first] == expect(batch, row, member, (4, 7), (0, 2))
        assert texts[first][-1] == ("virtual", member, (3, 6)[member])


def test_without_input_and_virtual_tokens_nothing_could_predict_the_first_target():
    nothing = np.zeros(0, np.int32)
    batch = Batch([nothing], [nothing], [np.array([5, 6], np.int32)], [(0, 0)], 1)
    with pytest.raises(
        AssertionError, match="the first target is predicted from a token of the input or of the prompt"
    ):
        lay_out(batch, [0], plan_outside(batch, [0]))


@pytest.mark.parametrize("num_prefix", PREFIXES)
@pytest.mark.parametrize("num_vectors", VECTORS)
@pytest.mark.parametrize("case", CASES)
def test_each_token_of_each_label_is_predicted_from_the_input_and_its_own_branch(case, num_vectors, num_prefix):
    batch = draw(case)
    trees = [build_label_tree(LABELS)] * len(batch.rests)
    trees[1] = build_label_tree(LABELS[2:5])
    trees[2] = build_label_tree([[6], [7]])  # nothing of it is read
    batch = Batch(
        batch.contexts, batch.rests, batch.targets, batch.readers, 1, held_parts=batch.held_parts, trees=trees
    )
    outside = plan_outside(batch, num_prefix)
    planned = lay_out_labels(batch, list(num_vectors), outside)
    layout = planned.layout
    runs = [run for tree in planned.trees for run in tree.segments()]
    texts = read_back(layout, outside, batch, num_vectors, runs)
    assert layout.targets.tolist() == list(range(len(layout.predicts)))
    assert len(planned.trees) == sum(len(trees[row].tokens) > 0 for row, _ in batch.readers)
    first = 0
    for number, (row, member) in enumerate(batch.readers):
        before = expect(batch, row, member, num_vectors, num_prefix)
        for path in trees[row].paths:
            label = trees[row].targets[path].tolist()
            for place, scored in enumerate(first + path):
                position = planned.places[scored]
                assert planned.targets[scored] == label[place] and layout.reader[position] == number
                assert texts[layout.predicts[position]] == [*before, *label[:place]]
        first += len(trees[row].targets)
    assert len(planned.places) == len(planned.targets) == first
    assert {tree.member for tree in planned.trees} == {0, 1}
    assert all(tree.tree is not trees[2] for tree in planned.trees)


def test_keys_and_values_are_collected_once_each_where_they_were_planned():
    contexts = [np.arange(5, 5 + count, dtype=np.int32) for count in (3, 6, 3)]
    ones = [np.ones(1, np.int32)] * 3
    lead, own, prefix = (KeysValues(*torch.randn(2, 2, length, 2, 4)) for length in (3, 3, 4))
    held = [(lead,), (lead, own), (lead,)]
    batch = Batch(contexts, ones, ones, [(row, member) for row in range(3) for member in (0, 1)], 1, held=held)
    outside, found = collect_outside(batch, [None, prefix])
    assert [part is one for part, one in zip(found, (lead, own, prefix), strict=True)] == [True] * 3
    assert outside.of(1, 0) == ((0, 1), 6, 0) and outside.of(2, 1) == ((0, 2), 7, 1)
    alike = Batch([contexts[0]] * 2, ones[:2], ones[:2], [(0, 0), (1, 0)], 1, held=[(lead,), (own,)])
    assert len(collect_outside(alike, [None])[1]) == 1  # the same tokens, held twice
    with pytest.raises(AssertionError):
        outside.collect(SimpleNamespace(held=[(prefix,), (lead, own), (lead,)]), [None, prefix])


def test_virtual_tokens_stand_once_only_where_no_row_has_a_context_of_its_own():
    def batch(*contexts: list[int]) -> Batch:
        nothing = [np.zeros(0, np.int32)] * len(contexts)
        return Batch([np.array(one, np.int32) for one in contexts], nothing, nothing, [(0, 0)], 1)

    assert shares(batch([])) and shares(batch([], [])) and shares(batch([5, 6], [5, 6]))
    assert not shares(batch([5])) and not shares(batch([5], [6])) and not shares(batch([5], [5], [5, 6]))


def test_packed_arrays_come_back_aligned_and_as_they_were():
    arrays = {
        "bytes": np.arange(5, dtype=np.uint8),
        "numbers": np.arange(6, dtype=np.int64).reshape(2, 3),
        "none": np.zeros((0, 4), np.float32),
        "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "flags": np.array([True, False, True]),
        "last": np.arange(3, dtype=np.int32),
    }
    packed = pack(arrays, CPU)
    assert all(place.start % ALIGNMENT == 0 for place in packed.places.values())
    assert packed.places["numbers"].start == ALIGNMENT and packed.places["none"].start == 7 * ALIGNMENT
    assert len(packed.buffer) == packed.places["last"].end  # no more than is needed
    for name, tensor in packed.unpack(CPU).items():
        assert tensor.numpy().dtype == arrays[name].dtype and np.array_equal(tensor.numpy(), arrays[name]), name
    assert not pack({}, CPU).places
