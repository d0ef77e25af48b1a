"""Prompts as tokens: plain transformers, with the exported folder, computes what it does with the vectors."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedModel, pipeline

from ptune_dist.data.chat import Chat
from ptune_dist.errors import UserError
from ptune_dist.export.tokenizer import set_system
from ptune_dist.export.weights import count_tokens
from tests.conftest import ARCHITECTURES, ENCODERS, LABELS, SEQ2SEQ
from tests.export.trained import NUM_VIRTUAL, draw, export, family_of, write_trained
from tests.numerics.plain import load_plain
from tests.numerics.test_families import starting_head

TEXT = "a held ="
V = 272  # of the tiny bases


def logits_of(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    more = {"decoder_input_ids": torch.tensor([[1, 40, 50]])} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(**inputs, **more).logits


def embed(base: PreTrainedModel, *parts: torch.Tensor | list[int]) -> torch.Tensor:
    """[1, T, D] of vectors and token ids."""
    lookup = base.get_input_embeddings()
    with torch.no_grad():
        vectors = [part if isinstance(part, torch.Tensor) else lookup(torch.tensor(part)) for part in parts]
    return torch.cat(vectors)[None]


def load(folder: Path, kind: str = "llama") -> SimpleNamespace:
    return SimpleNamespace(
        model=load_plain(folder, family_of(kind), {}), tokenizer=AutoTokenizer.from_pretrained(folder)
    )


def check_known(found: torch.Tensor, wanted: torch.Tensor, new: list[int]) -> None:
    """The logits of all tokens but the new ones, some of which have rows that no token had before."""
    known = [i for i in range(V) if i not in new]
    torch.testing.assert_close(found[..., known], wanted[..., known], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ARCHITECTURES + SEQ2SEQ + ENCODERS)
def test_logits_and_answers_are_those_of_the_vectors(tiny_bases, tmp_path, kind):
    head = starting_head(tiny_bases[kind], kind) if kind in ENCODERS else {}
    base = load_plain(tiny_bases[kind], family_of(kind), head)
    ids = AutoTokenizer.from_pretrained(tiny_bases[kind]).encode(TEXT)
    vectors = draw(base.get_input_embeddings().embedding_dim) * 0.5
    stored = {"virtual_tokens": vectors} | {f"head.{name}": tensor for name, tensor in head.items()}
    lines = export([write_trained(tmp_path / "task", tiny_bases[kind], kind, stored)], tmp_path / "out")
    assert len(lines) == 1 and lines[0].startswith("prompt task: 4 tokens, <|task_0|> ...; put first")
    served = load(tmp_path / "out", kind)
    found = served.tokenizer(TEXT, return_tensors="pt", return_token_type_ids=False)
    new = [served.tokenizer.convert_tokens_to_ids(f"<|task_{i}|>") for i in range(NUM_VIRTUAL)]
    assert found["input_ids"].tolist() == [[*new, *ids]]
    assert served.tokenizer.encode(TEXT, add_special_tokens=False) == ids
    wanted = logits_of(base, inputs_embeds=embed(base, vectors, ids))
    logits = logits_of(served.model, **found)
    if kind in ENCODERS:
        torch.testing.assert_close(logits, wanted, rtol=1e-6, atol=1e-6)
        (answer,) = pipeline("text-classification", str(tmp_path / "out"), device="cpu")(TEXT)
        assert answer["label"] == LABELS[int(wanted.argmax())]
        return
    check_known(logits, wanted, new)
    assert not set(new) & set(logits.argmax(-1).flatten().tolist())
    assert (logits[..., new] < logits.amax(-1, keepdim=True)).all()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    answers = served.model.generate(**found, **options)[0]
    wanted = base.generate(inputs_embeds=embed(base, vectors, ids), **options)[0]
    assert answers.tolist()[0 if kind in SEQ2SEQ else NUM_VIRTUAL + len(ids) :] == wanted.tolist()


def test_prompts_of_several_runs_are_chosen_by_name(tiny_bases, tmp_path):
    """`<|NAME|>` in a text, `prompt` in a chat, which may also begin with a message of that role."""
    base = tiny_bases["gpt2"]
    vectors = {name: draw(32, seed).repeat(3, 1) for seed, name in enumerate(("one", "two.0"), 1)}
    runs = [write_trained(tmp_path / name, base, "gpt2", {"virtual_tokens": v}) for name, v in vectors.items()]
    export(runs, tmp_path / "out")
    served = load(tmp_path / "out")
    plain = load(base)
    ids = plain.tokenizer.encode(TEXT)
    assert served.tokenizer.encode(TEXT) == ids  # the base itself is there too
    assert served.model.config.vocab_size == 258 + 24 > V
    listed = json.loads((tmp_path / "out" / "prompts.json").read_text())["prompts"]
    for name, own in vectors.items():
        new = listed[name]["token_ids"]
        for text in (f"<|{name}|>{TEXT}", listed[name]["text"] + TEXT):
            assert served.tokenizer.encode(text) == [*new, *ids]
        wanted = logits_of(plain.model, inputs_embeds=embed(plain.model, own, ids))
        found = logits_of(served.model, **served.tokenizer(f"<|{name}|>{TEXT}", return_tensors="pt"))
        check_known(found, wanted, [i for each in listed.values() for i in each["token_ids"]])


TURN = "{%- for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
CHAT = TURN + "{{ '<assistant>' if add_generation_prompt }}"
TURNS = [{"role": "user", "content": "hi"}]


def with_chat(base: Path, folder: Path, template: str = CHAT, bos: bool = False) -> Path:
    """A copy of a base with a chat template, and perhaps a BOS before every text."""
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    if bos:
        piece = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
        tokenizer.backend_tokenizer.post_processor = piece
    tokenizer.save_pretrained(folder)
    return folder


def rendered(tokenizer, **more) -> str:
    return tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True, **more)


def test_a_chat_has_the_prompt_where_it_was_trained(tiny_bases, tmp_path):
    base = with_chat(tiny_bases["llama"], tmp_path / "base")
    stored = {"virtual_tokens": draw(32)}
    tokens = "".join(f"<|x_{i}|>" for i in range(NUM_VIRTUAL))
    chat = "<user>hi<assistant>"
    for placement, wanted in {"prefix": tokens + chat, "infix": chat + tokens}.items():
        sections = {"prompt": {"placement": placement}, "data": {"chat": True}}
        run = write_trained(tmp_path / placement / "x", base, "llama", stored, **sections)
        export([run], tmp_path / f"{placement}-out")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / f"{placement}-out")
        assert rendered(tokenizer) == wanted
        ids = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True).input_ids
        assert len(ids) == NUM_VIRTUAL + len(chat)
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == "<user>hi"


def test_a_base_without_a_chat_template_reads_a_message_as_a_row(tiny_bases, tmp_path):
    data = {"template": 'Say "{{ word }}"\n=> é'}
    run = write_trained(tmp_path / "x", tiny_bases["llama"], "llama", {"virtual_tokens": draw(32)}, data=data)
    export([run], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True).input_ids
    assert ids == tokenizer.encode('Say "hi"\n=> é')


def test_a_system_prompt_of_the_run_is_in_its_chats(tiny_bases, tmp_path):
    base = with_chat(tiny_bases["llama"], tmp_path / "base")
    run = write_trained(
        tmp_path / "x", base, "llama", {"virtual_tokens": draw(32)}, data={"chat": True, "system": 'Say "A".\n'}
    )
    export([run], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert rendered(tokenizer).endswith('<system>Say "A".\n<user>hi<assistant>')
    own = [{"role": "system", "content": "Other."}, *TURNS]
    assert tokenizer.apply_chat_template(own, tokenize=False).endswith("<|x_3|><system>Other.<user>hi")


@pytest.mark.parametrize("system", [None, "S."])
def test_chats_begin_as_in_training(tiny_bases, tmp_path, system):
    """As `Chat.render` writes them, with a system prompt of their own and without."""
    base = with_chat(tiny_bases["llama"], tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    chat = Chat(AutoTokenizer.from_pretrained(base), "data.messages", system, 'Be "brief".')
    set_system(tokenizer, system, chat.text)
    for messages in (TURNS, [{"role": "system", "content": "Other. \n"}, *TURNS]):
        found = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert found == chat.render(messages, asks=True) and "brief" in found


def test_a_written_prompt_stands_around_what_is_sent(tiny_bases, tmp_path):
    sections = {"prompt": {"text": {"task": "Judge.", "output": "Short:"}}, "data": {"template": "{{ word }}"}}
    run = write_trained(tmp_path / "x", tiny_bases["llama"], "llama", {"virtual_tokens": draw(32)}, **sections)
    export([run], tmp_path / "out")
    listed = json.loads((tmp_path / "out" / "prompts.json").read_text())["prompts"]["x"]
    assert listed["template"] == "Judge.\n{{ word }}\nShort:"
    assert rendered(AutoTokenizer.from_pretrained(tmp_path / "out")).endswith("<|x_3|>Judge.\nhi\nShort:")


def test_chats_choose_a_prompt(tiny_bases, tmp_path):
    base = with_chat(tiny_bases["llama"], tmp_path / "base", "\n" + CHAT)
    runs = [write_trained(tmp_path / name, base, "llama", {"virtual_tokens": draw(32)}) for name in ("one", "two")]
    export(runs, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    without = AutoTokenizer.from_pretrained(base)
    assert rendered(tokenizer) == rendered(without)
    tokens = "".join(f"<|two_{i}|>" for i in range(NUM_VIRTUAL))
    assert rendered(tokenizer, prompt="two") == tokens + rendered(without)
    named = [{"role": "prompt", "content": "two"}, *TURNS]
    found = tokenizer.apply_chat_template(named, tokenize=False, add_generation_prompt=True)
    assert found == tokens + rendered(without)
    with pytest.raises(Exception, match="prompt is none of one, two"):
        rendered(tokenizer, prompt="three")


@pytest.mark.parametrize("by_name", [False, True])
def test_a_prompt_precedes_a_bos_as_in_training(tiny_bases, tmp_path, by_name):
    base = with_chat(tiny_bases["llama"], tmp_path / "base", bos=True)
    assert AutoTokenizer.from_pretrained(base).encode("a")[0] == 0
    run = write_trained(tmp_path / "x", base, "llama", {"virtual_tokens": draw(32)})
    export([run], tmp_path / "out", by_name=by_name)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    new = tokenizer.convert_tokens_to_ids([f"<|x_{i}|>" for i in range(NUM_VIRTUAL)])
    text = "<|x|>" if by_name else ""
    assert tokenizer.encode(text + "a")[:-1] == [*new, 0] and len(tokenizer.encode(text + "a")) == NUM_VIRTUAL + 2


def test_a_template_has_the_prompt_where_a_text_names_it(tiny_bases, tmp_path):
    base = with_chat(tiny_bases["llama"], tmp_path / "base", bos=True)
    sections = {"prompt": {"placement": "template"}, "data": {"template": "Say {{ prompt }}{{ word }}"}}
    export([write_trained(tmp_path / "x", base, "llama", {"virtual_tokens": draw(32)}, **sections)], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    parts = [AutoTokenizer.from_pretrained(base).encode(text, add_special_tokens=False) for text in ("Say ", "a")]
    new = tokenizer.convert_tokens_to_ids([f"<|x_{i}|>" for i in range(NUM_VIRTUAL)])
    assert tokenizer.encode("Say <|x|>a") == [0, *parts[0], *new, *parts[1]]


def test_tokens_that_a_base_reserves_can_hold_the_vectors(tiny_bases, tmp_path):
    base = with_chat(tiny_bases["gpt2"], tmp_path / "base")  # its head is tied
    tokenizer = AutoTokenizer.from_pretrained(base)
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(NUM_VIRTUAL + 1)]
    tokenizer.add_tokens(reserved, special_tokens=True)
    tokenizer.chat_template = CHAT.replace("<assistant>", reserved[0])  # which the base uses itself
    tokenizer.save_pretrained(base)
    vectors = draw(32)
    run = write_trained(tmp_path / "x", base, "gpt2", {"virtual_tokens": vectors})
    export([run], tmp_path / "out", uses_reserved=True)
    served = load(tmp_path / "out")
    plain = load(base)
    assert served.tokenizer.get_vocab() == tokenizer.get_vocab() and served.model.config.vocab_size == V
    ids = served.tokenizer.encode("a")
    assert served.tokenizer.convert_ids_to_tokens(ids[:-1]) == reserved[1:]
    wanted = logits_of(plain.model, inputs_embeds=embed(plain.model, vectors, ids[-1:]))
    torch.testing.assert_close(logits_of(served.model, input_ids=torch.tensor([ids])), wanted, rtol=1e-6, atol=1e-6)
    export([run], tmp_path / "appended")  # their rows of the head are those of a token that is never answered
    head = load(tmp_path / "appended").model.lm_head.weight
    first = served.tokenizer.convert_tokens_to_ids(reserved[-1]) + 1
    assert torch.equal(head[first : first + NUM_VIRTUAL], head[first - 1].expand(NUM_VIRTUAL, -1))


def test_only_the_files_with_changed_tensors_are_written(tiny_bases, tmp_path):
    base = with_chat(tiny_bases["llama"], tmp_path / "base")
    plain = load(base)
    (base / "model.safetensors").unlink()
    plain.model.save_pretrained(base, max_shard_size="20KB")
    export([write_trained(tmp_path / "x", base, "llama", {"virtual_tokens": draw(32)})], tmp_path / "out")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 3 and shards == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    changed = []
    for name in shards:
        if not (base / name).samefile(tmp_path / "out" / name):
            changed += safe_open(base / name, "pt").keys()
            assert (tmp_path / "out" / name).stat().st_mode & 0o777 == (tmp_path / "out").stat().st_mode & 0o666
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(changed) and len(changed) < 6
    served = load(tmp_path / "out")
    ids = served.tokenizer.encode(TEXT)
    wanted = logits_of(plain.model, inputs_embeds=embed(plain.model, draw(32), ids[NUM_VIRTUAL:]))
    found = logits_of(served.model, input_ids=torch.tensor([ids]))
    check_known(found, wanted, ids[:NUM_VIRTUAL])


def test_vectors_are_rounded_as_the_base_is_stored_and_that_is_said(tiny_bases, tmp_path):
    base = with_chat(tiny_bases["gpt2"], tmp_path / "base")
    plain = load(base)
    (base / "model.safetensors").unlink()
    plain.model.to(torch.bfloat16).save_pretrained(base)
    run = write_trained(tmp_path / "x", base, "gpt2", {"virtual_tokens": draw(32)}, model={"quantization": "int8"})
    lines = export([run], tmp_path / "out")
    assert lines[-1] == "the vectors are rounded to bfloat16, in which the base's embeddings are stored"
    served = load(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"  # of the run
    ids = served.tokenizer.encode(TEXT)
    base_model = load(base).model
    wanted = logits_of(base_model, inputs_embeds=embed(base_model, draw(32).bfloat16().float(), ids[NUM_VIRTUAL:]))
    found = logits_of(served.model, input_ids=torch.tensor([ids]))
    check_known(found, wanted, ids[:NUM_VIRTUAL])


def test_what_cannot_be_tokens_of_a_model_is_refused_in_one_line(tiny_bases, tmp_path):
    base = tiny_bases["llama"]
    vectors = {"virtual_tokens": draw(32)}
    keys = {f"prefix_{name}": torch.zeros(2, NUM_VIRTUAL, 2, 8) for name in ("keys", "values")}
    good = write_trained(tmp_path / "a", base, "llama", vectors)
    twin = write_trained(tmp_path / "other" / "a", base, "llama", vectors)
    elsewhere = write_trained(tmp_path / "b", tiny_bases["qwen2"], "qwen2", vectors)
    prefix = write_trained(tmp_path / "c", base, "llama", keys, "prefix_tuning")
    infix = write_trained(tmp_path / "d", base, "llama", keys, "prefix_tuning", prompt={"placement": "infix"})
    no_prompt = {"num_virtual_tokens": 0}
    norms = write_trained(tmp_path / "e", base, "llama", {"base.w": torch.ones(8)}, "norms_only", prompt=no_prompt)
    late = write_trained(tmp_path / "f", base, "llama", {"late_tokens": draw(32)}, "late_prompt")
    own = {"late_tokens": draw(32), "generator.up": draw(32)}
    generated = write_trained(tmp_path / "g", base, "llama", own, "late_prompt", prompt={"generator": "pooled"})
    gates = {"adaption_tokens": draw(32)}
    adapters = write_trained(tmp_path / "h", tiny_bases["qwen2"], "qwen2", gates, "adaption_prompt", prompt=no_prompt)
    cases = {
        "use --to kv": ([prefix], {}),
        "--names: two runs are called a": ([good, twin], {}),
        "over another base": ([good, elsewhere], {}),
        "--names: 1 names for 2 runs": ([good, twin], {"names": ("x",)}),
        "--reserved: the base reserves 0 tokens and the prompts need 4": ([good], {"uses_reserved": True}),
        "several runs: only for --to model": ([good, twin], {"to": "peft"}),
        "--names: only for --to model": ([good], {"to": "peft", "names": ("x",)}),
        "--input: only for --to prompt-embeds": ([good], {"text": "x"}),
        "--input-file: only for --to prompt-embeds": ([good], {"to": "peft", "file": "x.jsonl"}),
        "holds another model or other files": ([good], {"out": base}),
        "--to kv: this is for keys and values, and prompt_tuning trains none: use --to model": ([good], {"to": "kv"}),
        "and norms_only trains none: use --to model": ([norms], {"to": "kv"}),
        "and late_prompt trains none: use --to vectors": ([late], {"to": "kv"}),
    }
    for message, (runs, options) in cases.items():
        with pytest.raises(UserError) as refused:
            export(runs, **{"out": tmp_path / "out"} | options)
        assert message in str(refused.value) and "\n" not in str(refused.value)
    nowhere = {  # no other format takes these
        "late_prompt trains more than the base has": generated,
        "prefix_tuning trains keys and values, which are no tokens": infix,
        "adaption_prompt trains more than the base has": adapters,
    }
    for message, run in nowhere.items():
        with pytest.raises(UserError, match=f"^--to model: {message}$"):
            export([run], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("stored", "ids", "wanted"), [(272, [280], 281), (272, [5], 272), (128, [128], 192)])
def test_a_size_that_suits_gpus_is_kept(stored, ids, wanted):
    assert count_tokens(stored, ids) == wanted
