"""Pixels or latents at equal training time: what does diffusion among latents gain?

``python benchmarks/pixel_or_latent.py ROOT OUT`` needs the large phantom set (``python -m oasis_helpers
phantoms ROOT --cases 302 35 17``); the reader of ``reader.py`` is trained into the folder OUT the first time.
The seconds of a training step of the autoencoder, of the latent model and of a model of the 256×256 pixels
are measured here, one after the other. The pixel model is the same U-Net, told the same phrases by the same
loop; its pixels are folded 4×4, so that its first layer has 64×64 places where that of the latents has 32×32,
and its schedule is shifted for the size. It is trained for as many steps as fit into the seconds that *both*
halves that ship need. Both are judged by samples for the same prompts, as in ``prompts.py``.
``--speeds`` measures only seconds a sample
and memory on two threads of the CPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from judge import METHOD, SPACING, STEPS, described, machine
from prompts import Distances, asked_slices, draw_heads, summary, together
from reader import load_reader
from runs import DEVICE, ON_GPU, Step, trained_to

from oasis_helpers import plots
from oasis_helpers.autoencoder import AUTOENCODER, LATENT, Latents, load_stable_diffusion
from oasis_helpers.data import find_data, load_factors, read_slices
from oasis_helpers.prompts import tokenize, truths
from oasis_helpers.sampling import clipped, guided, sample_images
from oasis_helpers.training import PROFILES, LatentDenoising, fingerprint, load_weights, read_header
from oasis_helpers.training.loop import draw_step

RESULT = Path(__file__).with_name("pixel_or_latent.json")
PICTURE = Path(__file__).parents[1] / "figures" / "pixel_or_latent.png"
SCALES, WARM_UP, TIMED = (1, 2), 5, 40
AUTOENCODING, LATENTS = (PROFILES[name].replace(precision="fp32") for name in ("autoencoder", "latent"))
PIXELS = LATENTS.replace(
    image_size=256, in_channels=1, patch_size=4, batch_size=32, schedule="shifted cosine", autoencoder="none"
)


class Undone:
    """In place of an autoencoder where images are what is sampled."""

    @staticmethod
    def decode(images: torch.Tensor) -> torch.Tensor:
        return images.float().clamp(-1, 1)


def step_of(config) -> dict[str, float]:
    """Seconds of a training step here, and on a GPU the memory that it takes at its highest, GB."""
    objective, size = config.objective, config.objective.image_size
    if isinstance(objective, LatentDenoising):
        data = Latents(torch.zeros(64, *objective.shape), torch.full((64, 6), torch.nan), "")
    else:
        data = torch.zeros(64, 1, size, size, dtype=torch.uint8)
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step, started = Step(config, config.make_network(), DEVICE), 0.0
    if ON_GPU:
        stream = torch.cuda.Stream()
        torch.cuda.set_stream(stream)
        step.record(draw_step(config, data, objective, 0))
    for number in range(WARM_UP + TIMED):
        if number == WARM_UP:
            _wait()
            started = time.perf_counter()
        step.play(draw_step(config, data, objective, number), number)
    _wait()
    found = {"seconds a step": (time.perf_counter() - started) / TIMED, "batch": config.batch_size}
    return found | ({"memory, GB": torch.cuda.max_memory_allocated() / 1e9} if ON_GPU else {})


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def plan() -> dict[str, dict[str, float]]:
    """For each training what a step takes, and how many steps there were or, of pixels, how many fit."""
    found = {
        name: step_of(config)
        for name, config in (("autoencoder", AUTOENCODING), ("latents", LATENTS), ("pixels", PIXELS))
    }
    for name, path in (("autoencoder", AUTOENCODER), ("latents", LATENT)):
        found[name]["steps"] = read_header(path).training["steps"]
    seconds = sum(found[n]["steps"] * found[n]["seconds a step"] for n in ("autoencoder", "latents"))
    found["pixels"]["steps"] = int(seconds / found["pixels"]["seconds a step"])
    for row in found.values():
        row["seconds"] = row["steps"] * row["seconds a step"]
    return found


def speeds() -> dict[str, dict[str, float]]:
    """Seconds of a guided sample and the memory of its process, each model in its own process, in turn."""
    rounds = {"latents": [], "pixels": []}
    for _ in range(3):
        for name, found in rounds.items():
            command = [sys.executable, __file__, "--one", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return {name: min(found, key=lambda row: row["seconds a sample"]) for name, found in rounds.items()}


def one(name: str) -> dict[str, float]:
    """The speed and the memory of the model ``name`` on two threads: how good its weights are is all one."""
    torch.set_num_threads(2)
    denoise, between = load_stable_diffusion() if name == "latents" else (None, Undone)
    denoise = denoise or clipped(PIXELS.objective.denoiser(PIXELS.make_network().eval()))
    how = {"method": METHOD, "steps": STEPS, "spacing": SPACING, "y": {"prompt": tokenize(["axial slice"])}}
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        between.decode(sample_images(guided(denoise, 2), 1, **how))
        seconds.append(time.perf_counter() - started)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"seconds a sample": min(seconds), "memory of the process, GB": most}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="?", help="folder of the large phantom set")
    parser.add_argument("out", nargs="?", type=Path, help="folder for the weights")
    parser.add_argument("--plan", action="store_true", help="measure the training steps, no more")
    parser.add_argument("--speeds", action="store_true", help="measure samples on this CPU, no more")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one)))
        return
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}

    def stored(**more) -> None:
        result.update(more)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")

    if args.speeds:
        stored(**{"samples measured on": f"2 CPUs, torch {torch.__version__}", "samples": speeds()})
        print(result["samples"])
        return
    if args.plan or "training" not in result:
        stored(**{"machine": machine(), "training": plan()})
        print(json.dumps(result["training"]), flush=True)
    if args.plan:
        return
    location = find_data(args.root)
    slices = read_slices(location.train, 256)
    known = truths(load_factors(location), slices.case, slices.plane)
    path, steps = args.out / "pixels-256.safetensors", result["training"]["pixels"]["steps"]
    data = Latents(slices.images, known, fingerprint(slices.images))
    trained_to(path, PIXELS.replace(steps=steps), data, {"data": described(location)})
    latent, between = load_stable_diffusion(device=DEVICE)
    reader = load_reader(args.root, args.out, between)
    distances, (asked, known) = Distances(reader), asked_slices()
    texts, rows, shown = [together(row) for row in known], {}, []
    for name, denoise, decoder in (
        ("latents", latent, between),
        ("pixels", clipped(load_weights(path, DEVICE)), Undone),
    ):
        for scale in SCALES:
            made = draw_heads(guided(denoise, scale), decoder, texts)
            rows[f"{name}, s = {scale}"] = distances(made) | {
                "read": summary(known, reader(made), asked.case)
            }
            print(name, scale, distances(made), flush=True)
        shown += list(made[:: len(made) // 6][:6])
    stored(prompts=len(texts), rows=rows)
    title = f"latents above, pixels below, after equal time, s = {SCALES[-1]} · synthetic – not for diagnosis"
    PICTURE.write_bytes(plots.png(plots.grid(shown, columns=6, title=title)))


if __name__ == "__main__":
    main()
