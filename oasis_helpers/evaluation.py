"""Judging samples: a segmentation network made for these slices, and distances in its features.

The feature network of the usual FID was trained on photographs. This one was trained to find CSF, grey
and white matter, so what it keeps of an image is anatomy.

Sources: KID, Bińkowski et al. 2018 (arXiv 1801.01401); FID, Heusel et al. 2017 (arXiv 1706.08500);
Dice, 1945 (Ecology 26, 297); U-Net for segmentation, Ronneberger et al. 2015 (arXiv 1505.04597).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from .data import to_unit_range
from .training import read_tensors, replace_file
from .unet import UNet

SEGMENTER = Path(__file__).parent / "weights" / "segmenter-64.safetensors"


class Segmenter(nn.Module):
    """The U-Net of the series with four answers a pixel instead of a guess of the noise.

    ``forward(x)``: (B, 1, 64, 64) in [−1, 1] → scores (B, 4, 64, 64) of background, CSF, grey, white.
    """

    image_size = 64
    settings = MappingProxyType(
        {"base_channels": 32, "channel_mult": (1, 2, 4), "attention_levels": (), "patch_size": 2}
    )

    def __init__(self):
        super().__init__()
        self.unet = UNet(in_channels=1, out_channels=4, **self.settings)
        self.num_features = 2 * 32 * 4
        # Mean and deviation over the images it was trained on: every feature then counts alike.
        self.register_buffer("feature_mean", torch.zeros(self.num_features))
        self.register_buffer("feature_std", torch.ones(self.num_features))

    def _time(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), dtype=torch.long, device=x.device)  # every image is clean

    def forward(self, x: Tensor) -> Tensor:
        return self.unet(x, self._time(x))

    def features(self, x: Tensor) -> Tensor:
        """Mean and deviation of each channel of the bottleneck, standardised, (B, num_features)."""
        h = self.unet.encode(x, self._time(x))[0].flatten(2)
        return (torch.cat([h.mean(2), h.std(2)], 1) - self.feature_mean) / self.feature_std

    @torch.no_grad()
    def standardise(self, x: Tensor) -> None:
        """Let the features of the images ``x`` have mean 0 and deviation 1 from now on."""
        self.feature_mean.zero_(), self.feature_std.fill_(1)
        found = torch.cat([self.features(part) for part in x.split(64)])
        self.feature_mean.copy_(found.mean(0)), self.feature_std.copy_(found.std(0))


def check_images(images: Tensor, least: int = 1) -> Tensor:
    """``images`` if they are what the segmenter reads, else ``ValueError`` that names the fault.

    Wanted: float (B, 1, 64, 64) with at least ``least`` of them, numbers only, values in about [−1, 1],
    none constant.
    """
    size = Segmenter.image_size
    if not images.is_floating_point() or images.ndim != 4 or images.shape[1:] != (1, size, size):
        raise ValueError(
            f"images are {images.dtype} of shape {tuple(images.shape)}: the segmenter reads float "
            f"(B, 1, {size}, {size}) in [−1, 1]. Resize them, or use to_unit_range for bytes."
        )
    if len(images) < least:
        raise ValueError(f"{len(images)} images are too few: this figure needs at least {least}.")
    if not images.isfinite().all():
        raise ValueError("images hold NaN or infinity: the run that made them has failed.")
    low, high = float(images.min()), float(images.max())
    if low < -1.5 or high > 1.5 or low >= -0.05:
        raise ValueError(
            f"images run from {low:.3g} to {high:.3g}: the segmenter reads [−1, 1] with dark air at −1."
        )
    if constant := int((images.flatten(1).std(1) < 1e-3).sum()):
        raise ValueError(f"{constant} of {len(images)} images are constant: there is nothing to judge.")
    return images


@torch.no_grad()
def embed(images: Tensor, segmenter: Segmenter) -> Tensor:
    """Features of every image, (B, 1, 64, 64) → (B, num_features), on the CPU."""
    device = next(segmenter.parameters()).device
    return torch.cat([segmenter.features(part.to(device)).cpu() for part in check_images(images).split(64)])


@torch.no_grad()
def segment(images: Tensor, segmenter: Segmenter) -> Tensor:
    """Class of every pixel, (B, 1, 64, 64) → long (B, 64, 64): background, CSF, grey, white."""
    device = next(segmenter.parameters()).device
    return torch.cat([segmenter(part.to(device)).argmax(1).cpu() for part in check_images(images).split(64)])


def dice(predicted: Tensor, masks: Tensor) -> Tensor:
    """2·|A∩B| / (|A| + |B|) of each of the four classes over all images, (4,): Dice 1945.

    ``predicted`` and ``masks``: class ids (B, H, W). A class in neither is NaN.
    """
    a, b = (F.one_hot(ids.long(), 4).flatten(0, 2).bool() for ids in (predicted, masks))
    return 2 * (a & b).sum(0) / (a.sum(0) + b.sum(0))


def train_segmenter(
    slices: Tensor, masks: Tensor, *, steps: int = 2000, batch_size: int = 16, lr: float = 3e-3, seed: int = 0
) -> Iterator[tuple[int, float, Segmenter]]:
    """Train a :class:`Segmenter` and yield (step, loss, network) after every step.

    ``slices``: uint8 (N, 1, 64, 64); ``masks``: class ids (N, 64, 64). Cross-entropy; brightness,
    contrast, left and right, and a little noise vary, so that it can judge images that are not perfect.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Segmenter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(1, steps + 1):
        picked = torch.randint(0, len(slices), (batch_size,), generator=generator)
        x, wanted = to_unit_range(slices[picked]), masks[picked].long()
        if torch.rand((), generator=generator) < 0.5:  # as stored, left and right are rows
            x, wanted = x.flip(-2), wanted.flip(-2)
        gain, shift, noise = torch.rand((3, batch_size, 1, 1, 1), generator=generator)
        x = (x + 1) * (0.8 + 0.4 * gain) - 1 + 0.1 * (shift - 0.5)
        x = x + 0.05 * noise * torch.randn(x.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(x)
        loss = F.cross_entropy(scores.float(), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step == steps:
            model.eval().standardise(to_unit_range(slices[:: max(len(slices) // 2000, 1)]))
        yield step, loss.item(), model


def save_segmenter(path: str | Path, model: Segmenter, **card: str) -> None:
    """Write a segmenter to a safetensors file, atomically; ``card`` goes into its metadata."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    replace_file(Path(path), lambda temporary: save_file(tensors, temporary, {"kind": "segmenter", **card}))


def load_segmenter(path: str | Path = SEGMENTER, device: torch.device | str = "cpu") -> Segmenter:
    """The segmenter that ships, or another of :func:`save_segmenter`; ``ValueError`` for other files."""
    tensors, metadata = read_tensors(path)
    if metadata.get("kind") != "segmenter":
        raise ValueError(f"{path} holds no segmenter.")
    model = Segmenter()
    model.load_state_dict(tensors)
    return model.to(device).eval()


class _Features(nn.Module):
    """What torchmetrics asks of a feature network; here the features are computed already."""

    def __init__(self, size: int):
        super().__init__()
        self.num_features = size

    def forward(self, x: Tensor) -> Tensor:
        return x


def kid(
    real: Tensor, generated: Tensor, *, subsets: int = 50, subset_size: int = 100, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance of two sets of features (N, D) and (M, D): mean and deviation over subsets.

    The unbiased squared MMD with the kernel (x·y/D + 1)³, Bińkowski et al. 2018, by torchmetrics.
    About 0 for two sets of one distribution, whatever their size. Raises ``ValueError`` for
    fewer than ``subset_size`` images.
    """
    with warnings.catch_warnings():  # it warns of the memory that features take; these are small
        warnings.simplefilter("ignore", UserWarning)
        metric = KernelInceptionDistance(_Features(real.shape[1]), subsets=subsets, subset_size=subset_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # torchmetrics draws its subsets from the global state
        metric.update(real, real=True)
        metric.update(generated, real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)
