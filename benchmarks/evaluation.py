"""The whole report on the weights that ship, beside a short run and a network that learned by heart.

``python benchmarks/evaluation.py ROOT OUT`` needs the large phantom set (``python -m oasis_helpers phantoms
ROOT --cases 302 35 17``) and the five-minute weights that ``minutes.py ROOT OUT`` has left in OUT. It trains
one more network for as many steps, on eight slices over and over, which the search for copies must catch.
Prints and stores all figures of ``evaluate``, and draws ``figures/evaluation.png`` for the weights that ship;
of those it also stores the loss in ten ranges of t, on held-out slices and on as many training slices.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path

import joblib
import torch
from samplers import draw

from oasis_helpers import plots
from oasis_helpers.data import find_data, load_slices
from oasis_helpers.evaluation import evaluate, load_segmenter, load_split
from oasis_helpers.sampling import Denoiser
from oasis_helpers.training import PROFILES, load_weights, read_header, train_to, validation_loss

RESULT = Path(__file__).with_name("evaluation.json")
PICTURE = Path(__file__).parents[1] / "figures" / "evaluation.png"
SAMPLES, METHOD, STEPS = 320, "dpm_solver", 20
LEARNED_BY_HEART = 8  # slices


def networks(slices: torch.Tensor, out: Path) -> dict[str, Denoiser]:
    """What is judged, by name."""
    short, path = out / "laptop-5-minutes.safetensors", out / "eight-slices.safetensors"
    if not path.exists():
        few = slices[:: len(slices) // LEARNED_BY_HEART][:LEARNED_BY_HEART]
        config = PROFILES["laptop"].replace(**read_header(short).training)
        for _ in train_to(
            path, config, few, device="cpu", card={"data": f"{LEARNED_BY_HEART} phantom slices"}
        ):
            pass
    return {
        "weights that ship": load_weights(),
        "5 minutes": load_weights(short),
        "learned by heart": load_weights(path),
    }


def losses(learned: torch.Tensor, held_out: torch.Tensor) -> dict[str, list[float]]:
    """Mean squared error of the weights that ship in ten ranges of t, on held-out and on learned slices."""
    network, laptop = load_weights().network, PROFILES["laptop"]
    some = torch.linspace(0, len(learned) - 1, len(held_out)).long()
    sets = {"held out": held_out, "training": learned[some]}
    return {name: validation_loss(network, laptop, part).tolist() for name, part in sets.items()}


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", joblib.cpu_count())))
    location, out = find_data(sys.argv[1]), Path(sys.argv[2])
    segmenter, size = load_segmenter(), PROFILES["laptop"].objective.image_size
    slices = load_slices(location.train, size)
    splits = [load_split(f, segmenter) for f in (location.train, location.validate, location.test)]
    rows, setting = {}, f"{SAMPLES} samples each, {METHOD}, {STEPS} steps; {location}"
    for name, denoise in networks(slices, out).items():
        images, _ = draw(denoise, METHOD, STEPS, "trailing", SAMPLES)
        found = evaluate(images, *splits, segmenter)
        rows[name] = found.rows["generated"]
        print(f"{name}: {rows[name]}", flush=True)
        if name == "weights that ship":
            ends = {k: v for k, v in found.rows.items() if k != "generated"}
            figure = plots.evaluation_panel(
                {name: rows[name]} | ends, found.anatomy, list(images[:16]), found.pairs, setting
            )
            PICTURE.write_bytes(plots.png(figure, dpi=90))
    result = {
        "machine": f"{joblib.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}",
        "setting": setting,
        "rows": rows | ends,
        "loss by t": losses(slices, load_slices(location.validate, size)),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
