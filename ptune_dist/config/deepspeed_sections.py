"""Sections of DeepSpeed's JSON that change what is computed, or need what is not here: refused by name."""

from importlib.util import find_spec
from typing import Any

from ptune_dist.errors import UserError

# Sections that change the training, and what to do instead. One that is empty or off is taken.
REFUSED = {
    **dict.fromkeys(
        ("bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states", "fp16.fp16_master_weights_and_grads"),
        "a prompt, its gradients and its optimizer state are float32",
    ),
    "amp": "it would change the precision that model.dtype names",
    "autotuning": "the size of micro-batches is tuned by train.micro_batch_tokens=auto",
    "communication_data_type": "a prompt's gradients are summed in float32",
    "compile": "model.compile compiles the base",
    "compression_training": "weights are stored in 8 bits by model.quantization",
    "curriculum_learning": "rows are shuffled by seed, and not by difficulty",
    "data_efficiency": "rows are shuffled by seed, and none are left out",
    "eigenvalue": "weights are stored in 8 bits by model.quantization",
    "elasticity": "launch/run.sh restarts a job on any number of ranks",
    "expert_parallel": "the base is sharded by zero_optimization only",
    "gradient_allreduce_op": "a prompt's gradients are averaged over the batch",
    "hybrid_engine": "ptune-dist generate answers with a prompt",
    "pipeline": "the base is sharded by zero_optimization only",
    "progressive_layer_drop": "no layer of the base is left out",
    "quantize_training": "weights are stored in 8 bits by model.quantization",
    "sequence_parallel_size": "the base is sharded by zero_optimization only",
    "sparse_attention": "attention is the base's own",
    "tensor_parallel": "the base is sharded by zero_optimization only",
    "torch_autocast": "it would change the precision that model.dtype names",
    "weight_quantization": "weights are stored in 8 bits by model.quantization",
    "zero_optimization.zenflow": "the optimizer is not DeepSpeed's",
    "zero_optimization.offload_optimizer.super_offload": "the optimizer is not DeepSpeed's",
}
# One number in a section says whether it is on: no more than one part means off.
PARTS = {"tensor_parallel": "autotp_size", "sequence_parallel_size": ""}
SAME_AS_OURS = {"communication_data_type": ("fp32", None), "gradient_allreduce_op": ("mean", None)}
# Sections that DeepSpeed itself refuses, even where they are off.
REMOVED = ("graph_harvesting", "nebula", "sparse_gradients")
PACKAGES = {"wandb": "wandb", "comet": "comet_ml"}


def refuse_sections(content: dict[str, Any], file: str) -> None:
    """Raise UserError for the first section that is on and contradicts how this package trains."""
    for path, reason in REFUSED.items():
        node: Any = content
        for part in path.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if is_on(path, node):
            raise UserError(f"{file}: {path} is not for prompts: {reason}: remove it")
    for section in [name for name in content if name in REFUSED or name in REMOVED]:
        if not is_on(section, content[section]):
            del content[section]
    for section, package in PACKAGES.items():
        node = content.get(section)
        if isinstance(node, dict) and node.get("enabled") and not find_spec(package):
            raise UserError(
                f"{file}: {section} needs the package {package}, which is not installed, and would log nothing: "
                "remove it; a run's figures are in metrics.jsonl and tensorboard/"
            )


def is_on(path: str, node: Any) -> bool:
    """Whether a section asks for something. Without `enabled` or `disable`, any section that is not empty does."""
    if path in SAME_AS_OURS and (node is None or node in SAME_AS_OURS[path]):
        return False
    if path == "expert_parallel" and node == {}:
        return True
    if path in PARTS:
        size = node.get(PARTS[path]) if isinstance(node, dict) else node
        return bool(node) and size not in (0, 1)
    if not isinstance(node, dict):
        return bool(node)
    if "enabled" in node:
        return bool(node["enabled"])
    return bool(node) and not node.get("disable")
