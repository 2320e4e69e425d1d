"""Train the two halves of Stable Diffusion in miniature: the autoencoder, then the model of its latents.

``python benchmarks/latent.py ROOT OUT`` needs the large phantom set (``python -m oasis_helpers phantoms ROOT
--cases 302 35 17``) and takes minutes on a GPU, hours on two cores. Into the folder OUT go, in half
precision, ``autoencoder-256.safetensors`` and ``latent-256.safetensors``, which was trained on the latents of
the first *as it is stored there* and names it by its SHA-256. What is there is not made again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from half import halve
from judge import described
from runs import DEVICE, hardware, trained_to

from oasis_helpers.autoencoder import latents_of, load_autoencoder
from oasis_helpers.data import find_data, load_factors, read_slices
from oasis_helpers.training import PROFILES, TrainConfig


def shipped(path: Path, config: TrainConfig, data, card: dict) -> None:
    """Train to ``path`` in half precision, unless it is there; the card says how long it took."""
    if path.exists():
        return
    whole, started = path.with_suffix(".fp32.safetensors"), time.perf_counter()
    trained_to(whole, config, data, card)
    halve(whole, path, {"seconds": round(time.perf_counter() - started, 1)})
    whole.unlink()
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {time.perf_counter() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="folder of the large phantom set")
    parser.add_argument("out", type=Path, help="folder for the weights")
    for name in ("autoencoder", "latent"):
        steps = PROFILES[name].steps
        parser.add_argument(f"--{name}-steps", type=int, default=steps, help=f"default: {steps:,}")
    args = parser.parse_args()
    location = find_data(args.root)
    # what is recorded as a graph is in fp32, and on a CPU it is no slower than what "auto" would find
    autoencoder = PROFILES["autoencoder"].replace(steps=args.autoencoder_steps, precision="fp32")
    slices = read_slices(location.train, autoencoder.objective.image_size)
    card = {"data": described(location), "hardware": hardware()}
    first, second = (args.out / f"{name}-256.safetensors" for name in ("autoencoder", "latent"))
    shipped(first, autoencoder, slices.images, card)

    between = load_autoencoder(first, DEVICE)
    latents = latents_of(slices, load_factors(location), between)
    latent = PROFILES["latent"].replace(steps=args.latent_steps, precision="fp32", autoencoder=between.sha256)
    shipped(second, latent, latents, card)


if __name__ == "__main__":
    main()
