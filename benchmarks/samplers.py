"""Samplers beside each other: calls of the network, seconds, and how good the samples are.

``python benchmarks/samplers.py ROOT`` needs the large phantom set (``python -m oasis_helpers phantoms ROOT
--cases 302 35 17``). It draws samples with the weights that ship by every method and number of steps, all
from the same noise, and judges them as ``judge.py`` says: the KID with its interval, and its difference to
DDIM with 50 steps with an interval of its own, for which the same heads and the same noise are drawn again
for both. What a perfect generator would reach stands beside it. Seconds are those of a network call on all
cores of the CPU, wherever the samples are drawn; ``--seconds`` measures them anew. Prints and stores the
table.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import joblib
import torch
from judge import BATCH, SAMPLES, Judge, draw, judge_of, machine
from runs import DEVICE

from oasis_helpers.sampling import clipped, sample
from oasis_helpers.training import WEIGHTS, load_weights, read_header

RESULT = Path(__file__).with_name("samplers.json")
# Heun's long first steps need Karras's spacing: notebook 5, section 8.
WAYS = [
    *(("ddim", steps, "trailing") for steps in (5, 10, 20, 50)),
    *(("dpm_solver", steps, "trailing") for steps in (5, 10, 20)),
    *(("heun", steps, "karras") for steps in (5, 10)),
]
BASE = ("ddim", 50, "trailing")  # what the others are compared with


def seconds_per_call(denoise) -> float:
    """Seconds of a network call for one image of a batch, the least of twenty: nothing else should run."""
    x, found = torch.randn(BATCH, *denoise.shape), []
    with torch.no_grad():
        for _ in range(20):
            started = time.perf_counter()
            denoise(x, denoise.schedule.T // 2)
            found.append((time.perf_counter() - started) / BATCH)
    return min(found)


def with_interval(judge: Judge, images: torch.Tensor, cases: Sequence[int] | None = None) -> dict[str, float]:
    """KID and its 95 % interval."""
    found = judge.distance(images, cases)
    return {"KID": found["KID"], "low": found["KID, low"], "high": found["KID, high"]}


def show(result: dict) -> None:
    """Print the table."""
    print(result["machine"], "·", result["setting"])
    perfect = result["perfect generator"]
    print(f"perfect: KID {perfect['KID']:.3f} ({perfect['low']:.3f} to {perfect['high']:.3f})")
    for row in result["rows"]:
        line = f"{row['method']:<11} {row['evaluations']:>5} calls {row['seconds']:>8.3f} s a sample   "
        line += f"KID {row['KID']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        if "difference" in row:
            line += f"   {row['difference']:+.3f} "
            line += f"({row['difference, low']:+.3f} to {row['difference, high']:+.3f})"
        print(line)


def timed(result: dict) -> dict:
    """``result`` with the seconds of this machine's CPU."""
    threads = int(os.environ.get("OMP_NUM_THREADS", joblib.cpu_count()))
    torch.set_num_threads(threads)
    seconds = seconds_per_call(load_weights())
    rows = [row | {"seconds": row["evaluations"] * seconds} for row in result["rows"]]
    where = {"timed on": f"{joblib.cpu_count()} CPUs", "threads": threads, "seconds per call": seconds}
    return result | where | {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="?", help="folder of the large phantom set")
    parser.add_argument("--seconds", action="store_true", help="measure the seconds of a call, no more")
    args = parser.parse_args()
    if args.seconds:
        result = timed(json.loads(RESULT.read_text()))
        show(result)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        return
    denoise, header = load_weights(device=DEVICE), read_header(WEIGHTS)
    judge = judge_of(args.root)
    base, rows = draw(denoise, method=BASE[0], steps=BASE[1], spacing=BASE[2]), []
    for method, steps, spacing in WAYS:
        is_base = (method, steps, spacing) == BASE
        how = {"method": method, "steps": steps, "spacing": spacing}
        *_, last = sample(clipped(denoise), 1, **how)
        images = base if is_base else draw(denoise, **how)
        row = how | {"samples": SAMPLES, "evaluations": last.evaluations}
        row |= with_interval(judge, images)
        if not is_base:
            found = judge.difference(images, base)
            row |= {"difference": found["difference"]} | {
                f"difference, {end}": found[end] for end in ("low", "high")
            }
        rows.append(row)
        print(rows[-1], flush=True)
    others = judge.real.others
    result = {
        "machine": machine(),
        "setting": f"{SAMPLES} samples of {WEIGHTS.name}, fp32; {len(set(judge.real.reference.cases))} heads",
        "trained steps": header.training["steps"],
        "perfect generator": with_interval(judge, others.images, others.cases),
        "rows": rows,
    }
    result = timed(result)
    show(result)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
