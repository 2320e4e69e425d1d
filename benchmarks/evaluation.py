"""The whole report on the weights that ship, beside a short run and a network that learned by heart.

``python benchmarks/evaluation.py ROOT OUT`` needs the large phantom set (``python -m oasis_helpers phantoms
ROOT --cases 302 35 17``) and the five-minute weights that ``minutes.py ROOT OUT`` has left in OUT. It trains
one more network for as many steps, on eight slices over and over, which the search for copies must catch.
Prints and stores all figures of ``evaluate``, with the rows of its controls, and draws
``figures/evaluation.png`` for the weights that ship; of those it also stores the loss in ten ranges of t, on
held-out slices and on as many training slices. What the distance does not see comes last: real heads spoilt
in several ways, and by how much that moves their KID.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import joblib
import torch
from judge import (
    METHOD,
    SAMPLES,
    STEPS,
    Judge,
    blurred,
    darker,
    draw,
    fresh,
    grainy,
    judge_of,
    machine,
    mirrored,
    swapped_halves,
    without_scalp,
)
from runs import DEVICE, trained_to

from oasis_helpers import plots
from oasis_helpers.data import find_data, load_slices
from oasis_helpers.evaluation import evaluate, load_split
from oasis_helpers.sampling import Denoiser
from oasis_helpers.training import PROFILES, WEIGHTS, load_weights, read_header, validation_loss

RESULT = Path(__file__).with_name("evaluation.json")
PICTURE = Path(__file__).parents[1] / "figures" / "evaluation.png"
LEARNED_BY_HEART = 8  # slices

# A way to spoil real heads → images and masks in, images out.
SPOILERS = {
    "blur, half a pixel": lambda images, masks: blurred(images, 0.5),
    "blur, one pixel": lambda images, masks: blurred(images, 1.0),
    "grain of 4 grey levels": lambda images, masks: grainy(images, 4),
    "grain of 8 grey levels": lambda images, masks: grainy(images, 8),
    "a tenth darker": lambda images, masks: darker(images, 0.1),
    "scalp removed": without_scalp,
    "halves of two heads": lambda images, masks: swapped_halves(images),
    "left and right exchanged": lambda images, masks: mirrored(images),
}


def networks(slices: torch.Tensor, out: Path) -> dict[str, Denoiser]:
    """What is judged, by name."""
    short, path = out / "laptop-5-minutes.safetensors", out / "eight-slices.safetensors"
    few = slices[:: len(slices) // LEARNED_BY_HEART][:LEARNED_BY_HEART]
    config = PROFILES["laptop"].replace(**read_header(short).training)
    trained_to(path, config, few, {"data": f"{LEARNED_BY_HEART} phantom slices"})
    weights = {"weights that ship": WEIGHTS, "5 minutes": short, "learned by heart": path}
    return {name: load_weights(path, DEVICE) for name, path in weights.items()}


def losses(learned: torch.Tensor, held_out: torch.Tensor) -> dict[str, list[float]]:
    """Mean squared error of the weights that ship in ten ranges of t, on held-out and on learned slices."""
    network, laptop = load_weights(device=DEVICE).network, PROFILES["laptop"]
    some = torch.linspace(0, len(learned) - 1, len(held_out)).long()
    sets = {"held out": held_out, "training": learned[some]}
    return {name: validation_loss(network, laptop, part).tolist() for name, part in sets.items()}


def blind(judge: Judge) -> dict[str, dict[str, float]]:
    """By how much each way to spoil the perfect generator's images moves their KID, with intervals."""
    heads = judge.real.others
    count = len(heads.cases) // 2 * 2  # halves are exchanged in pairs
    images, masks = heads.images[:count], fresh(heads.cases[:count], heads.images.shape[-1])[1]
    # Two heads that share halves are no independent observations: pairs are drawn again together.
    pairs = [number // 2 for number in range(count)]
    return {name: judge.difference(spoil(images, masks), images, pairs) for name, spoil in SPOILERS.items()}


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", joblib.cpu_count())))
    location, out = find_data(sys.argv[1]), Path(sys.argv[2])
    judge, size = judge_of(sys.argv[1]), PROFILES["laptop"].objective.image_size
    slices, train = load_slices(location.train, size), load_split(location.train, judge.segmenter)
    heads = len(set(judge.real.reference.cases))
    rows, setting = {}, f"{SAMPLES} samples, {METHOD}, {STEPS} steps; {location} and {heads} fresh heads"
    for name, denoise in networks(slices, out).items():
        images = draw(denoise)
        found = evaluate(images, train, judge.real, judge.segmenter)
        rows[name] = found.rows["generated"]
        print(f"{name}: {rows[name]}", flush=True)
        if name == "weights that ship":
            controls = {k: v for k, v in found.rows.items() if k != "generated"}
            figure = plots.evaluation_panel(
                {name: rows[name]} | controls, found.anatomy, list(images[:16]), found.pairs, setting
            )
            PICTURE.write_bytes(plots.png(figure))
    result = {
        "machine": machine(),
        "setting": setting,
        "rows": rows | controls,
        "loss by t": losses(slices, load_slices(location.validate, size)),
        "blind": blind(judge),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
