"""DeepSpeed's JSON stays its own: `auto` values are filled from the config and contradictions are refused."""

import json
from inspect import signature

import pytest

from ptune_dist.config.deepspeed_json import fill_deepspeed_json, find_preset, load_deepspeed_json, zero_stage
from ptune_dist.config.deepspeed_optimizer import LEFT_OUT, WEIGHT_DECAY_OF_TORCH
from ptune_dist.config.schema import Config
from ptune_dist.errors import UserError
from tests.processes import ROOT

SHIPPED = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def build(deepspeed=None, *, dtype="float32", **train) -> Config:
    return Config.model_validate(
        {
            "output_dir": "x",
            "model": {"path": "y", "dtype": dtype},
            "data": {"train": "z", "template": "{{ a }}", "target": "{{ b }}"},
            "train": {"learning_rate": 0.3, "warmup_steps": 0} | train,  # as a reading has settled them
            "deepspeed": deepspeed,
        }
    )


def fill(deepspeed=None, **settings) -> dict:
    return fill_deepspeed_json(build(deepspeed, **settings), hidden_size=64)


def error_of(deepspeed, **settings) -> str:
    with pytest.raises(UserError) as caught:
        fill(deepspeed, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def autos(node) -> list:
    return (
        [node]
        if node == "auto"
        else [a for child in node.values() for a in autos(child)]
        if isinstance(node, dict)
        else []
    )


# What is filled


def fill_shipped(path) -> tuple[dict, str, str]:
    """A ready file's content, filled in, and the stage and precision of its name."""
    stage, precision, *_ = path.stem.removeprefix("zero").split("_")
    content = fill(str(path), dtype=DTYPES[precision])
    zero = content["zero_optimization"]
    if stage == "3":  # these follow from the base's tensors
        assert zero.pop("stage3_param_persistence_threshold") == "auto"
        assert zero.pop("stage3_prefetch_bucket_size", "auto") == "auto"
    if "nvme" in path.stem:
        assert autos(content) == ["auto", "auto"]
        zero["offload_param"] |= {"buffer_size": 1000, "buffer_count": 4}
    return content, stage, precision


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_json_is_filled_whole_and_asks_for_what_its_name_says(path):
    content, stage, precision = fill_shipped(path)
    assert not autos(content)
    assert zero_stage(content) == int(stage)
    assert content["bf16"]["enabled"] == (precision == "bf16") and content["fp16"]["enabled"] == (precision == "fp16")


def test_every_shipped_json_is_one_that_deepspeed_itself_takes():
    from deepspeed.runtime.config import DeepSpeedConfig

    for path in SHIPPED:
        content, stage, precision = fill_shipped(path)
        taken = DeepSpeedConfig(content)
        assert taken.zero_config.stage == int(stage)
        assert (taken.bfloat16_config.enabled, taken.float16_config.enabled) == (
            precision == "bf16",
            precision == "fp16",
        )


def test_without_a_json_it_is_stage_0_in_the_configs_precision():
    assert zero_stage(fill()) == 0
    assert fill(dtype="bfloat16")["bf16"] == {"enabled": True}


def test_the_buffer_size_follows_the_bases_width():
    zero = {"stage": 3, "reduce_bucket_size": "auto"}
    filled = fill({"zero_optimization": zero})["zero_optimization"]
    assert filled["reduce_bucket_size"] == 4096
    own = fill({"zero_optimization": zero | {"reduce_bucket_size": 100}})["zero_optimization"]
    assert own["reduce_bucket_size"] == 100  # a number that is given stays


def test_what_the_config_does_not_set_passes_unchanged():
    own = {
        "zero_optimization": {"stage": 3, "overlap_comm": False, "offload_param": {"device": "cpu"}},
        "wall_clock_breakdown": True,
    }
    filled = fill(own)
    assert filled["zero_optimization"] == own["zero_optimization"] and filled["wall_clock_breakdown"] is True


def test_clipping_schedule_and_accumulation_are_left_to_us():
    own = {"gradient_clipping": "auto", "train_batch_size": "auto", "gradient_accumulation_steps": "auto",
           "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
           "scheduler": {"type": "WarmupDecayLR", "params": dict.fromkeys(
               ("total_num_steps", "warmup_num_steps", "warmup_max_lr"), "auto")}}  # fmt: skip
    filled = fill(own, max_grad_norm=0.5)
    assert filled["gradient_clipping"] == 0.0 and "optimizer" not in filled and "scheduler" not in filled
    assert (filled["train_micro_batch_size_per_gpu"], filled["gradient_accumulation_steps"]) == (1, 1)


def test_deepspeeds_own_timer_is_off_unless_it_is_asked_for():
    assert fill({})["timers"] == {"throughput": {"enabled": False}}
    own = {"timers": {"throughput": {"enabled": True, "synchronized": False}}}
    assert fill(own)["timers"] == own["timers"]
    assert "timers.throughput must be an object" in error_of({"timers": {"throughput": True}})


def test_what_was_given_is_not_changed():
    own = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}, "gradient_clipping": "auto"}
    config = build(own)
    fill_deepspeed_json(config, hidden_size=64)
    assert (
        own
        == config.deepspeed
        == {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}, "gradient_clipping": "auto"}
    )


# What is refused

SAME = {
    "gradient_clipping": (0.5, {"max_grad_norm": 0.5}, "train.max_grad_norm"),
    "train_batch_size": (16, {"batch_size": 16}, "train.batch_size"),
    "bf16": ({"enabled": True}, {"dtype": "bfloat16"}, "model.dtype"),
    "fp16": ({"enabled": True}, {"dtype": "float16"}, "model.dtype"),
    "optimizer": ({"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5}},
                  {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.5}, "train.optimizer"),
    "scheduler": ({"type": "WarmupCosineLR", "params": {
                      "warmup_num_steps": 5, "warmup_type": "log", "total_num_steps": 50, "cos_min_ratio": 0.5}},
                  {"schedule": "cosine", "warmup_steps": 5, "warmup_type": "log", "max_steps": 50,
                   "min_lr_ratio": 0.5}, "train.schedule"),
}  # fmt: skip


@pytest.mark.parametrize("key", SAME)
def test_a_value_that_both_files_set_may_be_equal_and_may_not_differ(key):
    value, equal, ours = SAME[key]
    assert fill({key: value}, **equal)
    message = error_of({key: value})  # against the config's defaults
    assert key in message and ours in message


def adamw(**params) -> dict:
    return {"optimizer": {"type": "AdamW", "params": {"lr": "auto"} | params}}


def adam(**params) -> dict:
    return {"optimizer": {"type": "Adam", "params": {"lr": "auto"} | params}}


def linear(**params) -> dict:
    filled = dict.fromkeys(("total_num_steps", "warmup_num_steps", "warmup_max_lr"), "auto")
    return {"scheduler": {"type": "WarmupDecayLR", "params": filled | params}}


@pytest.mark.parametrize(
    "own, train, theirs, ours",
    [
        (adamw(lr=0.1), {}, "optimizer.params.lr", "train.learning_rate"),
        (adamw(betas=[0.9, 0.95]), {}, "optimizer.params.betas", "train.betas"),
        (adamw(eps=1e-6), {}, "optimizer.params.eps", "train.eps"),
        (adamw(weight_decay=0.1), {}, "optimizer.params.weight_decay", "train.weight_decay"),
        (
            {"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}},
            {"optimizer": "sgd"},
            "optimizer.params.momentum",
            "train.momentum",
        ),
        ({"optimizer": {"type": "Lion"}}, {}, "optimizer.type", "train.optimizer"),
        ({"scheduler": {"type": "OneCycle"}}, {}, "scheduler.type", "train.schedule"),
        (linear(total_num_steps=7), {}, "scheduler.params.total_num_steps", "train.max_steps"),
        (linear(warmup_max_lr=7), {}, "scheduler.params.warmup_max_lr", "train.learning_rate"),
        ({"gradient_accumulation_steps": 4}, {}, "gradient_accumulation_steps", "train.batch_size"),
        ({"train_micro_batch_size_per_gpu": 4}, {}, "train_micro_batch_size_per_gpu", "train.micro_batch_tokens"),
    ],
)
def test_a_contradiction_between_the_files_names_both_keys(own, train, theirs, ours):
    message = error_of(own, **train)
    assert theirs in message and ours in message


def test_numbers_written_with_auto_or_equal_are_no_contradiction():
    assert fill(
        {
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": "auto", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0},
            }
        }
    )
    assert fill({"gradient_clipping": 1}, max_grad_norm=1.0)


def test_an_auto_that_nothing_fills_is_named():
    message = error_of({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}})
    assert "zero_optimization.sub_group_size" in message


def test_the_file_is_named_in_what_is_refused(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"gradient_clipping": 7}))
    assert error_of(str(path)).startswith(f"{path}: gradient_clipping is 7 but train.max_grad_norm is 1.0")


@pytest.mark.parametrize(
    "content, says",
    [(b"{\n  'a': 1}", "line 2: not valid JSON"), (b"[1]", "found list"), (b"\xff\xfe", "not UTF-8"), (b"", "line 1")],
)
def test_a_file_that_is_no_json_object_is_named_with_the_line(tmp_path, content, says):
    path = tmp_path / "zero.json"
    path.write_bytes(content)
    message = error_of(str(path))
    assert message.startswith(f"deepspeed: {path}") and says in message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=f"deepspeed: {tmp_path}/no.json: No such file"):
        load_deepspeed_json(str(tmp_path / "no.json"))


@pytest.mark.parametrize(
    "own, key",
    [
        ({"bf16": True}, "bf16"),
        ({"zero_optimization": None}, "zero_optimization"),
        ({"zero_optimization": 3}, "zero_optimization"),
        ({"optimizer": "AdamW"}, "optimizer"),
        ({"scheduler": {"type": "WarmupDecayLR", "params": None}}, "scheduler"),
    ],
    ids=str,
)
def test_a_section_of_the_wrong_shape_is_the_users_mistake(own, key):
    assert key in error_of(own)


@pytest.mark.parametrize(
    "zero, same",
    [
        ({"max_live_parameters": 5}, {"stage3_max_live_parameters": 5}),
        ({"prefetch_bucket_size": "auto"}, {"stage3_prefetch_bucket_size": "auto"}),
        ({"param_persistence_threshold": "auto"}, {"stage3_param_persistence_threshold": "auto"}),
        ({"gather_16bit_weights_on_model_save": True}, {"stage3_gather_16bit_weights_on_model_save": True}),
        ({"stage3_gather_fp16_weights_on_model_save": True}, {"stage3_gather_16bit_weights_on_model_save": True}),
        ({"stage3_gather_16bit_weights_on_model_save": "auto"}, {}),
        ({"cpu_offload": True}, {"offload_optimizer": {"device": "cpu"}}),
        ({"cpu_offload": False}, {}),
        (
            {"cpu_offload_params": True, "cpu_offload_use_pin_memory": True},
            {"offload_param": {"device": "cpu", "pin_memory": True}},
        ),
        ({"offload_param": None}, {}),
        ({"offload_optimizer": {"device": "auto"}}, {"offload_optimizer": {}}),
    ],
    ids=str,
)
def test_all_spellings_of_deepspeed_mean_the_same(zero, same):
    stage = {"stage": 3}
    assert fill({"zero_optimization": stage | zero}) == fill({"zero_optimization": stage | same})


def test_older_forms_of_whole_sections_are_read():
    assert zero_stage(fill({"zero_optimization": True})) == 1
    assert fill({"bfloat16": {"enabled": True}}, dtype="bfloat16")["bf16"] == {"enabled": True}


def test_two_spellings_of_one_key_that_differ_are_refused():
    message = error_of({"zero_optimization": {"max_live_parameters": 1, "stage3_max_live_parameters": 2}})
    assert "max_live_parameters and stage3_max_live_parameters are the same key" in message


def test_a_base_without_gradients_takes_their_order_and_a_note_says_that_it_changes_nothing():
    from ptune_dist.zero.unused_sections import describe_unused

    content = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}, "prescale_gradients": True}
    note = describe_unused(fill(content)) or ""
    assert "zero_optimization.round_robin_gradients, prescale_gradients" in note


def sgd(**params) -> dict:
    return {"optimizer": {"type": "SGD", "params": {"lr": "auto"} | params}}


def cosine(**params) -> dict:
    filled = dict.fromkeys(("total_num_steps", "warmup_num_steps", "warmup_type", "cos_min_ratio"), "auto")
    return {"scheduler": {"type": "WarmupCosineLR", "params": filled | params}}


COSINE = {"schedule": "cosine", "warmup_steps": 1}


@pytest.mark.parametrize(
    "own, train, key",
    [
        (adam(adam_w_mode=False, weight_decay="auto"), {"weight_decay": 0.1}, "optimizer.params.adam_w_mode"),
        (adamw(amsgrad=True), {}, "optimizer.params.amsgrad"),
        (adamw(bias_correction=False), {}, "optimizer.params.bias_correction"),
        (adamw(max_grad_norm=7), {}, "optimizer.params.max_grad_norm"),
        (adamw(freeze_step=7), {}, "optimizer.params.freeze_step"),
        (adamw(fp32_optimizer_states=False), {}, "optimizer.params.fp32_optimizer_states"),
        (sgd(nesterov=True), {"optimizer": "sgd"}, "optimizer.params.nesterov"),
        (cosine(cos_min_ratio=0.5), COSINE, "scheduler.params.cos_min_ratio"),
        (cosine(warmup_min_ratio=0.5), COSINE, "scheduler.params.warmup_min_ratio"),
        (cosine(warmup_type="log"), COSINE, "scheduler.params.warmup_type"),
        (cosine(cycle_min_lr=1), COSINE, "scheduler.params.cycle_min_lr"),
        (linear(warmup_min_lr=0.1), {}, "scheduler.params.warmup_min_lr"),
    ],
)
def test_an_option_that_would_train_differently_is_refused_by_name(own, train, key):
    assert key in error_of(own, **train)


@pytest.mark.parametrize(
    "own, train",
    [
        (adamw(adam_w_mode=False, torch_adam=True, fused=True, weight_decay="auto"), {}),
        (adamw(lr="auto", betas="auto", eps="auto", weight_decay="auto", adam_w_mode="auto"), {}),
        (adamw(adam_w_mode=False, weight_decay="auto"), {"weight_decay": 0.1}),  # which DeepSpeed reads for Adam only
        (adam(weight_decay="auto"), {"weight_decay": 0.1}),
        (sgd(nesterov=False, dampening=0), {"optimizer": "sgd"}),
        (cosine(cos_min_ratio=0, warmup_type="linear", warmup_min_ratio="auto"), COSINE),
        (cosine(warmup_type="log", warmup_num_steps=0), {"schedule": "cosine"}),
    ],
)
def test_an_option_that_changes_nothing_is_taken(own, train):
    assert fill(own, **train)


@pytest.mark.parametrize(
    "own, says",
    [
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel is not for prompts"),
        ({"compile": {"disable": False, "backend": "inductor"}}, "compile is not for prompts"),
        ({"communication_data_type": "bf16"}, "communication_data_type"),
        ({"elasticity": {"enabled": True}}, "elasticity"),
        ({"amp": {"enabled": True}}, "amp"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads"),
        ({"bf16": {"bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states"),
        ({"fp16": {"fp16_master_weights_and_grads": True}}, "fp16.fp16_master_weights_and_grads"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning"),
        ({"sparse_attention": {"mode": "fixed"}}, "sparse_attention"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
            "zero_optimization.offload_optimizer.super_offload",
        ),
    ],
)
def test_a_section_that_contradicts_is_refused_by_name(own, says):
    assert says in error_of(own)


def test_a_section_that_is_off_is_taken():
    off = {"enabled": False}
    assert fill({"tensor_parallel": {"autotp_size": 1}, "compile": {"disable": True}, "elasticity": off, "wandb": off})


def test_a_logger_without_its_package_names_the_package(monkeypatch):
    monkeypatch.setattr("ptune_dist.config.deepspeed_sections.find_spec", lambda name: None)
    assert "wandb needs the package wandb" in error_of({"wandb": {"enabled": True}})


@pytest.mark.parametrize(
    "content, says",
    [
        ('{\n  // off\n  "bf16": {}}', "line 2: not valid JSON: Expecting property name"),
        ('{\n  // off\n  "bf16": {}}', "has no comments: remove them"),
        ('{"bf16": {},\n}', "remove the comma after the last item"),
        ('{"bf16": {}, "bf16": {}}', "key bf16 is given twice"),
    ],
)
def test_a_file_with_comments_or_one_comma_too_many_is_explained(tmp_path, content, says):
    path = tmp_path / "zero.json"
    path.write_text(content)
    assert says in error_of(str(path))


def test_a_json_that_comes_with_the_package_is_found_by_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load_deepspeed_json("zero3_bf16") == load_deepspeed_json(str(ROOT / "configs/deepspeed/zero3_bf16.json"))
    assert "zero2_bf16, zero2_fp16" in error_of("zero4_bf16")


@pytest.mark.parametrize("stage", [4, -1, "three", 2.5])
def test_a_stage_that_is_none_is_named(stage):
    assert "zero_optimization.stage" in error_of({"zero_optimization": {"stage": stage}})


@pytest.mark.parametrize(
    "own, train, name, default",
    [
        ({"optimizer": {"type": "AdamW"}}, {}, "lr", 0.001),
        (adamw(), {"betas": (0.9, 0.95)}, "betas", "[0.9, 0.999]"),
        (adam(), {"eps": 1e-6}, "eps", 1e-8),
        (adamw(), {"weight_decay": 0.01}, "weight_decay", 0.0),
        (adamw(torch_adam=True), {}, "weight_decay", 0.01),
        (sgd(), {"optimizer": "sgd", "momentum": 0.9}, "momentum", 0.0),
        ({"optimizer": {"type": "Adafactor"}}, {"optimizer": "adafactor"}, "lr", 0.01),
    ],
)
def test_an_option_that_is_left_out_has_deepspeeds_default_or_is_named(own, train, name, default):
    message = error_of(own, **train)
    assert f"optimizer.params.{name} is left out, which is {default} to DeepSpeed" in message


def test_the_defaults_of_options_that_are_left_out_are_those_of_deepspeeds_optimizers():
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    def default(kind, name):
        return signature(kind).parameters[name].default

    for kind in (DeepSpeedCPUAdam, FusedAdam):
        assert [default(kind, name) for name in ("lr", "weight_decay", "eps")] == [*LEFT_OUT["adamw"], 1e-8]
        assert default(kind, "betas") == (0.9, 0.999)
        assert default(kind, "bias_correction") is True and default(kind, "amsgrad") is False
    assert default(DeepSpeedCPUAdam, "fp32_optimizer_states") is True
    assert default(torch.optim.AdamW, "weight_decay") == WEIGHT_DECAY_OF_TORCH
    assert default(torch.optim.Adam, "weight_decay") == 0
    for kind, name in ((torch.optim.SGD, "sgd"), (torch.optim.Adafactor, "adafactor")):
        assert (default(kind, "lr"), default(kind, "weight_decay")) == LEFT_OUT[name]
    assert default(torch.optim.SGD, "momentum") == 0


def test_a_json_of_the_package_for_another_precision_is_told_by_its_name_and_the_key_to_set():
    source = find_preset("zero3_bf16")
    assert error_of(source) == (
        "deepspeed: zero3_bf16 is for bfloat16 and model.dtype is float32: set model.dtype=bfloat16"
    )
    assert fill(source, dtype="bfloat16") and fill(find_preset("zero3_fp32"), dtype="bfloat16")
