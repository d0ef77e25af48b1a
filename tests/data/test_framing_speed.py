"""The backend of a tokenizer is asked directly where its class leaves the ids to it, and only there."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ptune_dist.data.framing import is_plain, tokenize
from tests.processes import ROOT

TEXTS = ["Some words, and 12 more.", "", " ünïcode \U0001f600\n\n", "<eos> text <pad>", "x" * 300, "Some words"]


@pytest.mark.parametrize("folder", ["configs/tiny/causal", "configs/shapes/llama_40m"])
@pytest.mark.parametrize("splits", [False, True])
def test_ids_are_those_of_the_tokenizer(folder, splits):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / folder)
    tokenizer.split_special_tokens = splits
    tokenizer(["a", "b b"], padding=True, truncation=True, max_length=1)  # options that it keeps until the next call
    specials = [f"{name} a {name}" for name in tokenizer.all_special_tokens]
    texts = [*TEXTS, *specials, *TEXTS, *TEXTS]
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    tokenizer(["a", "b b"], padding=True, truncation=True, max_length=1)
    assert tokenize(tokenizer, texts) == wanted
    tokenizer(["a", "b b"], padding=True, truncation=True, max_length=1)
    assert tokenize(tokenizer, TEXTS) == wanted[: len(TEXTS)]
    assert is_plain(type(tokenizer))


def test_a_class_that_makes_other_ids_is_asked_itself():
    class Shouting(PreTrainedTokenizerFast):
        def __call__(self, text, **options):
            return super().__call__([one.upper() for one in text], **options)

    tokenizer = Shouting.from_pretrained(ROOT / "configs/tiny/causal")
    assert not is_plain(Shouting)
    assert tokenize(tokenizer, ["ab", "cd", "ab c"]) == tokenize(tokenizer, ["AB", "CD", "AB C"])
