"""Where the virtual tokens start: each `prompt.init`, a function of the seed alone."""

import pytest
import torch
from safetensors.torch import save_file

from ptune_dist.errors import UserError
from ptune_dist.prompts.start import Start
from ptune_dist.prompts.store import save_prompt
from ptune_dist.tiny.make import build_tokenizer

WIDTH = 16
TOKENIZER = build_tokenizer()
EMBEDDINGS = torch.randn(len(TOKENIZER), WIDTH, generator=torch.Generator().manual_seed(1))


def build(init: str, num: int = 6, seed: int = 0, data_labels=None, tokenizer=TOKENIZER, **given) -> torch.Tensor:
    start = Start(
        kind=init,
        seed=seed,
        tokenizer=tokenizer,
        lookup=lambda ids: EMBEDDINGS[torch.tensor(ids)],
        text=given.get("text"),
        labels=given.get("labels") or data_labels,
        file=given.get("file"),
    )
    return start.vectors(num, WIDTH)


def ids_of(vectors: torch.Tensor) -> list[int]:
    """The token of each vector; -1 for what is no token's embedding."""
    same = (vectors[:, None] == EMBEDDINGS).all(dim=2)
    return [int(row.nonzero()[0]) if row.any() else -1 for row in same]


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def error_of(init: str, **given) -> str:
    with pytest.raises(UserError) as caught:
        build(init, **given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("init, given", [("random", {}), ("vocab", {}), ("labels", {"labels": ["yes", "no"]})])
def test_the_start_depends_on_the_seed_and_on_nothing_else(init, given):
    first = build(init, **given)
    torch.manual_seed(1234)
    torch.randn(5)
    assert torch.equal(build(init, **given), first)
    assert not torch.equal(build(init, seed=1, **given), first)
    assert first.shape == (6, WIDTH) and first.dtype == torch.float32


def test_random_is_uniform_within_a_half_as_in_the_paper():
    vectors = build("random", num=2000)
    assert vectors.min() >= -0.5 and vectors.max() < 0.5
    assert abs(vectors.mean()) < 0.01 and abs(vectors.std() - 12**-0.5) < 0.01


def test_vocab_draws_different_tokens_and_no_special_one():
    ids = ids_of(build("vocab", num=200))
    assert len(set(ids)) == 200 and not {-1, *TOKENIZER.all_special_ids} & set(ids)


def test_vocab_repeats_tokens_only_where_there_are_too_few():
    ids = ids_of(build("vocab", num=len(TOKENIZER) + 50))
    assert len(ids) == len(TOKENIZER) + 50 and -1 not in ids


@pytest.mark.parametrize("num", [2, 5, 6, 12, 13])
def test_text_is_repeated_or_cut_to_the_number_of_virtual_tokens(num):
    ids = encode("upper")
    assert ids_of(build("text", num=num, text="upper")) == (ids * 3)[:num]


def test_text_without_tokens_is_refused():
    assert "prompt.init_text" in error_of("text", text="")


def test_labels_start_at_their_mean_embedding_and_the_rest_from_the_vocabulary():
    vectors = build("labels", num=5, labels=["yes", "n"])
    torch.testing.assert_close(vectors[0], EMBEDDINGS[encode("yes")].mean(dim=0))
    assert ids_of(vectors)[1] == encode("n")[0]
    assert -1 not in ids_of(vectors[2:])


def test_as_many_labels_as_virtual_tokens_leave_nothing_to_draw():
    assert ids_of(build("labels", num=2, labels=["a", "b"])) == [*encode("a"), *encode("b")]


def test_the_data_labels_serve_where_the_prompt_names_none():
    assert torch.equal(build("labels", data_labels=["yes"]), build("labels", labels=["yes"]))


def test_more_labels_than_virtual_tokens_and_labels_without_tokens_are_refused():
    assert "prompt.num_virtual_tokens is 1 but there are 2 labels" in error_of("labels", num=1, labels=["a", "b"])
    assert "''" in error_of("labels", labels=["a", ""])


def test_a_file_may_be_a_run_a_prompt_folder_a_peft_adapter_or_a_tensor_file(tmp_path):
    vectors = torch.randn(6, WIDTH)
    save_prompt(tmp_path / "run" / "prompt", {"virtual_tokens": vectors}, {})
    (tmp_path / "adapter").mkdir()
    save_file({"prompt_embeddings": vectors}, tmp_path / "adapter" / "adapter_model.safetensors")
    save_file({"virtual_tokens": vectors.to(torch.bfloat16)}, tmp_path / "half.safetensors")
    for name in ("run", "run/prompt", "run/prompt/prompt.safetensors", "adapter"):
        assert torch.equal(build("file", file=str(tmp_path / name)), vectors)
    half = build("file", file=str(tmp_path / "half.safetensors"))
    assert half.dtype == torch.float32 and torch.equal(half, vectors.to(torch.bfloat16).float())


@pytest.mark.parametrize("shape", [(5, WIDTH), (6, WIDTH + 1), (6,)])
def test_a_file_of_another_shape_is_refused_with_both_shapes(tmp_path, shape):
    save_file({"virtual_tokens": torch.zeros(shape)}, tmp_path / "a.safetensors")
    message = error_of("file", file=str(tmp_path / "a.safetensors"))
    assert "prompt.init_file" in message and str(shape) in message and str((6, WIDTH)) in message


def test_a_file_without_virtual_tokens_or_that_cannot_be_read_is_named(tmp_path):
    save_file({"lora_A": torch.zeros(1)}, tmp_path / "lora.safetensors")
    assert "lora_A" in error_of("file", file=str(tmp_path / "lora.safetensors"))
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name in ("text.safetensors", "missing", "empty"):
        message = error_of("file", file=str(tmp_path / name))
        assert message.startswith("prompt.init_file: ") and str(tmp_path / name) in message
