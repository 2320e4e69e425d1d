"""How fast are phantoms made and slices loaded?  ``make bench`` prints the table and stores it.

Making: cases per second with one worker and with two, and the largest memory of all processes.
Loading: images per second of one 64×64 epoch, from PNG through a DataLoader (the way the seed
project read them), the same with two loader processes,
and from memory (``load_slices``), as ratios to the first in the same run.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from oasis_helpers.data import OASISDataset, find_data, load_slices, slice_transform, to_unit_range
from oasis_helpers.phantoms import make_phantoms

RESULT = Path(__file__).with_name("data.json")
SIZE, BATCH, RUNS = 64, 32, 3


def timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peak_mb() -> float:
    """Largest resident memory so far: this process plus its largest child, in MB."""
    used = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used) / 1e3


def measure_phantoms() -> dict[str, float]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for workers in (1, 2):
            seconds = timed(lambda w=workers: make_phantoms(Path(folder) / str(w), (8, 0, 0), workers=w))
            found[f"8 cases, {workers} worker(s), cases/s with start-up"] = 8 / seconds
        found["default set (48 cases), s"] = timed(lambda: make_phantoms(Path(folder) / "48"))
    found["memory of parent and largest worker, MB"] = peak_mb()
    return found


def measure_loading() -> dict[str, float]:
    root = find_data().train
    dataset = OASISDataset(root, slice_transform(SIZE))
    slices = load_slices(root, SIZE)

    def epoch(loader):
        for batch in loader:
            assert batch.shape[1:] == (1, SIZE, SIZE)

    def from_memory():
        for picked in torch.randperm(len(slices), generator=torch.Generator().manual_seed(0)).split(BATCH):
            assert to_unit_range(slices[picked]).shape[1:] == (1, SIZE, SIZE)

    ways = {
        "PNG, DataLoader": lambda: epoch(DataLoader(dataset, BATCH, shuffle=True)),
        "PNG, DataLoader, 2 processes": lambda: epoch(
            DataLoader(dataset, BATCH, shuffle=True, num_workers=2)
        ),
        "memory (load_slices)": from_memory,
    }
    seconds = {name: statistics.median(timed(work) for _ in range(RUNS)) for name, work in ways.items()}
    return {name: len(dataset) / s for name, s in seconds.items()}


def main() -> None:
    phantoms, loading = measure_phantoms(), measure_loading()
    for name, value in phantoms.items():
        print(f"{name:<55} {value:10.2f}")
    first = next(iter(loading.values()))
    for name, value in loading.items():
        print(f"{name + ', images/s':<55} {value:10.0f}   ×{value / first:.1f}")
    machine = f"{os.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}"
    result = {"machine": machine, "phantoms": phantoms, "loading, images/s": loading}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
