"""The `full` profile on this machine: 128×128, 23 million parameters, for as many steps as are given.

``python benchmarks/full.py ROOT [--steps 100]`` needs the large phantom set (``python -m oasis_helpers
phantoms ROOT --cases 302 35 17``). The profile asks for far more steps; here its rate falls to zero over the
given ones. Stored are speed, memory, the loss at both ends, how long all steps of the profile would take,
and, on a GPU, samples judged as ``judge.py`` says: both sides have 128×128 pixels, brought to the segmenter's
64×64.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import torch
from judge import SETTING, draw, judge_of, machine
from runs import DEVICE, ON_GPU, training_slices

from oasis_helpers import plots
from oasis_helpers.training import PROFILES, train
from oasis_helpers.unet import count_parameters

RESULT = Path(__file__).with_name("full.json")
PICTURE = Path(__file__).parents[1] / "figures" / "full.png"
FULL = PROFILES["full"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="folder of the large phantom set")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    config = FULL.replace(steps=args.steps, warmup=min(FULL.warmup, args.steps // 5))
    slices, losses, warm = training_slices(args.root, config.objective.image_size), [], args.steps // 5
    for state in train(config, slices, device=DEVICE):
        if state.step == warm:
            started = time.perf_counter()
        if state.step <= 20 or state.step > args.steps - 20:
            losses.append(state.loss)
    seconds = (time.perf_counter() - started) / (args.steps - warm)
    memory = (
        torch.cuda.max_memory_allocated()
        if ON_GPU
        else 1e3 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    result = {
        "machine": machine(),
        "setting": f"full profile, {args.steps} steps of {config.batch_size}, {state.config.precision}",
        "parameters": count_parameters(state.model),
        "steps": args.steps,
        "seconds per step": seconds,
        "hours for all steps of the profile": FULL.steps * seconds / 3600,
        "peak memory, GB": memory / 1e9,
        "loss of the first and the last steps": [
            statistics.mean(part) for part in (losses[:20], losses[-20:])
        ],
    }
    if ON_GPU:
        samples = draw(config.objective.denoiser(state.ema.model))
        result |= {"judged": SETTING} | judge_of(args.root).figures(samples)
        title = f"the full profile after {args.steps:,} steps, 128×128 · synthetic – not for diagnosis"
        PICTURE.write_bytes(plots.png(plots.grid(list(samples[:16]), columns=8, title=title)))
    print(json.dumps(result, indent=1))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
