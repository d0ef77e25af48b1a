"""What DeepSpeed's JSON may ask for and a base without a DeepSpeed optimizer cannot give: said once, not ignored."""

from typing import Any

from ptune_dist.config.deepspeed_json import zero_stage

# They report or profile the steps of DeepSpeed's engine, which takes none.
ABOUT_STEPS = ("flops_profiler", "wall_clock_breakdown", "tensorboard", "wandb", "comet", "csv_monitor")
# They are about parts of DeepSpeed that are not used: its accumulation, its checkpoints, its experts and sequences.
ABOUT_OTHERS = (
    "managed_gradient_accumulation",
    "datastates_ckpt",
    "use_data_before_expert_parallelism",
    "seq_parallel_communication_data_type",
    "dataloader_drop_last",
)
# They are about gradients of a base, and a frozen one has none.
ABOUT_GRADIENTS = ("prescale_gradients", "sparse_gradients")
ABOUT_GRADIENTS_IN_ZERO = ("round_robin_gradients",)
# They are about DeepSpeed's own checkpoints, which are not written. Below are its defaults of section checkpoint.
ABOUT_CHECKPOINTS_IN_ZERO = ("elastic_checkpoint", "pipeline_loading_checkpoint", "save_muon_momentum_buffer_in_memory")
DEFAULTS_OF_CHECKPOINT = {"tag_validation": "warn", "checkpoint_serialization": True}
# They describe what DeepSpeed does with a base that it has, which it has at stage 3.
ABOUT_THE_BASE = ("comms_logger", "memory_breakdown", "dump_state")


def describe_unused(content: dict[str, Any]) -> str | None:
    """One line that names the sections that are on and change nothing; None where there are none."""
    about = ABOUT_STEPS if zero_stage(content) == 3 else ABOUT_STEPS + ABOUT_THE_BASE
    found = [name for name in about if is_on(content.get(name))]
    if zero_stage(content) != 3 and content.get("data_types", {}).get("buffer_dtype") is not None:
        found.append("data_types.buffer_dtype")
    if content.get("data_types", {}).get("grad_accum_dtype") not in (None, "fp32"):  # a prompt's are summed in float32
        found.append("data_types.grad_accum_dtype")
    zero = content.get("zero_optimization", {})
    in_zero = ABOUT_GRADIENTS_IN_ZERO + ABOUT_CHECKPOINTS_IN_ZERO
    found += [f"zero_optimization.{name}" for name in in_zero if is_on(zero.get(name))]
    found += [f"checkpoint.{name}" for name in content.get("checkpoint", {}) if asks_of_checkpoint(content, name)]
    found += [name for name in (*ABOUT_GRADIENTS, *ABOUT_OTHERS) if is_on(content.get(name))]
    if content.get("gradient_predivide_factor", 1) != 1:
        found.append("gradient_predivide_factor")
    if not found:
        return None
    return (
        f"deepspeed: no effect: {', '.join(found)}: DeepSpeed only shards the base, and at ZeRO 3 only; a run's own "
        "figures are in metrics.jsonl and tensorboard/"
    )


def asks_of_checkpoint(content: dict[str, Any], name: str) -> bool:
    """Whether an option of the section `checkpoint` asks for something else than DeepSpeed's default."""
    value = content["checkpoint"][name]
    if name in DEFAULTS_OF_CHECKPOINT:
        return (value.lower() if isinstance(value, str) else value) != DEFAULTS_OF_CHECKPOINT[name]
    if name == "parallel_write":
        return any(map(is_on, value.values())) if isinstance(value, dict) else False
    return bool(value)


def is_on(section: Any) -> bool:
    return bool(section.get("enabled")) if isinstance(section, dict) else bool(section)
