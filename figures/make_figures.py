"""Draw the pictures of figures/ again: ``make figures``. Seeds and hardware: README.md beside it."""

from pathlib import Path

import diagrams
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from oasis_helpers import plots
from oasis_helpers.autoencoder import load_stable_diffusion
from oasis_helpers.data import load_slices, to_unit_range
from oasis_helpers.layout import image_name
from oasis_helpers.phantoms import make_phantoms, phantom_cache
from oasis_helpers.prompts import tokenize
from oasis_helpers.sampling import clipped, guided, sample, sample_images
from oasis_helpers.training import load_weights

HERE = Path(__file__).parent


def contact_sheet(denoise, size: int = 16) -> Figure:
    """16 held-out phantom slices beside 16 samples of the weights that ship."""
    # Not find_data(): with OASIS_ROOT set it would draw people's slices into the repository.
    held_out = load_slices(make_phantoms(phantom_cache()).test, denoise.shape[-1])
    picked = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:size]
    samples = sample_images(denoise, size, method="dpm_solver", steps=20, seed=0)
    figure = Figure(figsize=(11, 5.9), layout="constrained")
    halves = figure.subfigures(1, 2, wspace=0.03)
    sides = (
        ("phantoms, held out", to_unit_range(held_out[picked])),
        ("samples: synthetic – not for diagnosis", samples),
    )
    for half, (title, images) in zip(halves, sides):
        half.suptitle(title, fontsize=11)
        for axis, image in zip(half.subplots(4, 4).ravel(), images):
            axis.imshow(plots.upright(image), cmap="gray", vmin=0, vmax=(1 + plots.BRAIN[1]) / 2)
            axis.set_axis_off()
    return figure


def trajectory(denoise) -> Figure:
    """One sample at six moments of its making, and below each the network's guess of x₀."""
    states = list(sample(denoise, 1, method="ddim", steps=100, seed=3))
    picked = [states[i] for i in (4, 29, 49, 69, 84, 99)]
    titles = ["x, no noise left" if s.t_prev < 0 else f"x at t = {s.t_prev}" for s in picked]
    titles += [f"x₀ guessed at {s.t}" for s in picked]
    windows = [plots.BRAIN if s.t_prev < 0 else plots.window_at(denoise.schedule, s.t_prev) for s in picked]
    images = [s.x[0] for s in picked] + [s.x0[0] for s in picked]
    windows += [plots.BRAIN] * len(picked)
    return plots.grid(images, columns=6, titles=titles, size=1.6, window=windows)


def phantoms(count: int = 4) -> Figure:
    """Slice 0 of the first training cases by recipe 2, as they were stored, and by the recipe of today."""
    stored = np.asarray(Image.open(HERE / "recipe2.png"))
    before = [torch.from_numpy(head.copy())[None] for head in np.split(stored, count, axis=1)]
    folder = make_phantoms(phantom_cache()).train
    today = [
        np.asarray(Image.open(folder / image_name(case, 0)))[40:216, 24:232] for case in range(1, count + 1)
    ]
    images = [to_unit_range(head) for head in (*before, *(torch.from_numpy(h.copy())[None] for h in today))]
    titles = ["recipe 2"] + [""] * (count - 1) + ["recipe 3"] + [""] * (count - 1)
    return plots.grid(images, columns=count, titles=titles, size=2.6)


LEVELS = ("basal ganglia", "thalamus", "lateral ventricles", "centrum semiovale")


def prompts() -> Figure:
    """One seed under eight prompts: four levels, without atrophy and with."""
    denoise, autoencoder = load_stable_diffusion()
    texts = [f"{much} atrophy, level of the {level}" for much in ("no", "marked") for level in LEVELS]
    y = {"prompt": tokenize(texts)}
    noise = torch.randn((1, *denoise.shape), generator=torch.Generator().manual_seed(7)).expand(8, -1, -1, -1)
    start = noise, denoise.schedule.T - 1
    latents = sample_images(guided(denoise, 3.0), 8, method="dpm_solver", steps=20, y=y, start=start)
    titles = [text.replace(", level of the ", ",\n") for text in texts]
    return plots.grid(list(autoencoder.decode(latents)), columns=4, titles=titles, size=2.7)


def main() -> None:
    torch.set_num_threads(1)
    for name in diagrams.DIAGRAMS:
        print(f"figures/{diagrams.save(name).name}")
    (HERE / "prompts.png").write_bytes(plots.png(prompts()))
    print("figures/prompts.png")
    (HERE / "phantoms.png").write_bytes(plots.png(phantoms()))
    print("figures/phantoms.png")
    denoise = clipped(load_weights())
    for name, draw in (("contact_sheet", contact_sheet), ("trajectory", trajectory)):
        (HERE / f"{name}.png").write_bytes(plots.png(draw(denoise)))
        print(f"figures/{name}.png")


if __name__ == "__main__":
    main()
