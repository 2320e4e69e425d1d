"""What 1, 2, 5 and 60 minutes of training give: the laptop profile, as many steps as fit into the time.

``python benchmarks/minutes.py ROOT OUT`` needs the large phantom set (``python -m oasis_helpers phantoms
ROOT --cases 302 35 17``). First the speed of a step is measured, with all cores and nothing else
running; it says how many steps each time holds. Then every time is a run of its own, whose learning rate
has fallen to zero at the end: on one thread, so that it does not matter what else runs meanwhile. Weights go
to the folder OUT, and a run that is there is not made again. Draws ``figures/minutes.png``. The weights
that ship are those of the longest run.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path

import joblib
import torch
from tqdm import tqdm

from oasis_helpers import plots
from oasis_helpers.data import find_data, load_slices, to_unit_range
from oasis_helpers.evaluation import Segmenter, anatomy, embed, kid, load_segmenter, segment
from oasis_helpers.sampling import clipped, sample_images
from oasis_helpers.training import PROFILES, checkpoints, load_weights, train, train_to

RESULT = Path(__file__).with_name("minutes.json")
PICTURE = Path(__file__).parents[1] / "figures" / "minutes.png"
MINUTES, SAMPLES, SAMPLING_STEPS = (1, 2, 5, 60), 128, 20


def steps_per_second(slices: torch.Tensor, count: int = 60) -> float:
    """Speed of the laptop profile on all cores."""
    torch.set_num_threads(joblib.cpu_count())
    for state in train(PROFILES["laptop"].replace(steps=count + 5), slices, device="cpu"):
        if state.step == 5:
            started = time.perf_counter()
    return count / (time.perf_counter() - started)


def mean_symmetry(images: torch.Tensor, segmenter: Segmenter) -> float:
    """The share of brain whose mirror image has the same tissue; mean of images (B, 1, 64, 64) in [−1, 1]."""
    return float(anatomy(segment(images, segmenter))["symmetry"].nanmean())


def main() -> None:
    location, out = find_data(sys.argv[1]), Path(sys.argv[2])
    laptop = PROFILES["laptop"]
    slices = load_slices(location.train, laptop.objective.image_size)
    held_out = to_unit_range(load_slices(location.validate, laptop.objective.image_size))
    segmenter, pictures, runs = load_segmenter(), [], {}
    speed_file = out / "steps-per-second"
    if not speed_file.exists():
        out.mkdir(parents=True, exist_ok=True)
        speed_file.write_text(str(steps_per_second(slices)))
    speed = float(speed_file.read_text())
    torch.set_num_threads(1)
    for minutes in MINUTES:
        path = out / f"laptop-{minutes}-minutes.safetensors"
        steps = int(60 * minutes * speed)
        if not path.exists():
            config = laptop.replace(steps=steps, warmup=min(laptop.warmup, steps // 5))
            card = {"data": "phantoms: 302 cases, recipe 2, seed 0"}
            states = train_to(path, config, slices, device="cpu", card=card, resume=bool(checkpoints(path)))
            for _ in tqdm(states, total=steps, desc=f"{minutes} minutes", mininterval=30):
                pass
        with torch.autocast("cpu", torch.bfloat16):
            samples = sample_images(
                clipped(load_weights(path)), SAMPLES, method="dpm_solver", steps=SAMPLING_STEPS
            )
        samples = samples.float().clamp(-1, 1)
        distance, spread = kid(embed(held_out, segmenter), embed(samples, segmenter))
        runs[str(minutes)] = {
            "steps": steps, "KID": distance, "over subsets": spread,
            "symmetry": mean_symmetry(samples, segmenter),
        }  # fmt: skip
        print(f"{minutes} minutes: {runs[str(minutes)]}", flush=True)
        pictures += list(samples[:8])
    result = {
        "machine": f"{joblib.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}",
        "setting": f"laptop profile, 302 phantom cases; KID of {SAMPLES} samples "
        f"({SAMPLING_STEPS} DPM-Solver++ steps) and 35 held-out cases",
        "steps per second": speed,
        "symmetry of the held-out cases": mean_symmetry(held_out, segmenter),
        "runs": runs,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    titles = [f"{minutes} min" if i == 0 else "" for minutes in MINUTES for i in range(8)]
    title = "after 1, 2, 5 and 60 minutes on two cores · synthetic – not for diagnosis"
    PICTURE.write_bytes(plots.png(plots.grid(pictures, columns=8, titles=titles, title=title), dpi=100))


if __name__ == "__main__":
    main()
