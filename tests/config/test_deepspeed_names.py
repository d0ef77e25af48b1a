"""Every key of DeepSpeed's JSON that DeepSpeed does not know is refused, and told where it belongs."""

import re

import pytest

from ptune_dist.config.deepspeed_json import load_deepspeed_json
from ptune_dist.config.deepspeed_names import OPTIONS, SECTIONS, ZERO
from ptune_dist.config.deepspeed_spellings import OFFLOADS, RENAMED
from ptune_dist.errors import UserError
from ptune_dist.zero.engine import check_with_deepspeed
from ptune_dist.zero.offload import without_autos
from ptune_dist.zero.unused_sections import describe_unused
from tests.config.test_deepspeed_json import error_of, fill


@pytest.mark.parametrize(
    "own, says",
    [
        ({"zero": {"stage": 3}}, 'unknown key zero: it is "zero_optimization": {"stage": 3}'),
        ({"zero_stage": 3}, "zero_optimization"),
        ({"stage": 3}, "unknown key stage: it belongs in zero_optimization"),
        ({"stage3_param_persistence_threshold": 0}, "it belongs in zero_optimization"),
        ({"max_live_parameters": 1}, "it belongs in zero_optimization"),
        ({"cpu_offload": True}, "it belongs in zero_optimization"),
        ({"overlap_events": True}, "it belongs in aio"),
        ({"lr": 0.1}, "train.learning_rate"),
        ({"learning_rate": 0.1}, "train.learning_rate"),
        ({"weight_decay": 0.1}, "train.weight_decay"),
        ({"warmup_steps": 3}, "train.warmup_steps"),
        ({"dtype": "bf16"}, "model.dtype"),
        ({"gradient_checkpointing": True}, "activation_checkpointing"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "top level"),
        ({"domino": {"enabled": True}}, "unknown key domino"),
        ({"sequence_parallel": 2}, "unknown key sequence_parallel"),
        ({"expert_parallel": {}}, "expert_parallel is not for prompts"),
        ({"nothing_like_it": 1}, "unknown key nothing_like_it: DeepSpeed has no such section"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op is not for prompts"),
        ({"aio": {"block_sizes": 1}}, "unknown key aio.block_sizes, did you mean block_size?"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "did you mean grad_accum_dtype?"),
        ({"comms_logger": {"enable": True}}, "unknown key comms_logger.enable, did you mean enabled?"),
        ({"timers": {"throughput": {"off": True}}}, "unknown key timers.throughput.off"),
        ({"checkpoint": {"nothing": 1}}, "unknown key checkpoint.nothing, it may be"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage is 'auto', not 0, 1, 2 or 3"),
        ({"zero_optimization": {"overlap_comms": True}}, "zero_optimization.overlap_comms, did you mean overlap_comm?"),
        ({"amp": True}, "amp is not for prompts"),
        ({"flops_profiler": True}, "flops_profiler must be an object, found true"),
        ({"aio": 3}, "aio must be an object, found 3"),
        ({"aio": {"block_size": "big"}}, 'aio.block_size must be a whole number, found "big"'),
        ({"wall_clock_breakdown": "x"}, 'wall_clock_breakdown must be true or false, found "x"'),
        ({"steps_per_print": "x"}, "steps_per_print must be a number"),
        ({"tensorboard": []}, "tensorboard must be an object"),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled must be true or false"),
        ({"checkpoint": {"tag_validation": 3}}, "checkpoint.tag_validation must be Ignore or Warn or Fail, found 3"),
        ({"checkpoint": {"tag_validation": "always"}}, 'must be Ignore or Warn or Fail, found "always"'),
        ({"checkpoint": {"tag_validation": None}}, "must be Ignore or Warn or Fail, found null"),
        ({"checkpoint": {"parallel_write": True}}, "checkpoint.parallel_write must be an object, found true"),
        ({"checkpoint": {"writer": "fast"}}, 'checkpoint.writer must be an object, found "fast"'),
        ({"tensorboard": {"output_path": 3}}, "tensorboard.output_path must be a text, found 3"),
        ({"comms_logger": {"prof_ops": "all_reduce"}}, "comms_logger.prof_ops must be a list of texts"),
        ({"data_types": {"buffer_dtype": 32}}, "data_types.buffer_dtype must be a text, found 32"),
        ({"aio": {"block_size": 1e6}}, "aio.block_size must be a whole number, found 1000000.0"),
        ({"optimizer": {"type": 3}}, "optimizer.type must be a text, found 3"),
        ({"log_level": 3}, "log_level must be a text, found 3"),
        ({"optimizer": {}}, "optimizer has no type"),
        ({"scheduler": {"params": {}}}, "scheduler has no type"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type is 'Lamb', which is no value of train.optimizer"),
        (
            {"scheduler": {"type": "LRRangeTest"}},
            "'LRRangeTest', which is no value of train.schedule",
        ),
    ],
    ids=str,
)
def test_a_key_that_deepspeed_would_ignore_is_refused_and_told_what_it_means(own, says):
    message = error_of(own)
    assert says in message and message.startswith("deepspeed: ")


WRONG = (3, 1.5, "x", True, None, [], ["x"], [3], {}, {"x": 3})
PYTHON = re.compile(
    "object|attribute|operand|subscript|iterable|callable|unhashable|NoneType|argument|Traceback|convert|literal"
)


@pytest.mark.parametrize("section", sorted({*SECTIONS, *OPTIONS} - {"timers.throughput"}))
def test_no_wrong_type_is_answered_in_pythons_words(section):
    options = [*" ".join(OPTIONS.get(section, ())).split(), *(ZERO if section == "zero_optimization" else ())]
    cases = [{section: value} for value in WRONG]
    cases += [{section: {option: value}} for option in options for value in WRONG]
    for own in cases:
        try:
            check_with_deepspeed(without_autos(fill(own)), "d.json")
        except UserError as error:
            message = str(error)
            assert "\n" not in message
            found = PYTHON.search(message.replace("must be an object", ""))
            assert found is None, f"{own}: {message}"


def test_a_seed_is_the_configs_own_or_refused():
    assert "seed is 5 but the config's seed is 0" in error_of({"seed": 5})
    assert "seed" not in fill({"seed": 0}) and "seed" not in fill({"seed": "auto"})


@pytest.mark.parametrize(
    "own",
    [{"compile": None}, {"hybrid_engine": False}, {"sparse_gradients": False}, {"amp": {"enabled": False}}],
    ids=str,
)
def test_a_section_that_is_off_is_taken_also_where_deepspeed_has_none_or_needs_an_object(own):
    check_with_deepspeed(without_autos(fill(own)), "d.json")


def test_a_key_of_a_part_of_deepspeed_that_is_not_used_is_noted():
    assert "dataloader_drop_last" in (describe_unused(fill({"dataloader_drop_last": True})) or "")


def test_a_preset_given_by_a_path_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="comes with the package: set deepspeed=zero3_fp32$"):
        load_deepspeed_json("nowhere/configs/deepspeed/zero3_fp32.json")


def test_the_names_are_those_of_deepspeed():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    sections = {
        "comms_logger": CommsLoggerConfig,
        "comet": CometConfig,
        "csv_monitor": CSVConfig,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }
    for name, kind in sections.items():
        assert set(" ".join(OPTIONS[name]).split()) == set(kind.model_fields), name
    assert set(" ".join(OPTIONS["aio"]).split()) == set(AIO_DEFAULT_DICT)
    assert {*ZERO, *RENAMED, *OFFLOADS} >= set(DeepSpeedZeroConfig.model_fields)
    read: list[str] = []

    class Reading(dict):
        def get(self, key, default=None):
            read.append(key)
            return super().get(key, default)

        def __contains__(self, key):
            read.append(key)
            return super().__contains__(key)

        def keys(self):
            return self

    config = object.__new__(DeepSpeedConfig)
    config._initialize_params(Reading())
    unknown = set(read) - set(SECTIONS) - {constants.BFLOAT16_OLD}
    assert not unknown
