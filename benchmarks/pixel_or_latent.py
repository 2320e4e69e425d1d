"""Pixels or latents, with the same work: what does diffusion among latents gain?

``python benchmarks/pixel_or_latent.py ROOT OUT`` needs the large phantom set and the reader (``reader.py``).
The same U-Net, told the same phrases by the same loop, is trained on the 256×256 pixels themselves, folded
2×2 as in the smaller models, for as many steps as cost the work that both halves of the latent model had:
work is counted in multiplications of the forward and backward pass. A minute on a GPU, hours on two cores.
Both are judged by their samples for the same prompts, as in ``prompts.py``. ``--speeds`` measures seconds a
sample on the CPU; the memory of a training step is a GPU's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from judge import METHOD, SPACING, STEPS, described, machine
from prompts import Distances, asked_slices, draw_heads, summary, together
from reader import load_reader
from runs import DEVICE, ON_GPU, Step, trained_to
from torch.utils.flop_counter import FlopCounterMode

from oasis_helpers.autoencoder import AUTOENCODER, LATENT, Latents, load_stable_diffusion
from oasis_helpers.data import find_data, load_factors, read_slices
from oasis_helpers.prompts import truths
from oasis_helpers.sampling import guided, sample_images
from oasis_helpers.training import PROFILES, LatentDenoising, fingerprint, load_weights, read_header
from oasis_helpers.training.loop import draw_step

RESULT = Path(__file__).with_name("pixel_or_latent.json")
SCALE = 2
LATENTS = PROFILES["latent"].replace(precision="fp32")
PIXELS = LATENTS.replace(image_size=256, in_channels=1, patch_size=2, autoencoder="none: pixels")


class Undone:
    """In place of an autoencoder where images are what is sampled."""

    @staticmethod
    def decode(images: torch.Tensor) -> torch.Tensor:
        return images.float().clamp(-1, 1)


def work(config) -> float:
    """Multiplications and additions of a training step for one image, forward and back."""
    one = config.replace(batch_size=1)
    if isinstance(one.objective, LatentDenoising):
        data = Latents(torch.zeros(1, *one.objective.shape), torch.full((1, 6), torch.nan), "")
    else:
        data = torch.zeros(1, 1, one.objective.image_size, one.objective.image_size, dtype=torch.uint8)
    network, counter = one.make_network(), FlopCounterMode(display=False)
    drawn = draw_step(one, data, one.objective, 0)
    with counter:
        one.objective(network, drawn).mean().backward()
    return float(counter.get_total_flops())


def plan() -> dict[str, float]:
    """Work of an image in each training, and the steps of the pixel model that cost what the latents did."""
    first, second = (read_header(path).training for path in (AUTOENCODER, LATENT))
    each = {
        "autoencoder": work(PROFILES["autoencoder"]), "latents": work(LATENTS), "pixels": work(PIXELS)
    }  # fmt: skip
    spent = first["steps"] * first["batch_size"] * each["autoencoder"]
    spent += second["steps"] * second["batch_size"] * each["latents"]
    return {f"GFLOP an image, {name}": value / 1e9 for name, value in each.items()} | {
        "steps of the autoencoder": first["steps"],
        "steps of latents": second["steps"],
        "steps of pixels for the same work": int(spent / (PIXELS.batch_size * each["pixels"])),
    }


def speeds() -> dict[str, dict[str, float]]:
    """Seconds of one sample on all cores, each model in its own process."""
    found = {}
    for name in ("latents", "pixels"):
        done = subprocess.run(
            [sys.executable, __file__, "--one", name], capture_output=True, text=True, check=True
        )
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def one(name: str) -> dict[str, float]:
    """The speed of the model ``name`` here."""
    config = {"latents": LATENTS, "pixels": PIXELS}[name]
    denoise, between = load_stable_diffusion() if name == "latents" else (None, Undone)
    denoise = denoise or config.objective.denoiser(config.make_network().eval())
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        between.decode(sample_images(denoise, 1, method=METHOD, steps=STEPS, spacing=SPACING))
        seconds.append(time.perf_counter() - started)
    return {"seconds a sample": min(seconds)}


def memory(config) -> float:
    """GB that a training step takes at its highest on this GPU."""
    data = Latents(torch.zeros(1, *config.objective.shape), torch.full((1, 6), torch.nan), "")
    torch.cuda.reset_peak_memory_stats()
    step = Step(config, config.make_network(), DEVICE)
    step.play(draw_step(config, data, config.objective, 0), 0)
    return torch.cuda.max_memory_allocated() / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="?", help="folder of the large phantom set")
    parser.add_argument("out", nargs="?", type=Path, help="folder for the weights")
    parser.add_argument("--steps", type=int, help="of the pixel model, by default those of the same work")
    parser.add_argument("--speeds", action="store_true", help="measure seconds on this CPU, no more")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one)))
        return
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if args.speeds:
        result |= {"speeds measured on": machine(), "speeds": speeds()}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        print(result["speeds"])
        return
    location, found = find_data(args.root), plan()
    steps = args.steps or int(found["steps of pixels for the same work"])
    print(found, flush=True)
    slices = read_slices(location.train, 256)
    known = truths(load_factors(location), slices.case, slices.plane)
    path = args.out / "pixels-256.safetensors"
    config = PIXELS.replace(steps=steps, warmup=min(PIXELS.warmup, steps // 5))
    data = Latents(slices.images, known, fingerprint(slices.images))
    trained_to(path, config, data, {"data": described(location)})
    latent, between = load_stable_diffusion(device=DEVICE)
    reader = load_reader(args.root, args.out, between)
    distances, (_, known, cases) = Distances(reader), asked_slices()
    texts = [together(row) for row in known]
    result |= {"machine": machine(), "plan": found, "steps": steps, "scale": SCALE, "rows": {}}
    if ON_GPU:
        both = {"latents": LATENTS, "pixels": PIXELS}
        result["GB of a training step"] = {name: round(memory(c), 2) for name, c in both.items()}
    for name, denoise, decoder in (
        ("latents", latent, between),
        ("pixels", load_weights(path, DEVICE), Undone),
    ):
        made = draw_heads(guided(denoise, SCALE), decoder, texts)
        result["rows"][name] = distances(made) | {"read": summary(known, reader(made), cases)}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        print(name, distances(made), flush=True)


if __name__ == "__main__":
    main()
