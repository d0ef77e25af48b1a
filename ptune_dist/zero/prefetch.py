"""How far ZeRO-3 gathers ahead: one layer, by the sizes of the base's own layers.

While a layer computes, the next one is gathered. DeepSpeed's own numbers are fixed, and Hugging Face's follow from the
width alone: either ends a prefetch after a few matrices of a large layer, and the rest of each gather is waited for.
"""

from typing import Any

from torch import nn

from ptune_dist.base.layers import layers_of
from ptune_dist.zero.residency import DEFAULT_LIVE, LIVE, NUM_AT_WORK, count_elements

BUCKET = "stage3_prefetch_bucket_size"  # elements that are gathered ahead
REUSE = "stage3_max_reuse_distance"  # what is used again within so many elements is not released before


def settle_prefetch(content: dict[str, Any], base: nn.Module) -> None:
    """Fill DeepSpeed's sizes of ZeRO-3 [elements] where they are absent or "auto"; a number that is given is kept.

    Elements are counted whatever their dtype, as DeepSpeed does. With the base on NVMe a gathered tensor keeps its swap
    buffer: layers are released at once, and a bucket is a layer at most.
    """
    zero = content["zero_optimization"]
    if zero.get("stage") != 3:
        for key in (BUCKET, LIVE, REUSE):
            if zero.get(key) == "auto":
                del zero[key]
        return
    of_a_layer = max((count_elements(layer) for layer in layers_of(base)), default=0)
    is_on_nvme = (zero.get("offload_param") or {}).get("device") == "nvme"
    at_work = NUM_AT_WORK * of_a_layer
    sizes = {
        BUCKET: of_a_layer,
        LIVE: at_work if is_on_nvme else max(DEFAULT_LIVE, at_work),
        REUSE: 0 if is_on_nvme else DEFAULT_LIVE,
    }
    for key, size in sizes.items():
        if zero.get(key, "auto") == "auto":
            zero[key] = size
    if is_on_nvme:
        zero[BUCKET] = min(zero[BUCKET], of_a_layer)
