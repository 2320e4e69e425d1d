"""Samplers beside each other: calls of the network, seconds, and how good the samples are.

``python benchmarks/samplers.py ROOT`` needs the large phantom set (``python -m oasis_helpers phantoms ROOT
--cases 302 35 17``). It draws samples with the weights that ship by every method and number of steps, prints
and stores the KID to the validation slices with its interval (cases drawn again), and what slices of other
held-out cases reach. Results are stored one by one: started again, it goes on.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path

import joblib
import torch

from oasis_helpers.data import find_data
from oasis_helpers.evaluation import bootstrap, embed, kid, load_segmenter, load_split
from oasis_helpers.sampling import clipped, sample
from oasis_helpers.training import WEIGHTS, load_weights, read_header

RESULT = Path(__file__).with_name("samplers.json")
SAMPLES, BATCH = 256, 64
# Heun's long first steps need Karras's spacing: notebook 5, section 8.
WAYS = [
    *(("ddim", steps, "trailing") for steps in (5, 10, 20, 50)),
    *(("dpm_solver", steps, "trailing") for steps in (5, 10, 20, 50)),
    *(("heun", steps, "karras") for steps in (5, 10, 25)),
    ("ddpm", 1000, "trailing"),
]


def with_interval(real, generated: torch.Tensor, cases: list[int]) -> dict[str, float]:
    """KID, and its 95 % interval when the cases of both are drawn again."""
    low, high = bootstrap(lambda i, j: kid(real.features[i], generated[j])[0], real.cases, cases, rounds=200)
    return {"KID": kid(real.features, generated)[0], "low": low, "high": high}


def seconds_per_call(denoise) -> float:
    """Seconds of a network call for one image of a batch, the least of twenty: nothing else should run."""
    x, found = torch.randn(BATCH, *denoise.shape), []
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for _ in range(20):
            started = time.perf_counter()
            denoise(x, denoise.schedule.T // 2)
            found.append((time.perf_counter() - started) / BATCH)
    return min(found)


def draw(denoise, method: str, steps: int, spacing: str, count: int) -> tuple[torch.Tensor, int]:
    """Samples in bf16, a seed for each batch, and calls of the network for each sample."""
    images, how = [], {"method": method, "steps": steps, "spacing": spacing}
    with torch.autocast("cpu", torch.bfloat16):
        for seed in range(count // BATCH):
            *_, last = sample(clipped(denoise), BATCH, seed=seed, **how)
            images.append(last.x.float())
    return torch.cat(images), last.evaluations


def show(result: dict) -> None:
    """Print the table."""
    print(result["machine"], "·", result["setting"])
    floor = result["floor"]
    print(f"real against real: {floor['KID']:.3f} ({floor['low']:.3f} … {floor['high']:.3f})")
    for row in result["rows"]:
        print(
            f"{row['method']:<11} {row['evaluations']:>5} calls {row['seconds']:>8.3f} s a sample   "
            f"KID {row['KID']:.3f} ({row['low']:.3f} … {row['high']:.3f})"
        )


def main() -> None:
    threads = int(os.environ.get("OMP_NUM_THREADS", joblib.cpu_count()))
    torch.set_num_threads(threads)
    location, segmenter = find_data(sys.argv[1]), load_segmenter()
    real, unseen = (load_split(folder, segmenter) for folder in (location.validate, location.test))
    denoise, header = load_weights(), read_header(WEIGHTS)
    steps = str(header.card["steps"])
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": []}
    if result.get("trained steps") != steps:
        result = {"rows": []}  # of other weights
    result |= {
        "trained steps": steps,
        "machine": f"{threads} of {joblib.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}",
        "setting": f"{SAMPLES} samples of {WEIGHTS.name} (half of it for 1,000 steps), bf16; "
        f"{len(set(real.cases))} heads",
        "seconds per call": seconds_per_call(denoise),
        "floor": with_interval(real, unseen.features, unseen.cases),
    }
    done = {(row["method"], row["steps"]) for row in result["rows"]}
    for method, steps, spacing in WAYS:
        if (method, steps) in done:
            continue
        count = SAMPLES if steps < 1000 else SAMPLES // 2  # KID is right on average for any number
        images, evaluations = draw(denoise, method, steps, spacing, count)
        found = with_interval(real, embed(images.clamp(-1, 1), segmenter), list(range(count)))
        row = {"method": method, "steps": steps, "spacing": spacing, "samples": count}
        row["evaluations"] = evaluations
        result["rows"].append(row | found)
        print(result["rows"][-1], flush=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["rows"]:
        row["seconds"] = row["evaluations"] * result["seconds per call"]
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__":
    main()
