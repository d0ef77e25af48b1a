"""The probe: throughput without the warm-up, and memory in addition to the base."""

import subprocess
import sys
import time

import numpy as np
import pytest

from ptune_dist.bench.machine import (
    OtherLoad,
    describe_commit,
    describe_hardware,
    describe_versions,
    wait_until_quiet,
)
from ptune_dist.bench.probe import Probe, steady_figures


def test_the_first_five_steps_are_left_out_of_throughput():
    figures = steady_figures(2.0, 3.0, [100] * 5 + [4] * 5, [900] * 5 + [30] * 5)
    assert figures == {
        "samples_per_s": 10,
        "tokens_per_s": 75,
        "cpu_s_per_1000_tokens": 20,
        "step_s": 0.4,
        "rows_timed": 20,
        "tokens_timed": 150,
    }


@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's high-water mark")
def test_extra_memory_is_the_peak_after_the_base_and_forgets_the_peak_before_it():
    size = 96 << 20
    before = np.ones(2 * size, dtype=np.uint8)  # a peak while loading
    del before
    base = np.ones(size, dtype=np.uint8)
    probe = Probe()
    probe.base_loaded()
    extra = np.ones(size // 2, dtype=np.uint8)
    found = probe.memory()
    assert abs(found["extra_memory_bytes"] - size // 2) < size // 6
    assert found["peak_memory_bytes"] >= 2 * size
    assert base.nbytes + extra.nbytes


def test_the_machine_is_described():
    assert describe_hardware()["cpu"] and describe_versions()["python"]
    assert describe_commit() is None or len(describe_commit()["commit"]) == 40
    share = OtherLoad.start().share()
    assert share is None or share >= 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's account of CPU time")
def test_other_work_is_measured_and_waited_for_but_not_forever():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        other_load = OtherLoad.start()
        began = time.monotonic()
        wait_until_quiet(1.0, share=1e-9, sample_s=0.3)
        assert 1.0 <= time.monotonic() - began < 10
        assert other_load.share() > 0.02  # a child counts as other work until it has ended
    finally:
        busy.kill()
        busy.wait()
