"""A target continues its input: no space that is not there (transformers#26273), and what `validate` says of seams."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ptune_dist.data.framing import TextTargets, puts_space, tokenize, tokenize_continuations
from ptune_dist.evaluation.seam import advise
from tests.conftest import TINY

PIECES = ["<unk>", "</s>", "▁positive", "positive", "▁Sentiment", ":", "▁", "\n", *"aeiopstv"]


@pytest.fixture(scope="module")
def with_space() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space before every text."""
    backend = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(PIECES)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize(
    "text, wanted",
    [("positive", ["positive"]), (" positive", ["▁positive"]), ("\npositive", ["\n", "positive"])],
)
def test_a_continuation_has_no_space_of_its_own(with_space, text, wanted):
    (ids,) = tokenize_continuations(with_space, [text])
    assert with_space.convert_ids_to_tokens(ids) == wanted
    (target,) = TextTargets(with_space).encode([text], str, "data.target")
    assert target.ids == [*ids, with_space.eos_token_id]
    (before,) = tokenize(with_space, ["Sentiment:"])
    assert with_space.decode(before + ids) == f"Sentiment:{text}"


def test_a_target_that_is_a_text_of_its_own_begins_as_any_text(with_space):
    (target,) = TextTargets(with_space, append_eos=False, starts=True).encode(["positive"], str, "data.target")
    assert with_space.convert_ids_to_tokens(target.ids) == ["▁positive"]


def test_other_tokenizers_split_a_continuation_as_any_text():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "causal")
    texts = ["positive", " positive", "\nx"]
    assert not puts_space(tokenizer)
    assert tokenize_continuations(tokenizer, texts) == tokenize(tokenizer, texts)


def test_the_advice_names_what_to_move():
    assert advise("Answer: ", "yes") == "move the space at the end of data.template to the beginning of data.target"
    assert advise("Answer", "yes").startswith("end data.template, or begin data.target, with a space")
