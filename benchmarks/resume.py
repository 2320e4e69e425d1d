"""Does a run that is killed while it writes checkpoints lose more than one interval?

``python benchmarks/resume.py`` starts a small training run that writes a checkpoint after every
second step, kills it with ``kill -9`` twenty times, each at a random moment (seed 0) after it
began to write one, and resumes it. It notes how many steps of the metrics the newest whole
checkpoint lacks; then the run is finished and its weights compared with those of an
uninterrupted run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from oasis_helpers.data import find_data
from oasis_helpers.training import checkpoints, load_weights, run_folder

RESULT = Path(__file__).with_name("resume.json")
KILLS, EVERY, STEPS = 20, 2, 4000
WRITING = 0.02  # seconds; about as long as a checkpoint takes
SETTINGS = ["image_size=32", "base_channels=24", "batch_size=4", "T=100", f"steps={STEPS}"]
SETTINGS += ["lr_schedule=constant"]  # so that the end may be moved


def command(out: Path, *more: str) -> list[str]:
    start = [sys.executable, "-m", "oasis_helpers", "train", "--data", str(find_data().root)]
    return [*start, "--out", str(out), "--every", str(EVERY), "--set", *SETTINGS, *more]


def steps_in(path: Path) -> list[int]:
    return [int(line.split(",")[0]) for line in path.read_text().splitlines()[1:] if line.count(",") == 4]


def main() -> None:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    rng, lost, torn = np.random.default_rng(0), [], 0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "killed.safetensors"
        metrics = run_folder(out) / "metrics.csv"
        for number in range(KILLS):
            process = subprocess.Popen(command(out, *(["--resume"] if number else [])), **quiet)
            before = max(steps_in(metrics), default=0) if number else 0
            while not checkpoints(out) or max(steps_in(metrics), default=0) <= before:
                time.sleep(0.05)  # until it trains again
            while not list(metrics.parent.glob(".*.part")):
                pass  # until it writes a checkpoint
            time.sleep(rng.uniform(0, WRITING))
            process.kill()
            process.wait()
            torn += len(list(metrics.parent.glob(".*.part")))
            reached = max(steps_in(metrics))
            kept = int(checkpoints(out)[-1].stem.removeprefix("step-"))
            lost.append(reached - kept)
        reached = max(steps_in(metrics)) + 20
        final = [f"steps={reached}"]
        subprocess.run([*command(out, "--resume"), "--set", *SETTINGS, *final], check=True, **quiet)
        whole = Path(folder) / "whole.safetensors"
        subprocess.run([*command(whole), "--set", *SETTINGS, *final], check=True, **quiet)
        pairs = zip(load_weights(out).parameters(), load_weights(whole).parameters())
        equal = all(torch.equal(a, b) for a, b in pairs)
    result = {
        "kills": KILLS,
        "steps between checkpoints": EVERY,
        "steps lost at each kill": lost,
        "checkpoints torn while written (and never used)": torn,
        "steps in the end": reached,
        "weights equal, bit for bit, to an uninterrupted run": equal,
    }
    print(json.dumps(result, indent=1))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
