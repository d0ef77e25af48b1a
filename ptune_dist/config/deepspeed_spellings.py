"""One spelling of DeepSpeed's JSON: its aliases and older keys become the names that DeepSpeed documents today."""

from typing import Any

# DeepSpeed takes these keys of zero_optimization with and without `stage3_`.
STAGE_3_KEYS = """
prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters max_reuse_distance
gather_16bit_weights_on_model_save module_granularity_threshold use_all_reduce_for_fetch_params allgather_sequential
""".split()
RENAMED = {
    **{key: f"stage3_{key}" for key in STAGE_3_KEYS},
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}
OFFLOADS = {
    "cpu_offload": "offload_optimizer",
    "cpu_offload_param": "offload_param",
    "cpu_offload_params": "offload_param",
}
# An "auto" here is DeepSpeed's own default, as accelerate and Hugging Face's Trainer have it.
AUTO_IS_DEFAULT = (
    "zero_allow_untested_optimizer",
    "wall_clock_breakdown",
    "steps_per_print",
    "prescale_gradients",
    "communication_data_type",
    "fp16.auto_cast",
    "fp16.loss_scale",
    "fp16.loss_scale_window",
    "fp16.initial_scale_power",
    "fp16.hysteresis",
    "fp16.min_loss_scale",
    "zero_optimization.overlap_comm",
    "zero_optimization.reduce_scatter",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.allgather_partitions",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.round_robin_gradients",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.offload_param.device",
    "zero_optimization.offload_param.pin_memory",
    "zero_optimization.offload_param.nvme_path",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.offload_optimizer.nvme_path",
)


def use_one_spelling(content: dict[str, Any]) -> None:
    """Rename aliases and older keys in place. Raises ValueError for two spellings of one key that differ."""
    if "bfloat16" in content:
        move(content, "bfloat16", "bf16", content.pop("bfloat16"))
    zero = content.get("zero_optimization")
    if isinstance(zero, bool):  # the oldest form
        content["zero_optimization"] = {"stage": int(zero)}
    if isinstance(zero, dict):
        for old, new in RENAMED.items():
            if old in zero:
                move(zero, old, new, zero.pop(old))
        is_pinned = zero.pop("cpu_offload_use_pin_memory", None)
        for old, new in OFFLOADS.items():
            if zero.pop(old, None) is True and zero.get(new) is None:
                zero[new] = {"device": "cpu"} | ({"pin_memory": is_pinned} if is_pinned is not None else {})
        for key in ("offload_param", "offload_optimizer"):
            if key in zero and zero[key] is None:
                del zero[key]
    for path in AUTO_IS_DEFAULT:
        *parents, leaf = path.split(".")
        node: Any = content
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict) and node.get(leaf) == "auto":
            del node[leaf]


def move(section: dict[str, Any], old: str, new: str, value: Any) -> None:
    """Give a value its new name. Raises ValueError where that has another value."""
    if section.setdefault(new, value) != value:
        raise ValueError(f"{old} and {new} are the same key, and their values differ: keep one")
