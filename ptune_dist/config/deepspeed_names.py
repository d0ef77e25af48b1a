"""The names that DeepSpeed's JSON has: every other key is refused, since DeepSpeed ignores what it does not know."""

import difflib
import json
from typing import Any

from ptune_dist.config.deepspeed_spellings import OFFLOADS, RENAMED
from ptune_dist.config.deepspeed_types import check_other_type
from ptune_dist.config.foreign_names import CHECKPOINTING, FOREIGN_NAMES
from ptune_dist.config.schema import TrainConfig

SHARDED = "the base is sharded by zero_optimization only"

# The keys of the top level that DeepSpeed reads, or did once: those are refused by name, unless they are off.
SWITCHES = """
wall_clock_breakdown memory_breakdown dump_state prescale_gradients sparse_gradients disable_allgather disable_python_gc
dataloader_drop_last zero_allow_untested_optimizer zero_force_ds_cpu_optimizer managed_gradient_accumulation
use_data_before_expert_parallelism
""".split()
NUMBERS = "steps_per_print gradient_predivide_factor vocabulary_size seed".split()
OTHERS = """
train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping gradient_allreduce_op
communication_data_type seq_parallel_communication_data_type log_level amp autotuning compile compression_training
curriculum_learning data_efficiency datastates_ckpt eigenvalue elasticity expert_parallel graph_harvesting hybrid_engine
nebula pipeline progressive_layer_drop quantize_training sequence_parallel_size sparse_attention tensor_parallel
weight_quantization optimizer scheduler zero_optimization
""".split()

# The options of each section: those that are true or false, numbers, and others.
OPTIONS = {
    "activation_checkpointing": (
        "partition_activations contiguous_memory_optimization cpu_checkpointing profile "
        "synchronize_checkpoint_boundary",
        "number_checkpoints",
        "",
    ),
    "aio": ("single_submit overlap_events use_gds", "block_size queue_depth intra_op_parallelism", ""),
    "bf16": (
        "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states",
        "",
        "",
    ),
    "checkpoint": (
        "load_universal use_node_local_storage",
        "",
        "tag_validation parallel_write checkpoint_serialization writer",
    ),
    "comet": (
        "enabled online",
        "samples_log_interval",
        "project workspace api_key experiment_name experiment_key mode",
    ),
    "comms_logger": ("enabled prof_all verbose debug", "", "prof_ops"),
    "csv_monitor": ("enabled", "", "output_path job_name"),
    "data_types": ("", "", "grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules"),
    "flops_profiler": ("enabled detailed", "recompute_fwd_factor profile_step module_depth top_modules", "output_file"),
    "fp16": (
        "enabled auto_cast consecutive_hysteresis fp16_master_weights_and_grads",
        "loss_scale initial_scale_power loss_scale_window hysteresis min_loss_scale",
        "",
    ),
    "tensorboard": ("enabled", "", "output_path job_name"),
    "timers": ("", "", "throughput"),
    "timers.throughput": ("enabled synchronized", "", ""),
    "torch_autocast": ("enabled", "", "dtype lower_precision_safe_modules"),
    "wandb": ("enabled", "", "group team project"),
}
SECTIONS = sorted({*SWITCHES, *NUMBERS, *OTHERS, "bfloat16", *(name for name in OPTIONS if "." not in name)})
# The options of zero_optimization, whose types DeepSpeed checks, as it does all of the two sections below it.
ZERO = """
stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions
allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights elastic_checkpoint offload_param
offload_optimizer zenflow sub_group_size cpu_offload_use_pin_memory ignore_unused_parameters legacy_stage1
round_robin_gradients parameter_alignment zero_hpz_partition_size zero_quantized_weights
zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint
override_module_apply log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory leaf_module
""".split()
REMOVED_FROM_ZERO = ("mics_", "zeropp_loco")  # DeepSpeed says why
# What else people give, and where it belongs.
MEANT = {
    **dict.fromkeys(("zero", "zero_stage", "zero3"), 'it is "zero_optimization": {"stage": 3} in DeepSpeed\'s JSON'),
    **dict.fromkeys(("dtype", "torch_dtype", "precision"), "it is model.dtype in the config"),
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpoint"), CHECKPOINTING),
    **dict.fromkeys(("domino", "sequence_parallel", "ulysses", "mics_shard_size"), SHARDED),
    **dict.fromkeys(("lr", "max_lr"), "it is train.learning_rate in the config"),
    "deepspeed": "DeepSpeed's sections are at the top level of its JSON: move its content there",
    "params": "it belongs in optimizer or scheduler",
    "type": "it belongs in optimizer or scheduler",
}


def check_names(content: dict[str, Any]) -> None:
    """Raise ValueError for the first key, or option of a section, that DeepSpeed does not know, or of a wrong type."""
    for key, value in content.items():
        if key not in SECTIONS:
            raise ValueError(f"unknown key {key}{explain(key)}")
        check_type(key, value, key in SWITCHES, key in NUMBERS)
    for path, kinds in OPTIONS.items():
        node: Any = content
        for part in path.split("."):
            node = node.get(part, {}) if isinstance(node, dict) else node
        if node is None and path == "aio":  # DeepSpeed's own default
            continue
        if not isinstance(node, dict):
            raise ValueError(f"{path} must be an object, found {json.dumps(node, default=str)}")
        check_options(path, node, *(kind.split() for kind in kinds))
    for section in ("optimizer", "scheduler"):
        node = content.get(section)
        if isinstance(node, dict):
            check_other_type(f"{section}.type", node.get("type"))
    zero = content.get("zero_optimization")
    if isinstance(zero, dict):
        theirs = [name for name in zero if name.startswith(REMOVED_FROM_ZERO)]
        check_options("zero_optimization", zero, [], [], [*ZERO, *RENAMED.values(), *theirs])


def check_options(path: str, section: dict[str, Any], switches: list[str], numbers: list[str], rest: list[str]) -> None:
    """Raise ValueError for an option that a section does not have, or one of a wrong type."""
    known = [*switches, *numbers, *rest]
    for name, value in section.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            hint = f"did you mean {near[0]}?" if near else f"it may be {', '.join(known)}"
            raise ValueError(f"unknown key {path}.{name}, {hint}")
        check_type(f"{path}.{name}", value, name in switches, name in numbers)


def check_type(path: str, value: Any, is_switch: bool, is_number: bool) -> None:
    """Raise ValueError where a switch is neither true nor false, or a number is none; `auto` and null are taken."""
    check_other_type(path, value)
    if value is None or value == "auto":
        return
    if is_switch and value not in (True, False):
        raise ValueError(f"{path} must be true or false, found {json.dumps(value, default=str)}")
    if is_number and not is_numeric(path, value):
        raise ValueError(f"{path} must be a number, found {json.dumps(value, default=str)}")


def is_numeric(path: str, value: Any) -> bool:
    """Whether a value is a number, or text that is read as one: accelerate writes "inf" for `steps_per_print`."""
    if isinstance(value, str) and path.startswith(("steps_per_print", "fp16.")):
        try:
            float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, int | float) and not isinstance(value, bool)


def explain(key: str) -> str:
    """The end of a message: what an unknown key of the top level may mean."""
    if key in MEANT:
        return f": {MEANT[key]}"
    near = difflib.get_close_matches(key, SECTIONS, n=1, cutoff=0.85)
    if near:
        return f", did you mean {near[0]}?"
    places = [path for path, kinds in OPTIONS.items() if key in " ".join(kinds).split()]
    if key in {*ZERO, *RENAMED, *RENAMED.values(), *OFFLOADS}:
        places.insert(0, "zero_optimization")
    if places:
        return f": it belongs in {' or '.join(places)}"
    if key in TrainConfig.model_fields:
        return f": it is train.{key} in the config"
    if key in FOREIGN_NAMES:
        return f": {FOREIGN_NAMES[key]}"
    return ": DeepSpeed has no such section: remove it"
