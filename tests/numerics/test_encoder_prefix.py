"""Keys and values in front of an encoder's rows: what its layers compute of a longer row, and PEFT's prefix tuning.

Shapes: P virtual positions, L layers, G key/value heads, Dh width of a head.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from ptune_dist.base.layers import layer_stacks
from ptune_dist.base.recompute import DEFAULTS
from ptune_dist.errors import UserError
from ptune_dist.families import FAMILIES
from ptune_dist.model.attention import KeysValues
from ptune_dist.objectives.cross_entropy import CrossEntropy
from ptune_dist.prompts.prefix_tuning import PrefixTuning
from ptune_dist.prompts.prompt_tuning import PromptTuning
from ptune_dist.prompts.store import load_prompt
from tests.architectures.bases import build_base as save_base
from tests.architectures.bases import build_shape
from tests.commands import run_commands
from tests.conftest import LABELS
from tests.numerics.methods import labelled, write_run
from tests.numerics.plain import NUM_VIRTUAL, load_plain, peft_method_curve, read_rows
from tests.numerics.test_curves import curve, train_all, zero_json
from tests.numerics.test_families import starting_head, write_rows

# Those that take keys and values as BERT does, and those that get them from our attention function.
AS_BERT = ["bert", "roberta", "electra", "xmod", "big_bird"]
BY_ATTENTION = ["distilbert", "modernbert", "eurobert", "gte", "nomic_bert", "mobilebert", "jina_embeddings_v3"]
REFUSED = ["deberta-v2", "albert", "megatron-bert", "funnel"]


def build_base(kind: str):
    torch.manual_seed(0)
    shape = build_shape(kind)
    shape.num_labels = len(LABELS)
    return AutoModelForSequenceClassification.from_config(shape).eval().requires_grad_(False)


def build_model(base, prompt):
    return FAMILIES["encoder"].model_class(base, [prompt], CrossEntropy(), "prefix").eval()


def last_hidden(model, texts: list[np.ndarray], prompt) -> torch.Tensor:
    """What the last layer gives, [S, T, H]."""
    model.prompts = torch.nn.ModuleList([prompt])
    found = []

    def keep(_layer, _args, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    hook = layer_stacks(model.base)[0][-1].register_forward_hook(keep)
    model.label_logits(texts, [0] * len(texts))
    hook.remove()
    return found[0]


@pytest.mark.parametrize("kind", AS_BERT + BY_ATTENTION)
def test_rows_read_a_prefix_as_they_read_the_positions_before_them_in_a_longer_row(kind):
    """The keys and values of a longer row's first positions stand for these positions."""
    base = build_base(kind)
    draw = np.random.default_rng(0)
    virtual, text, other = (draw.integers(5, 250, length) for length in (NUM_VIRTUAL, 30, 21))
    model = build_model(base, PrefixTuning(*torch.zeros(2, 2, NUM_VIRTUAL, 1, 1)))
    with torch.no_grad():
        vectors = base.get_input_embeddings()(torch.from_numpy(np.concatenate([virtual, text]))[None])
        recorder = model._prefixes.recorder()
        base(inputs_embeds=vectors, attention_mask=torch.ones(1, len(vectors[0])).long(), **recorder.inputs)
        prefix = KeysValues(*recorder.cut(0, NUM_VIRTUAL))
        wanted = last_hidden(model, [text], PromptTuning(vectors[0, :NUM_VIRTUAL]))[0, NUM_VIRTUAL:]
        found = last_hidden(model, [text, other], PrefixTuning(*prefix))[0]
        without = last_hidden(model, [text], PromptTuning(vectors[0, :0]))[0]
    first = 1 if kind == "mobilebert" else 0  # its embeddings join a token with the one before it
    torch.testing.assert_close(found[first:], wanted[first:], rtol=1e-5, atol=1e-5)
    assert (without - wanted).abs().max() > 1e-4


@pytest.mark.parametrize("kind", REFUSED)
def test_a_base_that_takes_no_keys_is_refused_in_one_line(kind):
    with pytest.raises(UserError, match=f"prefix_tuning gives every layer keys and values, and {kind} models"):
        build_model(build_base(kind), PrefixTuning(*torch.zeros(2, 2, NUM_VIRTUAL, 1, 1)))


PROMPT = {"method": "prefix_tuning"}
TEXT = "Write in capitals"


def start_of(base_dir: Path) -> dict[str, torch.Tensor]:
    config = AutoConfig.from_pretrained(base_dir)
    width = config.hidden_size // config.num_attention_heads
    shape = (config.num_hidden_layers, NUM_VIRTUAL, config.num_attention_heads, width)
    draw = torch.Generator().manual_seed(4)
    return {name: torch.randn(shape, generator=draw) for name in ("prefix_keys", "prefix_values")}


def peft_curve_of(base_dir: Path, kind: str) -> list[float]:
    from peft import PrefixTuningConfig

    start = {"embedding.weight": PrefixTuning.to_peft(start_of(base_dir)).prompt_embeddings}
    modules = ["pooler", "classifier"] if kind == "bert" else ["classifier"]
    settings = PrefixTuningConfig(num_virtual_tokens=NUM_VIRTUAL, modules_to_save=modules)
    return peft_method_curve(base_dir, settings, start, "encoder", starting_head(base_dir, kind))


@pytest.fixture(scope="module")
def runs(tiny_bases, tmp_path_factory) -> dict[str, Path]:
    """Runs on two ranks, over bases of both ways to give layers their keys and values."""
    root = tmp_path_factory.mktemp("two")
    bases = tiny_bases | {"modernbert": root / "base"}
    save_base("modernbert", "encoder", bases["modernbert"])
    sharded = {"deepspeed": zero_json(3)}
    recomputed = {"deepspeed": zero_json(3) | {"activation_checkpointing": DEFAULTS}}
    recomputed |= {"train": {"micro_batch_tokens": 60}}
    int8 = {"model": {"quantization": "int8"}}
    bf16 = {"model": {"dtype": "bfloat16"}}
    given = {
        "bert": {},
        "bert-3": recomputed,
        "roberta-3": sharded,
        "modernbert": {},
        "modernbert-3": recomputed,
        "bert-int8": int8,
        "bert-int8-3": int8 | sharded,
        "bert-bf16-3": bf16 | sharded,
    }
    data = {"data": labelled(write_rows(root / "rows.jsonl", read_rows()))}
    specs = []
    for name, sections in given.items():
        base = bases[name.split("-")[0]]
        specs.append(write_run(root, name, base, PROMPT, start_of(base), **data, **sections))
    kept = sharded | data | {"checkpoint": {"every": 10, "keep": 9}}
    still = {"train": {"max_steps": 1, "learning_rate": 1e-30}}
    text = PROMPT | {"init_text": TEXT}
    mlp = text | {"reparameterization": "mlp", "encoder_hidden_size": 5, "train_keys": False}
    upper = text | {"from_layer": 1}
    cached = kept | {"train": {"context_cache_gib": 0.01}}
    specs += [
        write_run(root, "text", bases["bert"], text, **kept | still),
        write_run(root, "rows", bases["modernbert"], PROMPT | {"num_virtual_tokens": 9}, **kept | still),
        write_run(root, "moved", bases["bert"], mlp, **kept),
        write_run(root, "upper", bases["bert"], upper, **kept),
        write_run(root, "upper-cached", bases["bert"], upper, **cached),
    ]
    return train_all(specs, root, num_ranks=2)


@pytest.mark.long
def test_it_trains_as_under_peft_at_every_stage(runs, tiny_bases):
    wanted = peft_curve_of(tiny_bases["bert"], "bert")
    for name in ("bert", "bert-3"):
        assert curve(runs[name]) == pytest.approx(wanted, rel=1e-5), name
    assert curve(runs["roberta-3"]) == pytest.approx(peft_curve_of(tiny_bases["roberta"], "roberta"), rel=1e-5)
    assert curve(runs["modernbert-3"]) == pytest.approx(curve(runs["modernbert"]), rel=1e-5)
    assert curve(runs["bert-int8-3"]) == pytest.approx(curve(runs["bert-int8"]), rel=1e-5)
    assert curve(runs["bert-int8"]) == pytest.approx(wanted, rel=0.1)
    assert curve(runs["bert-bf16-3"]) == pytest.approx(wanted, rel=0.05)
    assert curve(runs["upper-cached"]) == pytest.approx(curve(runs["upper"]), rel=1e-5)
    for run in runs.values():
        hashes = json.loads((run / "base_hashes.json").read_text())
        assert hashes["after"] == hashes["before"] and hashes["before"]


@pytest.mark.long
def test_the_start_is_what_the_base_computes_of_a_text_or_of_the_inputs_of_rows(runs, tiny_bases):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bases["bert"])
    inputs = sum((tokenizer.encode(f"{row['word']} =") for row in read_rows()[:9]), [])
    for name, ids in (("text", tokenizer.encode(TEXT)[:NUM_VIRTUAL]), ("rows", inputs[:9])):
        config = json.loads((runs[name] / "config.json").read_text())
        base = load_plain(Path(config["model"]["path"]), "encoder", {})
        prompt, facts = load_prompt(runs[name] / "prompt")
        layer = layer_stacks(base)[0][0]
        values = []
        projection = layer.attention.self.value if name == "text" else layer.attn.Wqkv
        projection.register_forward_hook(lambda _module, _args, output, found=values: found.append(output[0]))
        with torch.no_grad():
            base(input_ids=torch.tensor([ids]))
        found = prompt["prefix_values"][0].flatten(1)
        torch.testing.assert_close(found, values[0][:, -found.shape[1] :], rtol=1e-5, atol=1e-6)
    assert prompt["frozen_values"].shape[1] == 1


@pytest.mark.long
def test_a_run_resumes_and_its_adapter_is_pefts_and_can_be_trained_further(runs, tiny_bases, tmp_path):
    from peft import PeftModel

    copy = tmp_path / "resumed"
    shutil.copytree(runs["moved"], copy)
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "step-00000020")
    run_commands([["export", str(runs["moved"]), "--to", "peft", "--out", str(tmp_path / "adapter")]])
    further = PROMPT | {"init": "file", "init_file": str(tmp_path / "adapter")}
    still = {"train": {"max_steps": 1, "learning_rate": 1e-30}}
    data = {"data": json.loads((runs["moved"] / "config.json").read_text())["data"]}
    again = tmp_path / "again"
    again.mkdir()
    specs = [
        (str(runs["moved"] / "config.json"), [f"output_dir={copy}"]),
        write_run(tmp_path, "further", tiny_bases["bert"], further, **data, **still),
    ]
    trained = train_all(specs, again, num_ranks=2)
    files = [run / "checkpoints" / "step-00000020" for run in (runs["moved"], copy)]
    for file in ("prompt.safetensors", "optimizer.safetensors"):
        assert (files[0] / file).read_bytes() == (files[1] / file).read_bytes(), file
    prompt = load_prompt(runs["moved"] / "prompt")[0]
    read = load_prompt(trained["further"] / "prompt")[0]
    head = {name.removeprefix("head."): tensor for name, tensor in prompt.items() if name.startswith("head.")}
    base = load_plain(tiny_bases["bert"], "encoder", head)
    ours = build_model(base, PrefixTuning(prompt["prefix_keys"], prompt["prefix_values"]))
    ids = np.array(AutoTokenizer.from_pretrained(tiny_bases["bert"]).encode("sample ="))
    with torch.no_grad():
        wanted = ours.label_logits([ids], [0])
        fresh = load_plain(tiny_bases["bert"], "encoder", {})
        model = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        one = torch.from_numpy(ids)[None]
        torch.testing.assert_close(model(input_ids=one, attention_mask=torch.ones_like(one)).logits, wanted)
    for name in ("prefix_keys", "prefix_values"):
        assert torch.equal(read[name], prompt[name])
