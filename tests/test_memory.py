"""The peak of one run alone, and who holds how much."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cl_moe import memory
from cl_moe.memory import PeakMemory, optimizer_bytes, storage_bytes

MIB = 2**20
PROC = Path("/proc/self/clear_refs")
TRIES = 3
"""A busy kernel takes pages of files away and brings them back while a peak is measured, seldom so often."""
linux = pytest.mark.skipif(not PROC.exists(), reason="only Linux can set a process's peak back")


def peak_of(mib: int, held: int = 0) -> float:
    """MiB that a run is said to need, which takes so many and gives them back."""
    peak = PeakMemory()
    peak.start(held)
    taken = torch.ones(mib * MIB // 4)
    assert taken[-1] == 1
    del taken
    return peak.bytes() / MIB


@linux
def test_what_a_run_takes_is_what_it_needed_and_no_later_run_inherits_it():
    assert any(195 <= peak_of(200) <= 230 for _ in range(TRIES))
    assert any(peak_of(1) <= 30 for _ in range(TRIES))
    assert any(
        195 <= peak_of(200) <= 230 for _ in range(TRIES)
    )  # also where this process had the memory before


@linux
def test_what_it_holds_already_is_its_own():
    data = torch.ones(100 * MIB // 4)
    assert any(145 <= peak_of(50, held=storage_bytes([data])) <= 180 for _ in range(TRIES))


@linux
def test_small_pieces_that_were_freed_count_for_who_takes_them_again():
    def pieces() -> list[torch.Tensor]:
        return [torch.ones(MIB // 16) for _ in range(400)]  # 100 MiB below glibc's threshold for its own maps

    def measured() -> float:
        freed = pieces()
        behind = pieces()[-1]  # so that glibc does not give back by itself what lies before it
        del freed
        peak = PeakMemory()
        peak.start()
        pieces()
        del behind
        return peak.bytes() / MIB

    assert any(90 <= measured() <= 130 for _ in range(TRIES))


def test_a_resumed_run_keeps_its_higher_peak():
    peak = PeakMemory()
    peak.start()
    peak.earlier = 10**15
    assert peak.bytes() == 10**15


def test_where_the_peak_cannot_be_set_back_it_is_the_processs(monkeypatch: pytest.MonkeyPatch):
    def refused(self: Path, text: str) -> int:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refused)
    peak = PeakMemory()
    peak.start()
    assert peak.bytes() == memory._process_peak() > 50 * MIB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_it_is_the_gpus_memory():
    before = torch.ones(50 * MIB // 4, device="cuda")
    peak = PeakMemory()
    peak.start()
    del before
    torch.ones(120 * MIB // 4, device="cuda").sum().item()
    assert 60 * MIB <= peak.bytes() <= 130 * MIB


def test_shared_storage_counts_once():
    whole = torch.zeros(10, 4)
    assert storage_bytes([whole, whole[:5], whole.t(), torch.zeros(2, dtype=torch.int64)]) == 160 + 16


def test_what_optimizers_remember():
    weight = torch.nn.Parameter(torch.ones(10))
    optimizer = torch.optim.AdamW([weight])
    assert optimizer_bytes([optimizer]) == 0
    weight.sum().backward()
    optimizer.step()
    assert optimizer_bytes([optimizer]) == 2 * 40 + 4  # two moments, and a step in float32


def test_no_library_is_loaded_for_it():
    code = "import sys; import cl_moe.memory; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("most", [2**40, 2**25], ids=["a newer glibc", "before 2.35"])
def test_an_allocator_that_refuses_large_thresholds_keeps_what_is_freed_all_the_same(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """To set one threshold alone would fix the other at 128 KiB: each larger block a fresh one."""
    taken: dict[int, int] = {}

    def mallopt(which: int, value: int) -> int:
        if which == memory._MMAP_THRESHOLD and value > most:
            return 0
        taken[which] = value
        return 1

    for name in memory._TUNED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    memory.keep_freed(whole=False)
    assert not taken
    memory.keep_freed()
    assert taken[memory._MMAP_THRESHOLD] == min(most, 2**28)
    assert taken[memory._TRIM_THRESHOLD] == 2**29
