"""Write docs/benchmarks/gpu_traffic.json: launches and bytes of a layer of an 8B, and the speed to expect on an H100.

    python -m tests.gpu_offline.traffic

Nothing is measured on a GPU. Launches and bytes are counted on fake tensors, each input and output of an operation
once. The time of a layer is that of its products at a share of the peak, of its attention, and of the other bytes at
the memory's speed, one after the other; the head is counted as a product. The host, the optimizer and embeddings are
left out.
"""

import json
from typing import Any

from tests.gpu_offline.faked import run_faked
from tests.gpu_offline.work_layer import SHAPE_8B
from tests.processes import ROOT

OUT = ROOT / "docs" / "benchmarks" / "gpu_traffic.json"
WORK = "tests.gpu_offline.work_layer:run_layer"
NUM_POSITIONS = 8192
NUM_LAYERS = 32
VOCABULARY = 128_256
WAYS = {
    "eager": {"is_merged": False, "is_fused": False},
    "merged": {"is_merged": True, "is_fused": False},
    "merged and fused": {"is_merged": True, "is_fused": True},
}
ASSUMED = {
    "peak_bf16_tflops": 989.0,  # NVIDIA's data sheet of the H100 SXM, dense
    "product_share_of_peak": 0.71,  # seven products of a layer in 10.2 ms, forward and backward
    "bytes_per_s": 3.0e12,  # of 3.35e12 on the data sheet
    "attention_ms": 1.4,  # flex attention of a layer, forward and backward
    "target_share": 0.13,  # of the positions, which have logits
}


def product_flops() -> tuple[float, float]:
    """Of a layer and of the head, forward and the gradient of the input."""
    width = SHAPE_8B["hidden_size"]
    grouped = width * SHAPE_8B["num_key_value_heads"] // SHAPE_8B["num_attention_heads"]
    weights = width * (2 * width + 2 * grouped + 3 * SHAPE_8B["intermediate_size"])
    of_head = 4.0 * width * VOCABULARY * NUM_POSITIONS * ASSUMED["target_share"]
    return 4.0 * weights * NUM_POSITIONS, of_head


def expect(counts: dict[str, Any]) -> dict[str, float]:
    of_layer, of_head = product_flops()
    speed = ASSUMED["peak_bf16_tflops"] * 1e12 * ASSUMED["product_share_of_peak"]
    elementwise_ms = 1000 * counts["elementwise_bytes"] / ASSUMED["bytes_per_s"]
    layer_ms = 1000 * of_layer / speed + ASSUMED["attention_ms"] + elementwise_ms
    step_ms = NUM_LAYERS * layer_ms + 1000 * of_head / speed
    return {
        "elementwise_ms": round(elementwise_ms, 2),
        "layer_ms": round(layer_ms, 2),
        "tokens_per_s": round(1000 * NUM_POSITIONS / step_ms),
    }


def main() -> None:
    found = run_faked(WORK, [how | {"lengths": [NUM_POSITIONS]} for how in WAYS.values()])
    ways = {}
    for name, layer in zip(WAYS, found, strict=True):
        counts = layer["counts"]
        ways[name] = {
            "launches": counts["launches"],
            "products": counts["product_launches"],
            "elementwise_gb": round(counts["elementwise_bytes"] / 1e9, 2),
            "compiled_kernels": len({kernel["name"] for kernel in layer["kernels"]}),
            "host_waits": len(counts["waits"]),
            "gb_by_name": {key: round(value / 1e9, 3) for key, value in counts["bytes_by_name"].items()},
        } | {"expected_on_an_h100": expect(counts)}
    content = {"about": __doc__.strip(), "positions": NUM_POSITIONS, "shape": SHAPE_8B | {"layers": NUM_LAYERS}}
    OUT.write_text(json.dumps(content | {"assumed": ASSUMED, "layer": ways}, indent=1) + "\n")


if __name__ == "__main__":
    main()
