"""Thousands of histories of simulated nodes: steps agree, views form one chain, and training always gets ahead."""

import pytest

from ptune_dist.nodes.turns import ViewRecord
from tests.nodes.simulation import NUM_BLOCKS, Node, World, add, hashed


def train_alone(num_steps: int) -> list[bytes]:
    def total(step: int, lo: int, hi: int, state: bytes) -> bytes:
        if hi - lo == 1:
            return hashed(step, lo, state)
        middle = (lo + hi) // 2
        return add(total(step, lo, middle, state), total(step, middle, hi, state))

    state = b""
    states = []
    for step in range(1, num_steps + 1):
        state = hashed(state, total(step, 0, NUM_BLOCKS, state))
        states.append(state)
    return states


def disturb(world: World) -> None:
    """One random event, and the next one later."""
    choose = world.random
    living = world.living()
    if not living:
        living = [world.start()]
    training: list[Node] = [node for node in living if node.member]
    event = choose.choice(("kill", "kill two", "join", "join", "leave", "pause", "stall", "cut one", "cut a pair"))
    node = choose.choice(living)
    if event in ("kill", "kill two") and len(training) > 2:
        for lost in choose.sample(training, min(len(training) - 1, 1 if event == "kill" else 2)):
            world.at(choose.choice((0.0, 0.01, 0.1, 0.5)), lost.kill)
    elif event == "join" and len(living) < 7:
        world.start()
    elif event == "leave" and len(training) > 2:
        node.is_leaving = True
    elif event in ("pause", "stall"):
        node.stopped_until = world.now + (choose.uniform(0, 2) if event == "pause" else choose.uniform(3, 9))
    elif event in ("cut one", "cut a pair"):
        others = [other.name for other in living if other is not node]
        others = choose.sample(others, 1) if event == "cut a pair" and others else others
        pairs = {frozenset((node.name, other)) for other in others}
        world.cuts |= pairs
        # Often about as long as it takes to suspect a node: then what was held arrives while the view changes.
        seconds = choose.choice((choose.uniform(0.5, 10), choose.uniform(4.0, 5.5)))
        world.at(seconds, lambda: world.cuts.difference_update(pairs))
    world.lines.append(f"{world.now:.2f} {event} {node.own.id}")
    world.at(choose.choice((0.05, 0.5, 2.0, 8.0)), lambda: disturb(world))


def play(seed: int, num_steps: int, **options) -> World:
    world = World(seed, num_steps, **options)
    for _ in range(world.random.randint(1, 5)):
        world.start()
    world.at(world.random.uniform(0, 3), lambda: disturb(world))
    world.run_until(lambda: world.num_steps in world.states, seconds=num_steps * 20.0)
    assert not any("another state" in line for line in world.lines), "two members of a view had different states"
    return world


def check_history(seed: int, has_rounding: bool) -> None:
    """With rounding, whoever takes part in the last step, or is given its result later, has the same bits."""
    world = play(seed, num_steps=60, has_rounding=has_rounding)
    if has_rounding:
        assert len(world.states[60]) == 1
    else:
        assert [world.states[step] for step in range(1, 61)] == [{state} for state in train_alone(60)]


@pytest.mark.parametrize("seed", range(8))
def test_every_history_gives_what_one_node_computes(seed):
    check_history(seed, has_rounding=False)


@pytest.mark.parametrize("seed", range(1000, 1008))
def test_nodes_that_round_differently_agree_with_each_other(seed):
    check_history(seed, has_rounding=True)


def test_a_newcomer_whose_donor_is_lost_in_its_first_turn_continues_alone():
    world = World(seed=0, num_steps=20)
    first = world.start()
    world.run_until(lambda: 3 in world.states, seconds=60)
    newcomer = world.start()
    world.run_until(lambda: bool(newcomer.member), seconds=60)
    assert newcomer.member.plan.newcomers == (newcomer.own.id,)
    first.kill()
    world.run_until(lambda: world.num_steps in world.states, seconds=60)
    assert [world.states[step] for step in range(1, 21)] == [{state} for state in train_alone(20)]


def start_two(world: World) -> list[Node]:
    nodes = [world.start(), world.start()]
    world.run_until(lambda: all(node.member and 3 in world.states for node in nodes), seconds=60)
    return nodes


def test_a_newcomer_whose_donor_is_lost_before_it_sends_its_state_joins_all_the_same():
    world = World(seed=0, num_steps=200)
    nodes = start_two(world)
    newcomer = world.start()
    world.run_until(lambda: newcomer.own.id in newest(world).ids, seconds=60)
    (donor,) = [node for node in nodes if node.own.id == newest(world).ids[0]]
    assert newcomer.candidate and not newcomer.candidate.snapshot
    donor.kill()
    world.run_until(lambda: bool(newcomer.member), seconds=30)
    assert newcomer.num_entered == 1


def test_a_newcomer_without_a_state_is_not_waited_for_as_leader():
    """It is the first that is left when the donor of two newcomers is lost and only the second has a state."""
    world = World(seed=0, num_steps=200)
    donor = world.start()
    world.run_until(lambda: 3 in world.states, seconds=60)
    first, second = world.start(), world.start()
    world.run_until(lambda: {first.own.id, second.own.id} < set(newest(world).ids), seconds=60)
    if newest(world).ids.index(first.own.id) > newest(world).ids.index(second.own.id):
        first, second = second, first
    first.stopped_until = world.now + 2.0
    world.run_until(lambda: bool(second.member), seconds=60)
    assert first.candidate and not first.candidate.snapshot
    donor.kill()
    last = max(world.states)
    world.run_until(lambda: last + 3 in world.states, seconds=20)
    world.run_until(lambda: bool(first.member), seconds=20)


def newest(world: World) -> ViewRecord:
    return world.register[len(world.register)]


@pytest.mark.extended
@pytest.mark.parametrize("has_rounding", [False, True])
def test_many_histories(has_rounding):
    for seed in range(2000, 2300):
        check_history(seed, has_rounding)
