"""Invariant 5: a member of a sweep ends where it would alone, for every placement, stage and world size."""

import pytest
from transformers import AutoModelForCausalLM

from ptune_dist.run.metrics_log import read_metrics
from tests.numerics.banks import (
    NUM_STEPS,
    assert_ends_as_alone,
    read_json,
    train_all,
    write_alone,
    write_bank,
    write_rows,
)
from tests.numerics.test_curves import zero_json

pytestmark = pytest.mark.long

# Members that differ in all that a member's own optimizer, clipping, schedule and order of rows make of it.
MIXED = [
    {"train.learning_rate": 0.1},
    {"seed": 1, "prompt.num_virtual_tokens": 7},
    {"train.schedule": "cosine", "train.weight_decay": 0.1},
    {"train.max_grad_norm": 0.05, "prompt.init": "text", "prompt.init_text": "Upper case"},
    {"train.optimizer": "sgd", "train.momentum": 0.9, "train.warmup_steps": 3, "train.learning_rate": 0.02},
]
GRID = {"train.learning_rate": [0.02, 0.1], "seed": [0, 1]}
CACHED, FEW = {"context_cache_gib": 0.01}, {"batch_size": 2, "micro_batch_tokens": 30}
KINDS = ["prefix", "infix", "tasks", "decoder", "markers", "bloom_markers"]
JUDGED = {"every": 4, "metrics": ["loss", "perplexity"], "num_samples": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("banks")
    write_rows(made)
    return made


def tasks_of(folder) -> list[dict]:
    """Members that read different files, through different templates."""
    other = {"data.template": "How long is {{ noun }}?", "data.target": " {{ size }}"}
    return [
        {"data.train": str(folder / "train.jsonl")},
        {"data.train": str(folder / "other.jsonl"), **other},
        {"data.train": str(folder / "other.jsonl"), **other, "seed": 3, "prompt.num_virtual_tokens": 6},
    ]


# Members whose rows have no context, or whose rows are nothing but: a rank may have contexts to read and another none.
MARKERS = [
    {"data.template": "{{ prompt }}{{ word }} ="},
    {"data.template": "Say: {{ word }}{{ prompt }}"},
    {"data.template": "Say: {{ word if word | length > 5 else '' }}{{ prompt }}"},
    {"data.template": "{{ word if word | length > 5 else '' }}{{ prompt }}"},
]


@pytest.fixture(scope="module")
def alone(tiny_bases, folder) -> dict:
    """For each kind of bank, its members' runs alone, on one rank at ZeRO 0; and the bank at ZeRO 0 on one rank."""
    judged = {"data": {"validation": str(folder / "held_out.jsonl")}, "evaluate": JUDGED}
    marked = {"data": {"template": MARKERS[0]["data.template"]}}
    kinds = {
        "prefix": write_bank(folder, "prefix", tiny_bases["llama"], MIXED, "prefix", **judged),
        "infix": write_bank(folder, "infix", tiny_bases["llama"], MIXED, train=CACHED, **judged),
        "tasks": write_bank(folder, "tasks", tiny_bases["gpt2"], tasks_of(folder), train=CACHED),
        "decoder": write_bank(folder, "decoder", tiny_bases["t5"], GRID, "decoder", train=CACHED),
        "markers": write_bank(
            folder, "markers", tiny_bases["llama"], MARKERS, "template", train=CACHED | FEW, **marked
        ),
        "bloom_markers": write_bank(
            folder, "bloom_markers", tiny_bases["bloom"], MARKERS, "template", train=FEW, **marked
        ),
    }
    found = {name: write_alone(config) for name, config in kinds.items()}
    train_all([one for members in found.values() for one in members.values()] + list(kinds.values()), folder)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_member_of_a_bank_ends_where_it_would_have_ended_alone(alone, folder, kind):
    assert_ends_as_alone(folder / kind, alone[kind])
    losses = [tuple(line["loss"] for line in read_metrics(config.parent)) for config in alone[kind].values()]
    assert len(set(losses)) == len(losses) >= 3  # no two members are alike


# Members that differ in their optimizers, that read different files, that have no contexts; and the other family.
@pytest.mark.parametrize(
    "banks",
    [
        [("infix", 3)],
        pytest.param(
            [("tasks", 3), ("bloom_markers", 3), ("decoder", 3), ("prefix", 3), ("infix", 2), ("markers", 3)],
            marks=pytest.mark.extended,
        ),
    ],
    ids=["one", "others"],
)
def test_the_same_holds_at_other_stages_on_two_ranks(alone, folder, tiny_bases, banks):
    again = []
    for kind, stage in banks:
        base = {"tasks": "gpt2", "decoder": "t5", "bloom_markers": "bloom"}.get(kind, "llama")
        again.append((kind, write_bank_again(folder, kind, f"{kind}-zero{stage}-2", tiny_bases[base], stage)))
    train_all([config for _, config in again], folder, num_ranks=2)
    for kind, config in again:
        assert_ends_as_alone(folder / config.stem, alone[kind])
        rates = [line.get("context_hit_rate") for line in read_metrics(folder / config.stem)]
        assert (rates[-1] is not None) == (kind in ("infix", "tasks", "decoder", "markers"))


def write_bank_again(folder, kind: str, name: str, base, stage: int):
    """The bank of a kind at another stage, in a folder of its own."""
    content = read_json(folder / f"{kind}.json")
    overrides = {key: content[key] for key in ("data", "train", "evaluate") if key in content}
    placement = content["prompt"]["placement"]
    return write_bank(folder, name, base, content["sweep"], placement, deepspeed=zero_json(stage), **overrides)


def test_a_banks_own_files_hold_a_ranking_and_everything_of_each_member(alone, folder):
    run = folder / "infix"
    summary, lines = read_json(run / "summary.json"), read_metrics(run)
    names = list(alone["infix"])
    assert sorted(line["member"] for line in summary["ranking"]) == sorted(names)
    losses = [line["validation"]["loss"] for line in summary["ranking"]]
    assert losses == sorted(losses) and summary["validation"]["loss"] == losses[0]
    assert [line["num_members"] for line in lines] == [len(names)] * NUM_STEPS
    own = [read_metrics(run / "members" / name) for name in names]
    for step, line in enumerate(lines):
        for key in ("loss", "learning_rate", "grad_norm"):
            assert line[key] == pytest.approx(sum(lines_of[step][key] for lines_of in own) / len(own))
    for name in names:
        member = run / "members" / name
        assert {path.name for path in member.iterdir()} >= {"config.yaml", "metrics.jsonl", "prompt", "summary.json"}
    assert not (run / "prompt").exists()


def test_the_base_of_these_tests_has_grouped_heads(tiny_bases):
    config = AutoModelForCausalLM.from_pretrained(tiny_bases["llama"]).config
    assert config.num_key_value_heads < config.num_attention_heads
