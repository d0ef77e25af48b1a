"""The types of the options of DeepSpeed's JSON beside switches and numbers, which DeepSpeed takes for granted."""

import json
from typing import Any

TEXTS = """
checkpoint.tag_validation comet.api_key comet.experiment_key comet.experiment_name comet.mode comet.project
comet.workspace communication_data_type csv_monitor.job_name csv_monitor.output_path data_types.buffer_dtype
data_types.grad_accum_dtype data_types.param_dtype flops_profiler.output_file gradient_allreduce_op log_level
optimizer.type scheduler.type seq_parallel_communication_data_type tensorboard.job_name tensorboard.output_path
torch_autocast.dtype wandb.group wandb.project wandb.team
""".split()
LISTS_OF_TEXTS = """
comms_logger.prof_ops data_types.keep_in_fp32_modules torch_autocast.lower_precision_safe_modules
""".split()
OBJECTS = "checkpoint.parallel_write checkpoint.writer".split()
SWITCHES = "checkpoint.checkpoint_serialization".split()
WHOLE_NUMBERS = "aio.block_size aio.queue_depth aio.intra_op_parallelism".split()
CHOICES = {"checkpoint.tag_validation": ("Ignore", "Warn", "Fail")}
NOT_NULL = ("checkpoint.tag_validation", "checkpoint.parallel_write")  # DeepSpeed asks no further


def check_other_type(path: str, value: Any) -> None:
    """Raise ValueError where an option, named by its dotted path, has a value of another type than DeepSpeed needs."""
    if value == "auto" or (value is None and path not in NOT_NULL):
        return
    wanted = ""
    if path in CHOICES:
        names = [name.lower() for name in CHOICES[path]]
        wanted = "" if isinstance(value, str) and value.lower() in names else " or ".join(CHOICES[path])
    elif path in TEXTS and not isinstance(value, str):
        wanted = "a text"
    elif path in LISTS_OF_TEXTS and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        wanted = "a list of texts"
    elif path in OBJECTS and not isinstance(value, dict):
        wanted = "an object"
    elif path in SWITCHES and not isinstance(value, bool):
        wanted = "true or false"
    elif path in WHOLE_NUMBERS and not (isinstance(value, int) and not isinstance(value, bool)):
        wanted = "a whole number"
    if wanted:
        raise ValueError(f"{path} must be {wanted}, found {json.dumps(value, default=str)}")
