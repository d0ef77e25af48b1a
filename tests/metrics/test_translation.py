"""Translation metrics have the values that sacrebleu's documentation shows for its example."""

import pytest
import sacrebleu

from ptune_dist.metrics import METRICS

# The example of sacrebleu's README, there as two streams of references.
ANSWERS = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


def test_bleu_is_sacrebleu_s():
    assert METRICS["bleu"].compute(ANSWERS, REFERENCES) == pytest.approx(48.530827009929865)


def test_chrf_is_sacrebleu_s():
    assert METRICS["chrf"].compute(ANSWERS, REFERENCES) == pytest.approx(59.73, abs=0.005)
    expected = f"nrefs:2|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{sacrebleu.__version__}"
    assert METRICS["chrf"].signature(REFERENCES) == expected


def test_the_signature_tells_how_bleu_was_computed():
    version = f"version:{sacrebleu.__version__}"
    assert METRICS["bleu"].signature(REFERENCES) == f"nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|{version}"
    uneven = [REFERENCES[0], REFERENCES[1], REFERENCES[2][:1]]
    assert METRICS["bleu"].signature(uneven) == f"nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|{version}"


def test_rows_may_have_different_numbers_of_references():
    uneven = [REFERENCES[0], REFERENCES[1], REFERENCES[2][:1]]
    padded = [[row[number] if number < len(row) else None for row in uneven] for number in range(2)]
    expected = sacrebleu.corpus_bleu(ANSWERS, padded).score
    assert METRICS["bleu"].compute(ANSWERS, uneven) == expected != METRICS["bleu"].compute(ANSWERS, REFERENCES)


def test_texts_that_look_tokenized_are_no_reason_for_a_warning(caplog):
    answers = ["This is how it works ."] * 200  # sacrebleu warns where 100 lines end like this
    assert METRICS["bleu"].compute(answers, [[answer] for answer in answers]) == pytest.approx(100)
    assert not caplog.records
