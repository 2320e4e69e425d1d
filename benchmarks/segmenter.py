"""Train the segmenter that ships, and measure its Dice on held-out cases.

``python benchmarks/segmenter.py ROOT`` needs the large phantom set (``python -m oasis_helpers phantoms ROOT
--cases 302 35 17``) and about a quarter of an hour on two cores. Writes the weights into the package and
the figures beside this file.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import joblib
import torch
from judge import described, machine
from tqdm import tqdm

from oasis_helpers.data import TISSUES, find_data, load_masks, load_slices, to_unit_range
from oasis_helpers.evaluation import SEGMENTER, dice, save_segmenter, segment, train_segmenter
from oasis_helpers.layout import DATASET_FOLDER

RESULT = Path(__file__).with_name("segmenter.json")
STEPS = 1000


def split(root: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    folders = root / f"{DATASET_FOLDER}_{name}", root / f"{DATASET_FOLDER}_seg_{name}"
    return load_slices(folders[0], 64), load_masks(folders[1], 64)


def main() -> None:
    torch.set_num_threads(joblib.cpu_count())
    root, started = Path(sys.argv[1]), time.perf_counter()
    *_, state = tqdm(train_segmenter(*split(root, "train"), steps=STEPS), total=STEPS)
    model = state.model
    result = {
        "machine": machine(),
        "setting": f"{STEPS} steps of 16 slices, the faster precision here, seed 0",
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "last loss": state.loss,
    }
    for name in ("validate", "test"):
        slices, masks = split(root, name)
        found = dice(segment(to_unit_range(slices), model), masks)
        result[f"Dice, {name}"] = dict(zip(TISSUES, (round(float(value), 4) for value in found)))
    print(json.dumps(result, indent=1))
    save_segmenter(SEGMENTER, model, {"data": described(find_data(root))})
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
