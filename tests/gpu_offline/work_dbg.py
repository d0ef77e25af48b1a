import traceback

from tests.gpu_offline import work_model


def go(**k):
    try:
        r = work_model.run_case(**k)
        return [
            k,
            r["gradients"],
            r["counts"]["waits"],
            r["counts"]["uploads"],
            r["counts"]["launches"],
            sorted(n for n in r["counts"]["launches_by_name"] if "softmax" in n or "attention" in n),
        ]
    except Exception as e:
        t = traceback.format_exc().splitlines()
        return [k, "FAIL", [l for l in t if "work" in l and "File" in l or "transformers" in l][-5:], str(e)[:300]]
