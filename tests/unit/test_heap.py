"""Freed memory is kept for the next allocation, and given back when asked."""

from __future__ import annotations

import subprocess
import sys

import pytest

from anomaly_workers import heap

SCRIPT = """
import resource, sys
import torch
from anomaly_workers import heap

torch.set_num_threads(1)
kept = sys.argv[1] == "keep" and heap.keep_freed({})
torch.zeros(24, 1_000_000).clone()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    rows = [torch.ones(1_000_000) for _ in range(24)]
    del rows
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
size = lambda: int(open("/proc/self/statm").read().split()[1]) * 4
high = size()
heap.give_back()
print(int(kept), faults, high, size())
"""

pytestmark = pytest.mark.skipif(heap._glibc() is None, reason="only glibc is told what to do with freed memory")


def run(way: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, way], capture_output=True, text=True, check=True)
    return [int(value) for value in done.stdout.split()]


def test_kept_memory_is_not_cleared_anew_for_each_tensor() -> None:
    kept, few, high, low = run("keep")
    _, many, _, _ = run("plain")
    assert kept
    assert few < many / 4
    assert low < high - 50_000  # kilobytes, of the 96 MB that were free


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_whoever_chose_an_allocator_keeps_it(name: str) -> None:
    assert not heap.keep_freed({name: "1"})
