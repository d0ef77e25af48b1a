"""The ten commonest architectures of each family: losses are the plain model's, and a few go through all commands.

The others go through all commands in the extended tests.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from ptune_dist.base.source import load_shape
from ptune_dist.errors import UserError
from ptune_dist.families.find import find_family
from tests.architectures.__main__ import survey_row
from tests.architectures.bases import build_base, kinds
from tests.architectures.checks import compare_loss
from tests.architectures.runs import checks_of
from tests.processes import ROOT

COMMONEST = {
    "causal": "llama qwen2 qwen3 mistral gemma2 gemma3_text gpt2 phi3 mixtral qwen3_moe".split(),
    "seq2seq": "t5 mt5 bart mbart pegasus marian m2m_100 led blenderbot longt5".split(),
    "encoder": "bert roberta distilbert xlm-roberta albert electra deberta-v2 modernbert mpnet camembert".split(),
}
ROWS = [(family, kind) for family, names in COMMONEST.items() for kind in names]
TRAINED = [("causal", "mamba2"), ("seq2seq", "bart"), ("encoder", "roberta")]
REFUSED = {"mamba2": ("contexts", "prefix_tuning")}  # it keeps a state instead of keys and values
OTHERS = [(family, kind) for family, names in kinds().items() for kind in names if (family, kind) not in ROWS + TRAINED]


@pytest.mark.parametrize(("family", "kind"), ROWS)
def test_losses_are_the_plain_models(family: str, kind: str, tmp_path: Path) -> None:
    logging.disable_progress_bar()
    compare_loss(build_base(kind, family, tmp_path), family)


@pytest.mark.parametrize(("family", "kind"), TRAINED)
def test_all_commands_work(family: str, kind: str, tmp_path: Path) -> None:
    build_base(kind, family, tmp_path)
    own = find_family(load_shape(str(tmp_path)), "auto", str(tmp_path)).name
    for name, check in checks_of(own).items():
        if name in REFUSED.get(kind, ()):
            with pytest.raises(UserError):
                check(tmp_path, own)
        else:
            check(tmp_path, own)


@pytest.mark.extended
@pytest.mark.parametrize(("family", "kind"), OTHERS)
def test_others_work_or_are_refused(family: str, kind: str, tmp_path: Path) -> None:
    row = survey_row(kind, family, tmp_path)
    failed = {name: found["line"] for name, found in row.items() if name != "base" and is_failure(found)}
    assert not failed


def is_failure(found: Any) -> bool:
    return isinstance(found, dict) and found["result"] == "fails"


def test_the_docs_have_every_architecture() -> None:
    """A newer transformers has more of them: the survey is run again."""
    rows = json.loads((ROOT / "docs" / "bases.json").read_text(encoding="utf-8"))["rows"]
    found = {(row["family"], row["kind"]) for row in rows}
    missing = [kind for family, names in kinds().items() for kind in names if (family, kind) not in found]
    assert not missing, f"run python -m tests.architectures: docs/bases.json lacks {missing}"


def test_the_docs_have_no_failure() -> None:
    rows = json.loads((ROOT / "docs" / "bases.json").read_text(encoding="utf-8"))["rows"]
    assert [row["kind"] for row in rows for name, found in row.items() if name != "base" and is_failure(found)] == []
