"""The ten commonest architectures of each family: losses are the plain model's, and a few go through all commands."""

import json
from pathlib import Path

import pytest
from transformers.utils import logging

from ptune_dist.base.source import load_shape
from ptune_dist.families.find import find_family
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
TRAINED = [("causal", "mamba2"), ("causal", "phimoe"), ("seq2seq", "bart"), ("encoder", "roberta")]


@pytest.mark.parametrize(("family", "kind"), ROWS)
def test_losses_are_the_plain_models(family: str, kind: str, tmp_path: Path) -> None:
    logging.disable_progress_bar()
    compare_loss(build_base(kind, family, tmp_path), family)


@pytest.mark.parametrize(("family", "kind"), TRAINED)
def test_all_commands_work(family: str, kind: str, tmp_path: Path) -> None:
    build_base(kind, family, tmp_path)
    own = find_family(load_shape(str(tmp_path)), "auto", str(tmp_path)).name
    for check in checks_of(own).values():
        check(tmp_path, own)


def test_the_docs_have_every_architecture() -> None:
    """A newer transformers has more of them: the survey is run again."""
    rows = json.loads((ROOT / "docs" / "bases.json").read_text(encoding="utf-8"))["rows"]
    found = {(row["family"], row["kind"]) for row in rows}
    missing = [kind for family, names in kinds().items() for kind in names if (family, kind) not in found]
    assert not missing, f"run python -m tests.architectures: docs/bases.json lacks {missing}"
