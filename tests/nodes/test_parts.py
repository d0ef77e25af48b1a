"""Parts of the exchange between nodes: blocks and shares, messages, who is suspected, views in a folder."""

import asyncio
import json
import random
from dataclasses import asdict, replace

import pytest

from ptune_dist.errors import UserError
from ptune_dist.nodes import rendezvous
from ptune_dist.nodes.agreement import Member
from ptune_dist.nodes.blocks import Range, subtrees, sum_along_tree
from ptune_dist.nodes.candidate import Candidate
from ptune_dist.nodes.frames import Decoder, encode
from ptune_dist.nodes.membership import Membership
from ptune_dist.nodes.rendezvous import FolderRendezvous
from ptune_dist.nodes.rendezvous_server import Registry
from ptune_dist.nodes.settings import Limits
from ptune_dist.nodes.shares import divide, next_shares, num_blocks_of, take_over
from ptune_dist.nodes.suspicion import LinkState, ReportedSuspicions
from ptune_dist.nodes.turns import Record, Rules, ViewRecord, first_plan, follow
from ptune_dist.nodes.view_change import State


def test_subtrees_are_aligned_and_the_fewest():
    for lo in range(17):
        for hi in range(lo, 17):
            found = subtrees(lo, hi)
            assert [block for piece in found for block in range(piece.lo, piece.hi)] == list(range(lo, hi))
            assert all(piece.lo % piece.num_blocks == 0 for piece in found)
            pairs = zip(found, found[1:], strict=False)
            assert not any(
                one.num_blocks == other.num_blocks and one.lo % (2 * one.num_blocks) == 0 for one, other in pairs
            )


def test_the_sum_has_the_same_bits_for_any_division():
    generator = random.Random(0)
    values = [generator.uniform(-1, 1) * 10.0 ** generator.randint(-8, 8) for _ in range(32)]

    def tree(lo: int, hi: int) -> float:
        return values[lo] if hi - lo == 1 else tree(lo, (lo + hi) // 2) + tree((lo + hi) // 2, hi)

    sums = set()
    for _ in range(50):
        nodes = [f"n{i}" for i in range(generator.randint(1, 7))]
        owners = divide(Range(0, 32), nodes, {node: generator.uniform(0.1, 2) for node in nodes})
        sums.add(sum_along_tree({piece: tree(piece.lo, piece.hi) for piece, _ in owners}, float.__add__, 32))
    assert sums == {tree(0, 32)}
    assert tree(0, 32) != sum(values)  # the order matters for these values


def test_shares_follow_the_speeds():
    counts = num_blocks_of(divide(Range(0, 32), ["slow", "fast"], {"slow": 3.0, "fast": 1.0}))
    assert counts == {"slow": 8, "fast": 24}


def test_every_node_is_measured_where_there_are_enough_blocks():
    counts = num_blocks_of(divide(Range(0, 8), ["a", "b"], {"a": 1.0, "b": 1000.0}))
    assert counts == {"a": 7, "b": 1}


def test_more_nodes_than_blocks():
    owners = divide(Range(0, 2), ["a", "b", "c"], {})
    assert sum(piece.num_blocks for piece, _ in owners) == 2


def test_shares_stay_while_new_ones_are_hardly_better():
    before = divide(Range(0, 32), ["a", "b"], {"a": 1.0, "b": 1.0})
    assert next_shares(32, ["a", "b"], {"a": 1.05, "b": 1.0}, before) == before
    assert next_shares(32, ["a", "b"], {"a": 2.0, "b": 1.0}, before) != before


def test_lost_ranges_are_taken_over_whole():
    lost = [Range(4, 8), Range(16, 18)]
    owners = take_over(lost, ["a", "b"], {"a": 1.0, "b": 1.0})
    assert sorted(block for piece, _ in owners for block in range(piece.lo, piece.hi)) == [4, 5, 6, 7, 16, 17]
    assert num_blocks_of(owners) == {"a": 3, "b": 3}


def test_messages_are_found_in_any_cut_of_the_stream():
    stream = b"".join([*encode({"kind": "one"}, [b"abc", b""]), *encode({"kind": "two"})])
    for size in (1, 2, 5, len(stream)):
        decoder = Decoder()
        decoder.is_trusted = True
        found = [
            (message["kind"], parts)
            for start in range(0, len(stream), size)
            for message, parts in decoder.feed(stream[start : start + size])
        ]
        assert found == [("one", [b"abc", b""]), ("two", [])]


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x02[]",
        b"\x00\x00\x00\x0c" + b'{"kind":"a"}',
        b"".join(encode({"kind": "a"}, [b"part"])),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_what_a_stranger_sends_is_refused(data):
    with pytest.raises(ValueError):
        Decoder().feed(data)


def test_the_node_that_most_cannot_reach_is_removed():
    reported = ReportedSuspicions()
    for reporter, suspect in (("b", "d"), ("d", "b"), ("d", "c"), ("c", "d")):
        reported.add(reporter, suspect, 0.0)
    assert reported.to_remove(["a", "b", "c", "d"], "a", [], now=0.5) == set()  # others may report as well
    assert reported.to_remove(["a", "b", "c", "d"], "a", [], now=1.5) == {"d"}
    assert reported.to_remove(["a", "b", "c", "d"], "a", ["c"], now=1.5) == {"c", "d"}


def view(number: int, *names: str) -> ViewRecord:
    return ViewRecord(number, tuple(Member(name, name, "", "") for name in names), names[0] if names else "")


def test_one_claim_of_a_number_succeeds(tmp_path):
    async def claim_all() -> list[ViewRecord]:
        places = [FolderRendezvous(tmp_path / "nodes") for _ in range(8)]
        await asyncio.gather(*(place.start() for place in places))
        return await asyncio.gather(*(place.claim(view(1, f"n{i}"), True) for i, place in enumerate(places)))

    held = asyncio.run(claim_all())
    assert len({record.ids[0] for record in held}) == 1


def test_a_late_claim_hears_of_the_newest_view(tmp_path):
    async def claim() -> ViewRecord:
        place = FolderRendezvous(tmp_path)
        for number in (1, 2, 3):
            assert await place.claim(view(number, "a"), True) == view(number, "a")
        assert await place.claim(view(3, "a"), True) == view(3, "a")  # may be repeated
        return await place.claim(view(2, "b"), True)

    assert asyncio.run(claim()) == view(3, "a")


@pytest.mark.parametrize("content", ["", "{}", "[1]", None])
def test_a_damaged_view_is_named_until_there_is_a_newer_one(tmp_path, monkeypatch, content):
    monkeypatch.setattr(rendezvous, "READ_S", 0.2)
    place = FolderRendezvous(tmp_path)
    assert asyncio.run(place.claim(view(1, "a"), True)) == view(1, "a")
    for name in ("view-x.json", "view-00000009.json.old", ".view-00000009.json-1"):  # no views
        (tmp_path / name).touch()
    damaged = tmp_path / "view-00000002.json"
    damaged.write_text(json.dumps(view(3, "a").to_json()) if content is None else content)
    for call in (place.latest(), place.claim(view(2, "b"), True)):
        with pytest.raises(UserError, match=f"{damaged}: not a view of the run's nodes: remove this file"):
            asyncio.run(call)
    assert asyncio.run(place.announce(view(1, "a"))) == view(1, "a")  # those who train are not disturbed
    assert asyncio.run(place.claim(view(3, "c"), True)) == view(3, "c") == asyncio.run(place.latest())


def test_old_views_are_removed_and_their_numbers_stay_taken(tmp_path):
    place = FolderRendezvous(tmp_path)
    for number in range(1, 40):
        asyncio.run(place.claim(view(number, "a"), True))
    kept = [f"view-{number:08d}.json" for number in range(40 - rendezvous.NUM_KEPT, 40)]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    assert asyncio.run(place.claim(view(2, "b"), True)) == view(39, "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_a_node_that_joins_under_the_name_of_another_gets_a_number():
    def report(joiners) -> dict:
        shown = [asdict(member) for member in joiners]
        return {"leaving": False, "joiners": shown, "seconds": 1.0, "num_blocks": 1}

    joiners = [Member(id, "vm", "", "") for id in ("2", "3")] + [Member("4", "other", "", "")]
    plan = first_plan(Member("1", "vm", "", ""), Rules(1, 1, 8))
    following = follow(Record(plan, {"1": report(joiners)}), Rules(1, 1, 8))
    assert [member.name for member in following.members] == ["vm", "other", "vm-2", "vm-3"]


def test_a_server_that_has_just_started_does_not_let_a_node_begin():
    registry = Registry(now=10.0)
    assert not registry.answer({"kind": "latest"}, 11.0)["is_sure"]
    registry.answer({"kind": "announce", "view": view(5, "a").to_json()}, 11.0)
    answer = registry.answer({"kind": "latest"}, 11.0)
    assert answer["is_sure"] and answer["view"]["number"] == 5
    assert registry.answer({"kind": "claim", "view": view(5, "b").to_json()}, 12.0)["view"]["members"][0]["id"] == "a"
    assert Registry(now=10.0).answer({"kind": "latest"}, 15.0)["is_sure"]


class FakeOutside:
    """The clock, links, lines and messages of a node."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.links: dict[str, LinkState] = {}
        self.lines: list[str] = []
        self.sent: list[tuple[str, dict]] = []
        self.claims: list[ViewRecord] = []

    def send(self, node: str, message: dict, parts: list[bytes]) -> None:
        self.sent.append((node, message))

    def changed(self) -> None:
        pass

    def claim(self, view: ViewRecord, is_majority: bool) -> None:
        self.claims.append(view)

    def look_up(self) -> None:
        pass

    def now(self) -> float:
        return self.seconds

    def connect(self, members) -> None:
        pass

    def link_state(self, node: str) -> LinkState:
        return self.links.get(node, LinkState(False))

    def say(self, text: str, /) -> None:
        self.lines.append(text)


def test_a_candidate_waits_for_a_group_that_it_has_just_learned_of():
    outside = FakeOutside()
    candidate = Candidate(view(1, "a").members[0], outside, Limits(found_s=5.0), Rules(1, 1, 8))
    outside.seconds = 6.0  # a server that had just started did not let it begin
    candidate.learn(view(1, "b"))
    assert not candidate.is_group_gone()
    outside.seconds = 12.0
    assert candidate.is_group_gone()


@pytest.mark.parametrize(
    ("own", "is_open", "is_refused", "expected"),
    [
        ("c", True, False, "node c joins a, b"),
        ("b", False, True, "node b joins a again"),  # what it was before has ended
        ("b", False, False, "node b joins a"),
        ("b", True, False, "node b joins a, b"),  # another node of its name
    ],
)
def test_a_node_that_joins_again_does_not_list_itself(own, is_open, is_refused, expected):
    outside = FakeOutside()
    candidate = Candidate(Member("new", own, "", ""), outside, Limits(), Rules(1, 1, 8))
    outside.links = {"a": LinkState(True), "b": LinkState(is_open, is_refused=is_refused)}
    candidate.on_message("a", {"kind": "view", "view": view(3, "a", "b").to_json(), "is_full": False}, [])
    assert outside.lines == [expected]


def test_a_state_that_is_on_its_way_is_waited_for_and_asked_for_once():
    """Of three members `a` leads, `b` has begun to send a large state, and `c` gives no answer."""
    outside = FakeOutside()
    rules = Rules(2, 1, 8)
    plan = first_plan(Member("a", "a", "", ""), rules)
    member = Membership(view(3, "a").members[0], rules, Limits(), outside, view(3, "a", "b", "c", "d"), plan)
    lead = member.coordination
    lead.mute = {"d"}
    lead.tick(set(), set())
    assert [(node, message["is_answering"]) for node, message in outside.sent] == [("b", False), ("c", False)]
    lead.on_answering("b", {"attempt": outside.sent[0][1]["attempt"]})
    outside.seconds = 2.0
    outside.sent.clear()
    lead.tick(set(), set())
    assert [(node, message["is_answering"]) for node, message in outside.sent] == [("b", True), ("c", False)]
    outside.seconds = 4.0
    lead.tick(set(), set())
    assert lead.mute == {"c", "d"}
    outside.sent.clear()
    outside.seconds = 4.1
    lead.tick(set(), set())  # without c
    lead.on_answering("b", {"attempt": outside.sent[0][1]["attempt"]})
    lead.on_new_link("b")
    outside.seconds = 6.0
    lead.tick(set(), set())
    assert outside.sent[-1][0] == "b" and not outside.sent[-1][1]["is_answering"]
    outside.seconds = 8.0
    lead.tick(set(), set())
    assert "b" in lead.mute  # the answer that was on its way is lost


def lead_without_c(outside: FakeOutside) -> Membership:
    """`a` of the members a, b, c, once b has answered it and it has claimed view 4 without c."""
    rules = Rules(2, 1, 8)
    before = view(3, "a", "b", "c")
    plan = replace(first_plan(before.members[0], rules), members=before.members)
    member = Membership(before.members[0], rules, Limits(), outside, before, plan)
    change_view(member, outside)
    return member


def change_view(member: Membership, outside: FakeOutside) -> None:
    lead = member.coordination
    lead.mute = {"c"}
    lead.tick(set(), set())
    assert lead.change
    lead.on_state("b", *State(member.view, member.plan).to_message(lead.change.attempt))
    assert outside.claims[-1].ids == ["a", "b"]


def test_who_finds_its_own_view_at_the_rendezvous_has_it():
    outside = FakeOutside()
    member = lead_without_c(outside)
    member.on_latest(outside.claims[0])
    assert member.view == outside.claims[0] and ("b", "newview") in [
        (node, each["kind"]) for node, each in outside.sent
    ]
    member.on_claimed(outside.claims[0], outside.claims[0])
    assert member.view.number == 4 and len(outside.claims) == 1


def test_the_answer_to_an_earlier_claim_is_not_taken_for_that_to_a_later_one():
    outside = FakeOutside()
    member = lead_without_c(outside)
    other = view(4, "a", "b", "c")  # which b has led
    member.on_latest(replace(other, by="b/1"))
    change_view(member, outside)
    first, second = outside.claims
    member.on_claimed(first, replace(other, by="b/1"))
    member.on_claimed(first, first)
    assert second.number == 5 and member.view.number == 3
    member.on_claimed(second, second)
    assert member.view == second


def test_a_node_is_asked_for_by_its_candidate_again_and_again():
    outside = FakeOutside()
    candidate = Candidate(Member("new", "n", "", ""), outside, Limits(), Rules(1, 1, 8))
    candidate.ask_again()
    assert not outside.sent  # nobody is known
    candidate.learn(view(3, "a", "b"))
    for outside.seconds in (5.0, 5.5, 6.1):
        candidate.ask_again()
    assert [(node, message["kind"]) for node, message in outside.sent] == [(node, "join") for node in "abab"]


def test_an_end_that_comes_after_an_unknown_view_leaves_a_member_behind():
    outside = FakeOutside()
    for number, is_behind in ((4, False), (5, True)):
        member = lead_without_c(outside)
        member.on_latest(view(number))
        assert bool(member.end) == is_behind


def test_of_two_views_with_one_number_that_at_the_rendezvous_holds():
    outside = FakeOutside()
    member = lead_without_c(outside)
    member.on_latest(view(3, "a", "b", "c"))
    assert not member.end
    member.on_latest(view(3, "a", "b"))
    assert member.end


def test_who_gives_up_a_change_releases_those_too_that_have_not_answered():
    outside = FakeOutside()
    rules = Rules(2, 1, 8)
    before = view(3, "a", "b", "c")
    member = Membership(
        before.members[0], rules, Limits(), outside, before, replace(first_plan(before.members[0], rules))
    )
    member.coordination.mute = {"c"}
    member.coordination.tick(set(), set())
    member.coordination.give_up()
    assert ("b", "release") in [(node, message["kind"]) for node, message in outside.sent]


def test_a_state_that_a_broken_link_may_have_lost_is_sent_again():
    outside = FakeOutside()
    rules = Rules(2, 1, 8)
    before = view(3, "a", "b")
    plan = replace(first_plan(before.members[0], rules), members=before.members, newcomers=("b",))
    member = Membership(before.members[0], rules, Limits(), outside, before, plan)
    member.newcomers.serve(7, b"state")
    member.begin()
    member.on_link("b")
    sent = [(node, message["step"]) for node, message in outside.sent if message["kind"] == "snapshot"]
    assert sent == [("b", 7), ("b", 7)]
