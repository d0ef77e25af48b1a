"""What other trainers write for a value that we have under another name."""

# By key; theirs in lower case and without `torch.`.
FOREIGN_VALUES = {
    "model.dtype": {
        "bf16": "bfloat16",
        "bf16-mixed": "bfloat16",
        "bf16-true": "bfloat16",
        "bfloat16": "bfloat16",
        "float": "float32",
        "float16": "float16",
        "float32": "float32",
        "fp16": "float16",
        "fp32": "float32",
        "half": "float16",
    },
    "model.quantization": {"8bit": "int8", "float8": "fp8"},
    "prompt.init": {"random": "random", "text": "text"},
    "prompt.method": {
        "p-tuning": "p_tuning",
        "p_tuning": "p_tuning",
        "prefix-tuning": "prefix_tuning",
        "prefix_tuning": "prefix_tuning",
        "prompt-tuning": "prompt_tuning",
        "prompt_tuning": "prompt_tuning",
    },
    "train.optimizer": {
        "adafactor": "adafactor",
        "adamw": "adamw",
        "adamw_hf": "adamw",
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "sgd": "sgd",
    },
}


def name_value(key: str, value: object) -> str:
    """What a value of another trainer is called here, for the end of a message; empty where that is not known."""
    given = value.lower().removeprefix("torch.") if isinstance(value, str) else ""
    ours = FOREIGN_VALUES.get(key, {}).get(given)
    return f": write {ours}" if ours else ""
