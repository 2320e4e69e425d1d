"""How fast are phantoms made and slices loaded?  ``make bench`` prints the table and stores it.

Making: seconds and peak memory of fresh processes, for the default set and for OASIS's size.
Loading: images per second of one 64×64 epoch, from PNG through a DataLoader (the way the seed
project read them), the same with two loader processes, and from memory (``load_slices``), as
ratios to the first in the same run.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import joblib
import torch
from measure import measured
from torch.utils.data import DataLoader

from oasis_helpers.data import OASISDataset, find_data, load_slices, slice_transform, to_unit_range

RESULT = Path(__file__).with_name("data.json")
SIZE, BATCH, RUNS = 64, 32, 3


def timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def make(folder: Path, cases: tuple[int, int, int], workers: int) -> tuple[float, float]:
    """Seconds and MB of one fresh process (and its workers) that makes phantoms."""
    command = [sys.executable, "-m", "oasis_helpers", "phantoms", str(folder), "--workers", str(workers)]
    command += ["--cases", *map(str, cases)]
    code, seconds, megabytes = measured(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {code}")
    return seconds, megabytes


def measure_phantoms() -> dict[str, float]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for workers in (1, 2):
            seconds, _ = make(Path(folder) / f"eight-{workers}", (8, 0, 0), workers)
            found[f"8 cases, {workers} worker(s), s with start-up"] = seconds
        for cases in ((36, 6, 6), (302, 35, 17)):
            seconds, megabytes = make(Path(folder) / str(sum(cases)), cases, 2)
            found[f"{sum(cases)} cases, 2 workers, s"] = seconds
            found[f"{sum(cases)} cases, 2 workers, MB"] = megabytes
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
    machine = f"{joblib.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}"
    result = {"machine": machine, "phantoms": phantoms, "loading, images/s": loading}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
