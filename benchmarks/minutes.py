"""What 1, 2, 5 and 60 minutes of training give: the laptop profile, as many steps as fit into the time.

``python benchmarks/minutes.py ROOT OUT`` needs the large phantom set (``python -m oasis_helpers phantoms
ROOT --cases 302 35 17``). First the speed of a step is measured, with all cores and nothing else
running; it says how many steps each time holds. Then every time is a run of its own, whose learning rate
has fallen to zero at the end, made as ``runs.py`` says: how long that takes does not matter any more. Weights
go to the folder OUT, and a run that is there is not made again. All are judged as ``judge.py`` says. Draws
``figures/minutes.png``. The weights that ship are those of the longest run.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import joblib
import torch
from judge import SETTING, described, draw, judge_of, machine
from runs import DEVICE, ON_GPU, in_parallel, trained_to, training_slices

from oasis_helpers import plots
from oasis_helpers.data import find_data
from oasis_helpers.training import PROFILES, load_weights, train

RESULT = Path(__file__).with_name("minutes.json")
PICTURE = Path(__file__).parents[1] / "figures" / "minutes.png"
MINUTES = (1, 2, 5, 60)


def steps_per_second(slices: torch.Tensor, count: int = 60) -> float:
    """Speed of the laptop profile on all cores."""
    torch.set_num_threads(joblib.cpu_count())
    for state in train(PROFILES["laptop"].replace(steps=count + 5), slices, device="cpu"):
        if state.step == 5:
            started = time.perf_counter()
    return count / (time.perf_counter() - started)


def stored() -> dict:
    """What the file of results holds."""
    return json.loads(RESULT.read_text(encoding="utf-8"))


def speed_in(out: Path, slices: torch.Tensor) -> float:
    """The speed that is noted in the folder ``out``; measured and noted the first time.

    On a GPU it is the CPU's that stands in the file of results: minutes are those of two cores.
    """
    noted = out / "steps-per-second"
    if ON_GPU:
        return stored()["steps per second"]
    if not noted.exists():
        out.mkdir(parents=True, exist_ok=True)
        noted.write_text(str(steps_per_second(slices)))
    return float(noted.read_text())


def main() -> None:
    location, out = find_data(sys.argv[1]), Path(sys.argv[2])
    laptop, data = PROFILES["laptop"], described(location)
    slices = training_slices(sys.argv[1], laptop.objective.image_size)
    speed = speed_in(out, slices)
    paths = {minutes: out / f"laptop-{minutes}-minutes.safetensors" for minutes in MINUTES}
    steps = {minutes: int(60 * minutes * speed) for minutes in MINUTES}
    jobs = []
    for minutes in reversed(MINUTES):  # the longest first
        warmup = min(laptop.warmup, steps[minutes] // 5)
        config = laptop.replace(steps=steps[minutes], warmup=warmup, precision="fp32")
        jobs.append((paths[minutes], config, slices, {"data": data}))
    for _ in in_parallel(trained_to, jobs):
        pass
    judge, pictures, runs = judge_of(sys.argv[1]), [], {}
    for minutes, path in paths.items():
        samples = draw(load_weights(path, DEVICE))
        runs[str(minutes)] = {"steps": steps[minutes]} | judge.figures(samples)
        print(f"{minutes} minutes: {runs[str(minutes)]}", flush=True)
        pictures += list(samples[:8])
    result = {
        "machine": machine(),
        "setting": f"laptop profile; {data}; {SETTING}",
        "steps per second": speed,
        "speed measured on": stored()["speed measured on"] if ON_GPU else machine(),
        "mean symmetry of real heads": judge.mean_symmetry,
        "runs": runs,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    titles = [f"{minutes} min" if i == 0 else "" for minutes in MINUTES for i in range(8)]
    *some, most = MINUTES
    title = (
        f"after {', '.join(map(str, some))} and {most} minutes on two cores · synthetic – not for diagnosis"
    )
    PICTURE.write_bytes(plots.png(plots.grid(pictures, columns=8, titles=titles, title=title)))


if __name__ == "__main__":
    main()
