"""``make test-processors``: the notebooks against their stored outputs, as other processors run them.

Another processor, or another number of threads, adds in another order and rounds the last bits otherwise.
PyTorch and oneDNN can be told to leave out instructions that this processor has and others have not. As many
notebooks run at once as there are processors for their threads.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

from notebook_tools import CELL_TIMEOUT, ROOT, all_notebooks

ONE = {"OMP_NUM_THREADS": "1"}
PROCESSORS = {
    "SSE 4.1": ONE | {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "AVX2": ONE | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "this one": ONE,
    "this one, two threads": {"OMP_NUM_THREADS": "2"},
}


def capability(processor: str) -> str:
    """What PyTorch believes it runs on, so that a setting it no longer reads is seen in the table."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    environment = os.environ | PROCESSORS[processor]
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def counted(output: str) -> tuple[int, int]:
    """Cells passed and failed, from pytest's last line."""
    last = output.strip().rpartition("\n")[2]
    return tuple(
        sum(map(int, re.findall(rf"(\d+) {word}", last))) for word in ("passed", "(?:failed|errors?)")
    )


def run(notebook: Path, processor: str) -> tuple[str, bool]:
    """A field of the table, and whether every cell passed."""
    command = [sys.executable, "-m", "pytest", str(notebook), "--nbval", "--nbval-current-env"]
    command += [f"--nbval-cell-timeout={CELL_TIMEOUT}", "-q", "-p", "no:cacheprovider"]
    started = time.perf_counter()
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | PROCESSORS[processor], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if result.returncode:
        print(result.stdout[-10_000:] + result.stderr[-2_000:], flush=True)
    passed, failed = counted(result.stdout)
    return f"{passed} / {failed}, {seconds:.0f} s", result.returncode == 0


def main() -> int:
    table, sound, before = {}, True, {}
    for processor, environment in PROCESSORS.items():
        told = capability(processor), environment["OMP_NUM_THREADS"]
        column = table[f"{processor} ({told[0]})"] = before.setdefault(told, [])
        if column:  # a processor that has no more than that: it would run the same instructions
            continue
        at_once = max((os.cpu_count() or 1) // int(environment["OMP_NUM_THREADS"]), 1)
        with ThreadPoolExecutor(at_once) as pool:
            found = pool.map(run, all_notebooks(), repeat(processor))
            for notebook, (field, passed) in zip(all_notebooks(), found):
                print(f"{processor}, {notebook.stem}: {field}", flush=True)
                column.append(field)
                sound &= passed
    print("\n| cells passed / failed | " + " | ".join(table) + " |\n" + "|---" * (len(table) + 1) + "|")
    for notebook, fields in zip(all_notebooks(), zip(*table.values())):
        print(f"| {notebook.stem} | " + " | ".join(fields) + " |")
    return not sound


if __name__ == "__main__":
    sys.exit(main())
