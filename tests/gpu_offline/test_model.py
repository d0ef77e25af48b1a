"""The whole model on fake CUDA tensors: nothing on the wrong device, and the host waits for nothing."""

import pytest

from tests.gpu_offline.faked import run_faked

pytestmark = [pytest.mark.long, pytest.mark.extended]

WORK = "tests.gpu_offline.work_model:run_case"
CAUSAL = [
    {"family": "causal", "placement": placement, "method": method}
    for placement in ("prefix", "infix", "template")
    for method in ("prompt_tuning", "p_tuning")
] + [{"family": "causal", "placement": placement, "method": "prefix_tuning"} for placement in ("prefix", "infix")]
OTHERS = [
    {"family": family, "placement": placement, "method": method}
    for family, placement in (("seq2seq", "encoder"), ("seq2seq", "decoder"), ("encoder", "prefix"))
    for method in ("prompt_tuning", "p_tuning")
]
MORE = [{"int8": True}, {"recompute": True}, {"int8": True, "recompute": True}, {"dtype": "float32"}, {"narrow": True}]
CASES = CAUSAL + OTHERS + [CAUSAL[2] | more for more in MORE]


@pytest.mark.parametrize("gpu", ["sm_90", "sm_75"])
def test_a_pass_forward_and_backward_waits_for_nothing(gpu):
    # Only causal bases have another attention on a T4.
    cases = [case | {"dtype": "float16"} for case in CAUSAL] if gpu == "sm_75" else CASES
    for case, found in zip(cases, run_faked(WORK, cases, gpu), strict=True):
        assert found["gradients"] == ["cuda:0"], case
        assert found["segments"] == (case["family"] == "causal")
        assert not found["counts"]["waits"], (case, found["counts"]["waits"])
        # Padded calls have a softmax or an attention of torch's own; flex attention has neither.
        names = " ".join(found["counts"]["launches_by_name"])
        is_padded = "scaled_dot_product" in names or "softmax" in names.replace("log_softmax", "")
        has_flex = gpu != "sm_75" and case["family"] == "causal" and not case.get("narrow")
        assert is_padded != has_flex, (case, names)
