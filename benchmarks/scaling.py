"""How the cost of training grows: image size, batch, number of slices, processes.

``python benchmarks/scaling.py`` prints the tables and stores them (some minutes). Every measurement is a
process of its own that makes a few steps of the laptop profile in fp32 on slices of random
bytes (speed does not depend on what is in them). Memory is the largest proportional set size of the
process with its children; beside it the bytes of the slices alone.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import joblib
from measure import measured

RESULT = Path(__file__).with_name("scaling.json")
USUAL = {"image_size": 64, "batch_size": 16, "slices": 1000, "processes": 1}
VARIED = {
    "image_size": (32, 64, 128),
    "batch_size": (4, 16, 64),
    "slices": (1_000, 4_000, 11_000),
    "processes": (1, 2),
}
WARM_UP, STEPS = 2, 6


def train_some(image_size: int, batch_size: int, slices: int, processes: int, out: str) -> None:
    """Train for some steps and write the images per second (of all processes together) to ``out``."""
    import time

    import torch

    from oasis_helpers.training import PROFILES, train

    torch.set_num_threads(max(joblib.cpu_count() // processes, 1))
    data = torch.randint(0, 256, (slices, 1, image_size, image_size), dtype=torch.uint8)
    config = PROFILES["laptop"].replace(
        image_size=image_size, batch_size=batch_size, precision="fp32", steps=WARM_UP + STEPS
    )
    seconds, before = [], time.perf_counter()
    for state in train(config, data, device="cpu"):  # noqa: B007
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    if state.is_main:
        Path(out).write_text(str(batch_size / statistics.median(seconds[WARM_UP:])))


def one(setting: dict[str, int]) -> dict[str, float]:
    """Images per second and memory of one setting, in a new process (or several)."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rate"
        command = [sys.executable]
        if setting["processes"] > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(setting["processes"])]
        command += [__file__, "--one", json.dumps(setting | {"out": str(out)})]
        code, _, megabytes = measured(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if code:
            raise RuntimeError(f"{setting} ended with exit code {code}: run it alone to see why.")
        return {
            "images/s": float(out.read_text()),
            "peak memory, MB": megabytes,
            "slices alone, MB": setting["slices"] * setting["image_size"] ** 2 / 1e6,
        }


def show(result: dict) -> None:
    """Print the tables."""
    print(result["machine"], "·", result["setting"])
    for name in VARIED:
        print(f"\n{name:>12} {'images/s':>10} {'peak MB':>10} {'slices MB':>10}")
        for value, found in result[name].items():
            print(f"{value:>12} " + " ".join(f"{number:>10.1f}" for number in found.values()))


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        train_some(**json.loads(sys.argv[2]))
        return
    import torch

    usual = one(USUAL)
    result = {
        "machine": f"{joblib.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}",
        "setting": f"laptop profile, fp32, all cores, median of {STEPS} steps; else {USUAL}",
    }
    for name, values in VARIED.items():
        result[name] = {
            str(value): usual if value == USUAL[name] else one(USUAL | {name: value}) for value in values
        }
    show(result)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
