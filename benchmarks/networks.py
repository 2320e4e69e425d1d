"""Training and sampling speed of this U-Net beside the networks of three well-known libraries.

``python benchmarks/networks.py [--rounds 3]`` prints the table and stores it. Every network gets the
same number of parameters (within a tenth; the width nearest to ours is searched), the same batch,
image size, precision, optimiser (AdamW) and number of threads. Each measurement is a process
of its own, in turn, several rounds; the table has the medians, and ratios to the best peer.

Peers: diffusers ``UNet2DModel``, denoising-diffusion-pytorch ``Unet``, MONAI ``DiffusionModelUNet``.
They are no dependency of this project: ``pip install monai denoising-diffusion-pytorch`` for this
benchmark; a peer that is missing is left out and named. On a machine with a GPU it measures that, in one
process, and stores ``networks_gpu.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import joblib

RESULT = Path(__file__).with_name("networks.json")
BATCH, SIZE = 16, 64
PRECISIONS = ("fp32", "bf16")
WARM_UP, STEPS = 2, 6


def ours(width: int, channels: int = 1, size: int = SIZE):
    from oasis_helpers.training import PROFILES

    kept = {"image_size": size, "in_channels": channels, "out_channels": channels}
    return PROFILES["laptop"].replace(base_channels=width, **kept).make_network()


def diffusers(width: int, channels: int = 1, size: int = SIZE):
    from diffusers import UNet2DModel

    down, up = ["DownBlock2D"] * 3 + ["AttnDownBlock2D"], ["AttnUpBlock2D"] + ["UpBlock2D"] * 3
    return UNet2DModel(
        size, channels, channels, block_out_channels=(width, width, 2 * width, 3 * width), layers_per_block=1,
        down_block_types=down, up_block_types=up, norm_num_groups=8,
    )  # fmt: skip


def lucidrains(width: int, channels: int = 1, size: int = SIZE):
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Unet

    return Unet(width, channels=channels, dim_mults=(1, 2, 3))


def monai(width: int, channels: int = 1, size: int = SIZE):
    from monai.networks.nets import DiffusionModelUNet

    return DiffusionModelUNet(
        2, channels, channels, num_res_blocks=1, channels=(width, 2 * width, 3 * width),
        attention_levels=(False, False, True), num_head_channels=width, norm_num_groups=8,
    )  # fmt: skip


LUCIDRAINS = "denoising-diffusion-pytorch"
NETWORKS = {"oasis_helpers": ours, "diffusers": diffusers, LUCIDRAINS: lucidrains, "MONAI": monai}
PACKAGES = {"diffusers": "diffusers", LUCIDRAINS: "denoising_diffusion_pytorch", "MONAI": "monai"}
SPEEDS = ("training, images/s", "sampling, images/s")


def missing() -> list[str]:
    """The peers that are not installed."""
    return [name for name, package in PACKAGES.items() if find_spec(package) is None]


def parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


def width_near(make: Callable, wanted: int) -> int:
    """The width, a multiple of 8, with which ``make(width)`` comes nearest to ``wanted`` parameters."""
    return min(range(16, 129, 8), key=lambda width: abs(parameters(make(width)) - wanted))


def measure(name: str, width: int, precision: str) -> dict[str, float]:
    """Images/s of a training step and of a sampling step, and the peak memory of this process in MB."""
    import resource

    import torch

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    torch.manual_seed(0)
    model = NETWORKS[name](width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images, t = torch.randn(BATCH, 1, SIZE, SIZE).to(device), torch.randint(0, 1000, (BATCH,)).to(device)

    def run() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            output = model(images, t)
        return getattr(output, "sample", output).float()  # diffusers wraps its output

    def training_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (run() - images).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    found, warm_up, steps = {}, WARM_UP, STEPS
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        warm_up, steps = 10 * WARM_UP, 10 * STEPS
    for what, step in (("training", training_step), ("sampling", torch.no_grad()(run))):
        seconds = []
        for number in range(warm_up + steps):
            started = time.perf_counter()
            step()
            if on_gpu:
                torch.cuda.synchronize()
            if number >= warm_up:
                seconds.append(time.perf_counter() - started)
        found[f"{what}, images/s"] = BATCH / statistics.median(seconds)
    memory = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else None
    found["peak memory, MB"] = memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return found


def show(result: dict) -> None:
    """Print the table."""
    print(result["machine"], "·", result["setting"])
    for precision in PRECISIONS:
        columns = list(next(iter(result[precision].values())))
        print(f"\n{precision:<28} {'parameters':>11} " + " ".join(f"{c:>30}" for c in columns))
        for name, values in result[precision].items():
            row = " ".join(f"{values[c]:>30.2f}" for c in columns)
            print(f"{name:<28} {result['parameters'][name]:>11,} {row}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=3, metavar=("NAME", "WIDTH", "PRECISION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.one[2])))
        return

    import torch

    from oasis_helpers.training import PROFILES

    on_gpu = torch.cuda.is_available()
    print("not installed, left out:", ", ".join(missing()) or "none")
    names = [name for name in NETWORKS if name not in missing()]
    wanted = parameters(PROFILES["laptop"].make_network())
    widths = {name: width_near(NETWORKS[name], wanted) for name in names}
    counts = {name: parameters(NETWORKS[name](widths[name])) for name in names}
    found = {(name, precision): [] for precision in PRECISIONS for name in names}
    for _ in range(args.rounds):
        for name, precision in found:
            if on_gpu:
                found[name, precision].append(measure(name, widths[name], precision))
                continue
            command = [sys.executable, __file__, "--one", name, str(widths[name]), precision]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name, precision].append(json.loads(done.stdout.splitlines()[-1]))

    threads = os.environ.get("OMP_NUM_THREADS", str(joblib.cpu_count()))
    hardware = torch.cuda.get_device_name() if on_gpu else f"{joblib.cpu_count()} CPUs"
    result = {
        "machine": f"{hardware}, {platform.machine()}, torch {torch.__version__}",
        "threads": threads,
        "setting": f"batch {BATCH}, {SIZE}×{SIZE}, {args.rounds} rounds, median",
        "parameters": counts,
    }
    for (name, precision), rounds in found.items():
        medians = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        result.setdefault(precision, {})[name] = medians
    for networks in (result[precision] for precision in PRECISIONS):
        for speed in SPEEDS:
            best = max(values[speed] for name, values in networks.items() if name != "oasis_helpers")
            for values in networks.values():
                values[f"{speed.split(',')[0]}, times the best peer"] = values[speed] / best
    show(result)
    (RESULT.with_name("networks_gpu.json") if on_gpu else RESULT).write_text(
        json.dumps(result, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
