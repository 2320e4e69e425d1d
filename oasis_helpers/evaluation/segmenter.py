"""A network that finds the tissues of a slice: its features are what sets of slices are compared by.

The feature network of the usual FID was trained on photographs. This one was trained to find CSF, grey
and white matter, so what it keeps of an image is anatomy.

Sources: U-Net for segmentation, Ronneberger et al. 2015 (arXiv 1505.04597); Dice, 1945 (Ecology 26, 297).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..data import to_unit_range
from ..training import TrainConfig, TrainState, load_network, read_header, save, train
from ..unet import UNet

LEAST = 100  # images of a set in a report: with fewer, one in a hundred cannot be seen
SEGMENTER = Path(__file__).parents[1] / "weights" / "segmenter-64.safetensors"


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
        h = self.unet.encode(x, *self.unet.embed(self._time(x)))[0].flatten(2)
        return (torch.cat([h.mean(2), h.std(2)], 1) - self.feature_mean) / self.feature_std

    @torch.no_grad()
    def standardise(self, x: Tensor) -> None:
        """Let the features of the images ``x`` have mean 0 and deviation 1 from now on."""
        self.feature_mean.zero_(), self.feature_std.fill_(1)
        found = torch.cat([self.features(part.to(self.feature_mean.device)) for part in x.split(64)])
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


@dataclass(frozen=True)
class Segmentation:
    """The objective of the segmenter: the class of every pixel, by cross-entropy.

    Brightness, contrast, left and right, and a little noise vary, so that it can judge images that are not
    perfect.
    """

    kind: ClassVar[str] = "segmenter"

    def make_network(self) -> Segmenter:
        """A fresh segmenter."""
        return Segmenter()

    def settings(self) -> dict[str, Any]:
        """What JSON can hold of it: there is one segmenter."""
        return {}

    def draw(self, batch: tuple[Tensor, Tensor], drawn: torch.Generator) -> dict[str, Tensor]:
        """Slices, uint8 (B, 1, 64, 64), and class ids, (B, 64, 64), varied at random."""
        x, wanted = to_unit_range(batch[0]), batch[1].long()
        if torch.rand((), generator=drawn) < 0.5:  # as stored, left and right are rows
            x, wanted = x.flip(-2), wanted.flip(-2)
        gain, shift, noise = torch.rand((3, len(x), 1, 1, 1), generator=drawn)
        x = (x + 1) * (0.8 + 0.4 * gain) - 1 + 0.1 * (shift - 0.5)
        return {"x": x + 0.05 * noise * torch.randn(x.shape, generator=drawn), "wanted": wanted}

    def __call__(self, network: nn.Module, step: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of each image, (B,)."""
        scores = network(step["x"]).float()
        return F.cross_entropy(scores, step["wanted"], reduction="none").flatten(1).mean(1)


def train_segmenter(
    slices: Tensor, masks: Tensor, *, steps: int = 2000, batch_size: int = 16, lr: float = 1e-3, seed: int = 0
) -> Iterator[TrainState]:
    """Train a :class:`Segmenter` by the loop of all networks, and yield its state after every step.

    ``slices``: uint8 (N, 1, 64, 64); ``masks``: class ids (N, 64, 64). After the last step the features are
    standardised on the slices. Raises ``ValueError`` for masks that are not those of the slices.
    """
    size = (Segmenter.image_size, Segmenter.image_size)
    if slices.dtype != torch.uint8 or tuple(slices.shape) != (len(slices), 1, *size):
        raise ValueError(f"slices are {slices.dtype} {tuple(slices.shape)}: give uint8 (N, 1, 64, 64).")
    if tuple(masks.shape) != (len(slices), *size):
        raise ValueError(
            f"there are {len(slices)} slices and masks of shape {tuple(masks.shape)}: give one a slice."
        )
    config = TrainConfig(
        Segmentation(), steps=steps, batch_size=batch_size, lr=lr, warmup=3 * steps // 10, weight_decay=1e-3,
        ema_decay=0.0, precision="auto", seed=seed,
    )  # fmt: skip
    for state in train(config, TensorDataset(slices, masks)):
        if state.step == steps:
            state.model.eval().standardise(to_unit_range(slices[:: max(len(slices) // 2000, 1)]))
        yield state


def save_segmenter(path: str | Path, model: Segmenter, card: dict[str, Any] | None = None) -> None:
    """Write a segmenter to a file, atomically; ``card`` says what it learned from."""
    save(path, model.state_dict(), Segmentation.kind, {}, card=card)


def load_segmenter(path: str | Path = SEGMENTER, device: torch.device | str = "cpu") -> Segmenter:
    """The segmenter that ships, or another of :func:`save_segmenter`; ``ValueError`` for other files."""
    if read_header(path).kind != Segmentation.kind:
        raise ValueError(f"{path} holds no segmenter.")
    return load_network(path, Segmenter).to(device)
