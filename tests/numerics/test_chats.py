"""Chats end to end: the loss of a run is a plain loop's cross entropy over exactly the assistant's turns."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.conftest import build_tiny_base
from tests.numerics.methods import write_run
from tests.numerics.plain import NUM_VIRTUAL, initial_vectors, load_plain, pad, run_loop, with_prompt
from tests.numerics.test_curves import curve, train_all
from tests.numerics.test_families import write_rows

# SmolLM2-Instruct's own template, with its default system prompt.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
START, END = "<|im_start|>", "<|im_end|>"
SYSTEM = "Be short."
STEPS = 3
ASKED = ["one", "and two?", "three, please"]


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


CHATS = [turns("one", "ONE", "and two?", "TWO it is"), turns("three", "THREE"), turns("a", "A", "b", "B", "c", "C")]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny Llama whose tokenizer has the template and its markers."""
    folder = build_tiny_base("llama", tmp_path_factory.mktemp("base"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.add_special_tokens({"additional_special_tokens": [START, END]}) == 2
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def between_markers(ids: list[int], opening: list[int], end: int) -> list[int]:
    """Labels: the ids after each `opening` up to the next `end`, which is one of them, and -100 elsewhere."""
    labels = [-100] * len(ids)
    for start in range(len(opening), len(ids)):
        if ids[start - len(opening) : start] == opening:
            stop = ids.index(end, start) + 1
            labels[start:stop] = ids[start:stop]
    return labels


def plain_losses(base: Path, chats: list[list[dict[str, str]]]) -> list[float]:
    """Of whole conversations, each in one pass."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_plain(base)
    prompt = torch.nn.Parameter(initial_vectors(model.get_input_embeddings().embedding_dim))
    opening = tokenizer.encode(f"{START}assistant\n", add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids(END)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    coded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    labels = [between_markers(ids, opening, end) for ids in coded]
    answers = [turn["content"] for chat in chats for turn in chat if turn["role"] == "assistant"]
    kept = [i for own in labels for i in own if i != -100]
    assert tokenizer.decode(kept) == "".join(answer + END for answer in answers)

    def loss_of(ids, mask, labels):
        logits = model(**with_prompt(model, prompt, ids, mask)).logits[:, NUM_VIRTUAL - 1 : -1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    batch = (pad(coded, 1), pad([[1] * len(ids) for ids in coded], 0), pad(labels, -100))
    return run_loop([prompt], loss_of, [batch] * STEPS, num_steps=STEPS)


@pytest.mark.long
def test_the_loss_is_over_the_turns_of_the_assistant(base, tmp_path):
    talks = write_rows(tmp_path / "talks.jsonl", [{"talk": chat} for chat in CHATS])
    asked = write_rows(tmp_path / "asked.jsonl", [{"q": text} for text in ASKED])
    data = {
        "messages": {"train": str(talks), "messages": "talk", "template": None, "target": None},
        "wrapped": {"train": str(asked), "template": "{{ q }}", "target": "{{ q | upper }}", "chat": True}
        | {"system": SYSTEM},
    }
    start = {"virtual_tokens": initial_vectors(32)}
    specs = [
        write_run(
            tmp_path, name, base, {}, start, data=own | {"max_length": 512}, train={"max_steps": STEPS, "batch_size": 3}
        )
        for name, own in data.items()
    ]
    runs = train_all(specs, tmp_path, num_ranks=1)
    wrapped = [[{"role": "system", "content": SYSTEM}, *turns(text, text.upper())] for text in ASKED]
    for name, chats in {"messages": CHATS, "wrapped": wrapped}.items():
        assert curve(runs[name]) == pytest.approx(plain_losses(base, chats), rel=1e-5), name
