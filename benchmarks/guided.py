"""Train the networks of notebook 7: the ``guided`` profile, and two weaker ones that can guide it.

``python benchmarks/guided.py ROOT OUT [STEPS]`` needs the large phantom set (``python -m oasis_helpers
phantoms ROOT --cases 302 35 17``) and takes minutes on a GPU, hours on two cores. Into the folder OUT go, in
half precision, ``guided-64.safetensors``, ``guided-64-early.safetensors`` (its average after a tenth of the
steps) and ``guided-64-small.safetensors`` (half as wide, and as many steps as the early one). Cards say how
long each took and on what. An interrupted call, repeated, goes on; what is there is not made again.

``python benchmarks/guided.py ROOT OUT STEPS EARLY`` ends a run that was cut, when all that is left of it is
the file EARLY: STEPS more of 8 slices, with a learning rate that falls from 7e-4 to 0. So the weights that
ship were made, on one CPU, since the time of the GPU was up.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from half import halve
from judge import described
from runs import hardware
from tqdm import tqdm

from oasis_helpers.conditions import ConditionedSlices, load_conditioned
from oasis_helpers.data import find_data
from oasis_helpers.training import (
    PROFILES,
    TrainConfig,
    checkpoints,
    load_weights,
    read_header,
    save_weights,
    train,
    train_to,
)


def trained(
    path: Path, config: TrainConfig, data: ConditionedSlices, card: dict, early: Path | None = None
) -> None:
    """Train to ``path`` in half precision; the average after a tenth of the steps goes to ``early``."""
    if path.exists():
        return
    whole, resumed = path.with_suffix(".fp32.safetensors"), False
    if not whole.exists():
        resumed, started = bool(checkpoints(whole)), time.perf_counter()
        states = train_to(whole, config, data, resume=resumed, every=2000, card=card)
        for state in tqdm(states, total=config.steps, desc=path.stem, mininterval=10):
            if early and state.step == config.steps // 10:
                steps = {"steps": state.step, "of a run of": config.steps}
                save_weights(early, state.ema.model, state.config, card | steps, half=True)
        if not resumed:
            card = card | {"seconds": round(time.perf_counter() - started, 1)}
    halve(whole, path, card)
    whole.unlink()


def finished(path: Path, early: Path, config: TrainConfig, data: ConditionedSlices, card: dict) -> None:
    """Go on from the weights ``early`` by ``config``, and write the average to ``path`` in half precision."""
    began, started = read_header(early).card, time.perf_counter()
    *_, state = tqdm(train(config, data, model=load_weights(early).network.train()), total=config.steps)
    seconds = round(time.perf_counter() - started, 1)
    save_weights(path, state.ema.model, state.config, card | {"seconds": seconds, "began": began}, half=True)


def main() -> None:
    location, out = find_data(sys.argv[1]), Path(sys.argv[2])
    config = PROFILES["guided"]
    if len(sys.argv) > 3:
        config = config.replace(steps=int(sys.argv[3]))
    data = load_conditioned(location, config.objective.image_size)
    card = {"data": described(location), "hardware": f"{hardware()}, torch {torch.__version__}"}
    path = out / "guided-64.safetensors"
    if len(sys.argv) > 4:
        rest = config.replace(batch_size=8, lr=7e-4, warmup=50, ema_decay=0.998)
        finished(path, Path(sys.argv[4]), rest, data, card)
        return
    small = config.replace(base_channels=config.settings()["base_channels"] // 2, steps=config.steps // 10)
    trained(path, config, data, card, path.with_stem("guided-64-early"))
    trained(path.with_stem("guided-64-small"), small, data, card)
    for written in sorted(out.glob("*.safetensors")):
        print(f"{written}: {written.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
