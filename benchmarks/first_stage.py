"""What the autoencoder keeps of a head, and what each term of its loss is good for.

``python benchmarks/first_stage.py ROOT [--terms]`` encodes and decodes 300 slices of unseen heads, those of
``prompts.py``, and compares the result with the slices, beside simply shrinking them to as many numbers
(64×64) and enlarging them again. ``--terms`` instead trains the autoencoder four times for 1,000 steps on the
large phantom set in ROOT, with the loss that ships and with one term changed, and measures the same.
Prints and stores the tables.

*Sulci kept*: of the CSF that is less than three pixels wide in the masks, how much darker it is than the grey
and white matter within two pixels of it, after over before.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from judge import machine
from prompts import asked_slices, with_intervals
from reader import reconstructed, unseen_heads
from runs import DEVICE, trained
from scipy.ndimage import binary_dilation, binary_opening
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

from oasis_helpers.autoencoder import Autoencoder, load_autoencoder
from oasis_helpers.data import find_data, load_slices, read_slices, to_unit_range
from oasis_helpers.evaluation import embed, fid, load_segmenter, resize_for_segmenter, segment
from oasis_helpers.training import PROFILES

RESULT = Path(__file__).with_name("first_stage.json")
STEPS = 1000  # of each run that compares the terms of the loss
SHRUNK = 64  # 64×64 are as many numbers as 32×32×4
TERMS = {
    "as it ships": {},
    "no feature maps": {"features": 0.0},
    "no KL": {"kl": 0.0},
    "KL 100 times": {"kl": 1e-2},
}
TISSUES = ("CSF", "grey", "white")


def shrunk_and_back(images: Tensor) -> Tensor:
    """Images (N, 1, H, W) shrunk to 64×64 and enlarged again."""
    small = F.interpolate(images, (SHRUNK, SHRUNK), mode="bicubic", antialias=True)
    return F.interpolate(small, images.shape[-2:], mode="bicubic").clamp(-1, 1)


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in [−1, 1], dB, (N,)."""
    return 10 * torch.log10(4 / (images - others).square().flatten(1).mean(1))


def sulcus_contrast(image: np.ndarray, mask: np.ndarray) -> float:
    """How much darker CSF less than three pixels wide is than tissue within two pixels; NaN without any."""
    thin = (mask == 1) & ~binary_opening(mask == 1, np.ones((3, 3)))
    beside = binary_dilation(thin, np.ones((5, 5))) & (mask > 1)
    return float(image[beside].mean() - image[thin].mean()) if thin.any() and beside.any() else float("nan")


def kept(
    images: Tensor, made: Tensor, masks: Tensor, small_masks: Tensor, cases: list[int]
) -> dict[str, float]:
    """All figures of ``made`` beside ``images``, (N, 1, 256, 256), with intervals by head."""
    segmenter, each = load_segmenter(), {}
    if made is not images:
        pairs = zip(made, images)
        each["PSNR"] = psnr(made, images)
        each["MS-SSIM"] = torch.stack([ms_ssim(a[None], b[None], data_range=2.0) for a, b in pairs])
    contrast = [
        torch.tensor([sulcus_contrast(i[0].numpy(), m.numpy()) for i, m in zip(x, masks)])
        for x in (images, made)
    ]
    found, true = (F.one_hot(ids.long(), 4)[..., 1:].flatten(1, 2).bool()
                   for ids in (segment(resize_for_segmenter(made), segmenter), small_masks))  # fmt: skip
    both, sizes = (found & true).sum(1), found.sum(1) + true.sum(1)

    def figures(rows: Tensor) -> dict[str, float]:
        seen = {name: float(values[rows].double().mean()) for name, values in each.items()}
        before, after = (values[rows].nanmean() for values in contrast)
        seen["sulci kept"] = float(after / before)
        overlap = 2 * both[rows].sum(0) / sizes[rows].sum(0)  # as evaluation.dice, over all images
        return seen | {f"Dice, {name}": float(value) for name, value in zip(TISSUES, overlap)}

    with_bounds = with_intervals(figures, cases)
    features = (embed(resize_for_segmenter(x), segmenter) for x in (images, made))
    return with_bounds if made is images else with_bounds | {"FID": round(fid(*features), 3)}


def show(rows: dict[str, dict]) -> None:
    """Print a table."""
    columns = [n for n in [*rows.values()][-1] if not n.endswith((", low", ", high"))]
    print(f"{'':28}" + "".join(f"{name:>14}" for name in columns))
    for name, row in rows.items():
        cells = (f"{row[column]:.3f}" if column in row else "–" for column in columns)
        print(f"{name:28}" + "".join(f"{cell:>14}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="folder of the large phantom set")
    parser.add_argument(
        "--terms", action="store_true", help="train with one term of the loss changed, and judge that"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each of these runs, default {STEPS}")
    args = parser.parse_args()
    slices, _ = asked_slices()
    images, masks, cases = to_unit_range(slices.images), slices.masks, slices.case.tolist()
    whole = read_slices(unseen_heads().test, SHRUNK, masks=True)
    asked = set(zip(cases, slices.plane.tolist()))
    rows = [place in asked for place in zip(whole.case.tolist(), whole.plane.tolist())]
    small = whole.masks[torch.tensor(rows)]
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}

    def note(kind: str, name: str, made: Tensor, **more: float) -> None:
        result.setdefault(kind, {})[name] = kept(images, made, masks, small, cases) | more
        RESULT.write_text(json.dumps(result, indent=1) + "\n")

    if not args.terms:
        result |= {"machine": machine(), "setting": f"{len(images)} slices of {len(set(cases))} unseen heads"}
        note("kept", "the slices themselves", images)
        note("kept", "autoencoder", reconstructed(images, load_autoencoder(device=DEVICE)))
        note("kept", "shrunk to 64×64", shrunk_and_back(images))
        show(result["kept"])
        return
    learned = load_slices(find_data(args.root).train, 256)
    result |= {"terms measured on": machine(), "steps of each term": args.steps}
    for name, changes in TERMS.items():
        config = PROFILES["autoencoder"].replace(steps=args.steps, precision="fp32", **changes)
        network = trained(config, learned).average.eval()
        network.standardise(learned[:: max(1, len(learned) // 1000)])
        more = {"deviation of latents": float(network.scale.mean()), "KL": _kl(network, images)}
        note("terms", name, reconstructed(images, network), **{k: round(v, 3) for k, v in more.items()})
    show(result["terms"])


@torch.no_grad()
def _kl(network: Autoencoder, images: Tensor) -> float:
    """Mean KL divergence of the latents' distributions from N(0, 1), a number."""
    return float(network.posterior(images[:64].to(network.shift.device)).kl().mean())


if __name__ == "__main__":
    main()
