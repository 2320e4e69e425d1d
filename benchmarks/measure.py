"""Wall time and peak memory of a command with all its processes.

``python benchmarks/measure.py make test`` prints both at the end. Memory is the sum over the
processes of the *proportional* set size, in which a page that several processes share counts
once; it is read four times a second, so a shorter peak can be missed. Linux only (PSS is not told
elsewhere).
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

INTERVAL = 0.25  # seconds


def _memory(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:  # it ended meanwhile
        return 0


def measured(command: Sequence[str], **options) -> tuple[int, float, float]:
    """Run ``command`` to its end: exit code, seconds and the largest total memory in MB."""
    started = time.perf_counter()
    process = subprocess.Popen(command, **options)
    root, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            tree = [root, *root.children(recursive=True)]
        except psutil.Error:
            break
        peak = max(peak, sum(map(_memory, tree)))
        time.sleep(INTERVAL)
    return process.wait(), time.perf_counter() - started, peak / 1e6


if __name__ == "__main__":
    code, seconds, megabytes = measured(sys.argv[1:])
    print(f"{' '.join(sys.argv[1:])}: {seconds:.0f} s, at most {megabytes:,.0f} MB")
    sys.exit(code)
