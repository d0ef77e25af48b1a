"""A base whose own numbers are not those of our passes is refused before training, at every ZeRO stage."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from ptune_dist.run.base_check import ordinary_ids
from ptune_dist.tiny.make import build_tokenizer
from tests.architectures.bases import build_base
from tests.architectures.runs import write_run
from tests.commands import run_module
from tests.processes import ROOT
from tests.run.strange_bases import STRANGE, build_strange

pytestmark = pytest.mark.long

INFIX = "prompt.placement=infix"
KEYS = "prompt.method=prefix_tuning"
UNCHECKED = "model.check=false"
NUM_RANKS = 2
RIGHT = {
    "gpt2": [[], [INFIX]],
    "gemma2": [[], [INFIX]],
    "gemma3_text": [[INFIX]],
    "mistral": [[], [KEYS]],  # a sliding window, and heads that share keys
    "exaone4": [[INFIX]],  # layers with and without a window
    "bloom": [[], [INFIX]],
    "moshi": [[]],  # names a window that nothing reads
    "bert-generation": [[]],  # a decoder by its settings
    "t5": [[], ["prompt.placement=decoder"]],
    "bart": [[]],
    "bert": [[]],
    "llama": [
        [INFIX],
        ["model.quantization=int8"],
        ["model.dtype=bfloat16"],
        ["train.objective=mse", "data.target={{ text | length }}"],
    ],
}
FAMILIES = dict.fromkeys(RIGHT, "causal") | {"t5": "seq2seq", "bart": "seq2seq", "bert": "encoder"}
WRONG = {
    "by_ids": r"by_ids models need .* an output is [\d.]+ in ptune-dist.s pass and [\d.]+ in its own .*check=false",
    "leaky": r"leaky models need .* an output is ",
    "failing": r"failing models do not compute .*: AssertionError: a mask of two dimensions$",
}
HALF = "model.dtype=bfloat16"
CASES = {f"{kind} {' '.join(given)}".strip(): (kind, given) for kind, many in RIGHT.items() for given in many}
CASES |= {kind: (kind, []) for kind in WRONG}
CASES |= {f"{kind} unchecked": (kind, [UNCHECKED]) for kind in WRONG}
CASES |= {f"{kind} in half": (kind, [HALF]) for kind in ("far", "slight")}
CASES |= {"by_ids in half": ("by_ids", [HALF]), "deepseek_v3 keys": ("deepseek_v3", [KEYS])}
CASES |= {"jetmoe keys": ("jetmoe", [KEYS])}
ALSO_WHOLE = ["gpt2", f"exaone4 {INFIX}", "t5", "bert", "llama model.quantization=int8", f"llama {HALF}", *WRONG]
BY_STAGE = {0: ALSO_WHOLE, 3: list(CASES)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[str]]]:
    """For each ZeRO stage what each rank found of each of CASES."""
    out = tmp_path_factory.mktemp("check")
    specs = []
    for stage, cases in BY_STAGE.items():
        for number, (kind, given) in enumerate(CASES[case] for case in cases):
            folder = out / kind
            family = FAMILIES.get(kind, "causal")
            if not folder.exists():
                build_strange(kind, folder) if kind in STRANGE else build_base(kind, family, folder)
            zero = {"zero_optimization": {"stage": stage}}
            file = write_run(folder, family, f"{stage}-{number}", deepspeed=zero)
            specs.append([str(file), given])
    (out / "specs.json").write_text(json.dumps(specs))
    script = str(ROOT / "tests" / "run" / "check_many.py")
    done = run_module(script, str(out / "specs.json"), str(out), num_ranks=NUM_RANKS)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    ranks = [json.loads(Path(out, f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]
    by_case = iter([list(lines) for lines in zip(*ranks, strict=True)])
    return {stage: {case: next(by_case) for case in cases} for stage, cases in BY_STAGE.items()}


def test_ids_stand_for_text_also_where_a_base_has_several_ends() -> None:
    tokenizer: Any = SimpleNamespace(tokenizer=build_tokenizer())
    ids = ordinary_ids(tokenizer, LlamaConfig(eos_token_id=[0, 5], pad_token_id=1), 8)
    assert ids.tolist() == [2, 3, 4, 6, 7]  # 0 and 1 are the tokenizer's


@pytest.mark.parametrize("stage", [0, 3])
def test_bases_that_compute_the_same_are_taken_and_left_as_they_are(found, stage: int) -> None:
    right = [name for name in BY_STAGE[stage] if CASES[name][0] in RIGHT]
    assert {name: found[stage][name] for name in right} == dict.fromkeys(right, ["nothing changed"] * NUM_RANKS)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("kind", WRONG)
def test_others_are_refused_in_one_line(found, stage: int, kind: str) -> None:
    for line in found[stage][kind]:
        assert re.search(WRONG[kind], line) and "\n" not in line, line


@pytest.mark.parametrize("kind", WRONG)
def test_unless_the_check_is_off(found, kind: str) -> None:
    assert found[3][f"{kind} unchecked"] == ["not checked"] * NUM_RANKS


def test_a_small_difference_is_found_in_half_precision_too(found) -> None:
    for line in found[3]["by_ids in half"]:
        assert re.search(WRONG["by_ids"], line), line
    for line in found[3]["slight in half"]:
        assert re.search(r"an output is .* and the .* is [\d.e-]+, where rounding explains ", line), line


def test_what_begins_after_some_tens_of_positions_is_found(found) -> None:
    for line in found[3]["far in half"]:
        assert "far models need something that they are not given here: an output is " in line


def test_a_prefix_of_other_sizes_than_a_bases_keys_and_values_is_refused(found) -> None:
    wanted = r"prompt.method: prefix_tuning has keys and values of 2 layers x .*, and jetmoe models keep 2 layers x "
    for line in found[3]["jetmoe keys"]:
        assert re.search(wanted, line), line


def test_a_prefix_of_keys_and_values_of_unequal_width_is_taken(found) -> None:
    assert found[3]["deepseek_v3 keys"] == ["nothing changed"] * NUM_RANKS
