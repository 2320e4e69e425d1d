"""What 1, 2, 5 and 60 minutes of training give: the laptop profile, as many steps as fit into the time.

``python benchmarks/minutes.py ROOT OUT`` needs the large phantom set (``python -m oasis_helpers phantoms
ROOT --cases 302 35 17``). Every time is a run of its own on all cores, whose learning rate has fallen to
zero at the end; weights go to the folder OUT, and a run that is there is not made again. Draws
``figures/minutes.png``. The weights that ship are those of the longest run.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from ablations import SAMPLES
from tqdm import tqdm

from oasis_helpers import plots
from oasis_helpers.data import find_data, load_slices, to_unit_range
from oasis_helpers.evaluation import embed, kid, load_segmenter
from oasis_helpers.sampling import sample_images
from oasis_helpers.training import PROFILES, load_weights, read_tensors, train, train_to

RESULT = Path(__file__).with_name("minutes.json")
PICTURE = Path(__file__).parents[1] / "figures" / "minutes.png"
MINUTES, SAMPLING_STEPS = (1, 2, 5, 60), 50


def steps_in(seconds: float, slices: torch.Tensor) -> int:
    """How many steps of the laptop profile fit into the time, from twenty of them."""
    for state in train(replace(PROFILES["laptop"], steps=23), slices, device="cpu"):
        if state.step == 3:
            started = time.perf_counter()
    return int(seconds * 20 / (time.perf_counter() - started))


def main() -> None:
    torch.set_num_threads(os.cpu_count())
    location, out = find_data(sys.argv[1]), Path(sys.argv[2])
    slices = load_slices(location.train, PROFILES["laptop"].image_size)
    held_out = to_unit_range(load_slices(location.validate, PROFILES["laptop"].image_size))
    segmenter, rows, runs = load_segmenter(), [], {}
    for minutes in MINUTES:
        path = out / f"laptop-{minutes}-minutes.safetensors"
        if not path.exists():
            steps = steps_in(60 * minutes, slices)
            config = replace(PROFILES["laptop"], steps=steps, warmup=min(200, steps // 5))
            states = train_to(path, config, slices, device="cpu", data="302 phantom cases, recipe 2, seed 0")
            started = time.perf_counter()
            for _ in tqdm(states, total=steps, desc=f"{minutes} minutes"):
                pass
            seconds = f"{time.perf_counter() - started:.0f}"
            path.with_suffix(".seconds").write_text(seconds)
        network, config = load_weights(path)
        samples = sample_images(
            network, config.make_schedule(), (SAMPLES, 1, config.image_size, config.image_size),
            method="ddim", steps=SAMPLING_STEPS, seed=0, prediction=config.prediction,
        )  # fmt: skip
        distance = kid(embed(held_out, segmenter), embed(samples.clamp(-1, 1), segmenter))
        runs[str(minutes)] = {
            "steps": int(read_tensors(path)[1]["steps"]),
            "seconds": float(path.with_suffix(".seconds").read_text()),
            "KID": distance[0],
            "over subsets": distance[1],
        }
        print(f"{minutes} minutes: {runs[str(minutes)]}", flush=True)
        rows += list(samples[:8])
    result = {
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}",
        "setting": f"laptop profile, 302 phantom cases; KID of {SAMPLES} samples "
        f"({SAMPLING_STEPS} DDIM steps) and 35 held-out cases",
        "runs": runs,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    titles = [f"{minutes} min" if i == 0 else "" for minutes in MINUTES for i in range(8)]
    title = "after 1, 2, 5 and 60 minutes on two cores · synthetic – not for diagnosis"
    PICTURE.write_bytes(plots.png(plots.grid(rows, columns=8, titles=titles, title=title), dpi=100))


if __name__ == "__main__":
    main()
