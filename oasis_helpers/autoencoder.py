"""A slice of 256×256 as 32×32×4 numbers, and back: the autoencoder that Stable Diffusion diffuses inside of.

The encoder says where an image may lie among the latents, a normal distribution a number; the decoder makes
the image again. A small pull towards N(0, 1) keeps the latents near each other, so that what lies between two
of them is an image as well.

Sources: variational autoencoder, Kingma & Welling 2014 (arXiv 1312.6114); as the first stage of diffusion,
Rombach et al. 2022 (arXiv 2112.10752), section 3.1 and appendix G; errors in the features of a network,
Johnson et al. 2016 (arXiv 1603.08155); space-to-depth, Shi et al. 2016 (arXiv 1609.05158).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data import DataLocation, Slices, load_factors, read_slices, to_unit_range
from .prompts import truths

if TYPE_CHECKING:
    from .diffusion import Denoiser
    from .evaluation import Segmenter
    from .intake.phantoms import PhantomFactors

_WEIGHTS = Path(__file__).parent / "weights"
AUTOENCODER, LATENT = _WEIGHTS / "autoencoder-256.safetensors", _WEIGHTS / "latent-256.safetensors"
PATCH = 4  # pixels each way that the first layer folds into channels: 16 times less work at no loss
FACTOR = 2 * PATCH  # pixels each way that share one place of the latents
PART = 32  # images encoded or decoded at once


class ResBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, (B, C, H, W) → same: the U-Net's block without a timestep."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            _norm(channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            _norm(channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


def _blocks(channels: int, count: int) -> list[nn.Module]:
    return [ResBlock(channels) for _ in range(count)]


class Encoder(nn.Sequential):
    """Images (B, 1, H, W) → mean and log-variance of their latents, (B, 2·latent_channels, H/8, W/8).

    ``widths``: channels at a quarter and at an eighth of the image's size; ``blocks`` at each.
    """

    def __init__(self, latent_channels: int, widths: tuple[int, int], blocks: int):
        fine, coarse = widths
        super().__init__(
            nn.PixelUnshuffle(PATCH),
            nn.Conv2d(PATCH**2, fine, 3, padding=1),
            *_blocks(fine, blocks),
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1),
            *_blocks(coarse, blocks),
            _norm(coarse),
            nn.SiLU(),
            nn.Conv2d(coarse, 2 * latent_channels, 3, padding=1),
        )


class Decoder(nn.Sequential):
    """Latents (B, latent_channels, h, w) → images (B, 1, 8h, 8w); settings as of :class:`Encoder`."""

    def __init__(self, latent_channels: int, widths: tuple[int, int], blocks: int):
        fine, coarse = widths
        super().__init__(
            nn.Conv2d(latent_channels, coarse, 3, padding=1),
            *_blocks(coarse, blocks),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(coarse, fine, 3, padding=1),
            *_blocks(fine, blocks),
            _norm(fine),
            nn.SiLU(),
            nn.Conv2d(fine, PATCH**2, 3, padding=1),
            nn.PixelShuffle(PATCH),
        )


class DiagonalGaussian:
    """N(mean, exp(log_variance)) for every number by itself; both (B, c, h, w)."""

    def __init__(self, mean: Tensor, log_variance: Tensor):
        self.mean, self.log_variance = mean, log_variance.clamp(-30, 20)

    def sample(self, noise: Tensor) -> Tensor:
        """mean + deviation · ``noise``, which is standard normal: Kingma & Welling 2014, section 2.4."""
        return self.mean + (self.log_variance / 2).exp() * noise

    def kl(self) -> Tensor:
        """KL divergence from N(0, 1), the *mean* over the numbers of each image, (B,): appendix B."""
        each = (self.mean**2 + self.log_variance.exp() - 1 - self.log_variance) / 2
        return each.flatten(1).mean(1)


class Autoencoder(nn.Module):
    """Encoder, decoder, and the scale of the latents between them.

    ``encode(images)``: float (B, 1, H, W) in [−1, 1], sides that divide by 8 → latents (B, c, H/8, W/8) with
    mean 0 and deviation 1 a channel over the training set: the means of the encoder, less ``shift`` and over
    ``scale``. ``decode(latents)`` is the way back, held in [−1, 1]. ``forward(images, noise)``, for training,
    samples the latents: (reconstruction, :class:`DiagonalGaussian`). ``sha256`` is that of the file it came
    from. Raises ``ValueError`` for images or latents of another shape or kind, or that hold NaN.
    """

    sha256: str | None = None

    def __init__(
        self,
        latent_channels: int = 4,
        encoder_widths: tuple[int, int] = (64, 128),
        decoder_widths: tuple[int, int] = (80, 160),
        encoder_blocks: int = 2,
        decoder_blocks: int = 3,
    ):
        super().__init__()
        self.latent_channels = latent_channels
        self.encoder = Encoder(latent_channels, encoder_widths, encoder_blocks)
        self.decoder = Decoder(latent_channels, decoder_widths, decoder_blocks)
        self.register_buffer("shift", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("scale", torch.ones(latent_channels, 1, 1))

    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """Where the images may lie among the latents, before shift and scale."""
        return DiagonalGaussian(*self.encoder(images).float().chunk(2, 1))

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, DiagonalGaussian]:
        posterior = self.posterior(images)
        return self.decoder(posterior.sample(noise)), posterior

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 1 or images.shape[2] % FACTOR or images.shape[3] % FACTOR:
            raise ValueError(
                f"images have shape {tuple(images.shape)}: give (B, 1, H, W), with sides that divide by "
                f"{FACTOR}."
            )
        _check_numbers("images", images)
        means = [self.posterior(part).mean for part in images.split(PART)]
        return (torch.cat(means) - self.shift) / self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}: this autoencoder's are "
                f"(B, {self.latent_channels}, h, w)."
            )
        _check_numbers("latents", latents)
        images = [self.decoder(part) for part in (latents * self.scale + self.shift).split(PART)]
        return torch.cat(images).clamp(-1, 1)

    @torch.no_grad()
    def standardise(self, slices: Tensor) -> None:
        """Let the latents of all ``slices``, uint8 (N, 1, H, W), have mean 0 and deviation 1 a channel.

        From one batch the scale would be a little off, and one scale for all channels leaves some too weak
        and some too strong for the noise of the diffusion.
        """
        self.shift.zero_(), self.scale.fill_(1)
        sums, squares, count = 0.0, 0.0, 0
        for part in slices.split(PART):
            latents = self.encode(to_unit_range(part.to(self.shift.device))).double().cpu()
            sums, squares = sums + latents.sum((0, 2, 3)), squares + latents.square().sum((0, 2, 3))
            count += latents[:, 0].numel()
        mean = sums / count
        self.shift.copy_(mean[:, None, None])
        self.scale.copy_((squares / count - mean**2).sqrt()[:, None, None])


def _check_numbers(what: str, values: Tensor) -> None:
    if not values.is_floating_point():
        raise ValueError(f"{what} are {values.dtype}: give floats (to_unit_range makes them of bytes).")
    if not values.isfinite().all():
        raise ValueError(f"{what} hold NaN or infinity: the run that made them has failed.")


# ---- what it learns by --------------------------------------------------------------------------


@cache
def _judge(device: torch.device) -> Segmenter:
    from .evaluation import load_segmenter

    return load_segmenter(device=device).requires_grad_(False)


def _feature_maps(images: Tensor) -> Iterator[Tensor]:
    """All maps of the segmenter's way down, for images (B, 1, H, W) shrunk to the size that it reads."""
    judge = _judge(images.device)
    small = F.interpolate(images, (judge.image_size, judge.image_size), mode="area")
    emb, context = judge.unet.embed(torch.zeros(len(small), dtype=torch.long, device=small.device))
    bottleneck, skips = judge.unet.encode(small, emb, context)
    yield from (*skips, bottleneck)


@dataclass(frozen=True)
class Autoencoding:
    """The objective of the autoencoder: the image again, and latents near N(0, 1).

    The loss of an image is |x̂ − x|, the *mean* over its pixels; ``features`` times the absolute difference of
    the segmenter's feature maps, the *mean* over each map's numbers and then over the maps; ``kl`` times
    :meth:`DiagonalGaussian.kl`, a *mean* as well. (Weights mean nothing without the reductions: Stable
    Diffusion sums, and its KL weight of 1e-6 is another.) ``image_size`` in pixels; the others are settings
    of the :class:`Autoencoder`.
    """

    image_size: int = 256
    kl: float = 1e-4
    features: float = 0.1
    latent_channels: int = 4
    encoder_widths: tuple[int, int] = (64, 128)
    decoder_widths: tuple[int, int] = (80, 160)
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    kind: ClassVar[str] = "autoencoder"

    def __post_init__(self):
        if not 0 < self.image_size <= 4096 or self.image_size % FACTOR:
            raise ValueError(f"image_size is {self.image_size}: give a multiple of {FACTOR} up to 4,096.")
        for name in ("kl", "features"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 or more.")
        for name in ("encoder_blocks", "decoder_blocks"):  # a file may ask for anything
            if not 0 <= getattr(self, name) <= 64:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 to 64.")
        for name in ("encoder_widths", "decoder_widths"):  # JSON has no tuples
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def settings(self) -> dict[str, Any]:
        """All of it as JSON can hold it; ``Autoencoding(**settings)`` is the way back."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def make_network(self) -> Autoencoder:
        """A fresh autoencoder."""
        return Autoencoder(
            self.latent_channels, self.encoder_widths, self.decoder_widths, self.encoder_blocks,
            self.decoder_blocks,
        )  # fmt: skip

    def draw(self, slices: Tensor, drawn: torch.Generator) -> dict[str, Tensor]:
        """Slices, uint8 (B, 1, H, W), and the noise of their latents; ``ValueError`` for another size."""
        wanted = (1, self.image_size, self.image_size)
        if slices.dtype != torch.uint8 or tuple(slices.shape[1:]) != wanted:
            raise ValueError(
                f"images are {slices.dtype} {tuple(slices.shape)}: give uint8 (N, 1, {self.image_size}, "
                f"{self.image_size}), as load_slices(root, {self.image_size})."
            )
        side = self.image_size // FACTOR
        noise = torch.randn((len(slices), self.latent_channels, side, side), generator=drawn)
        return {"images": slices, "noise": noise}

    def __call__(self, network: nn.Module, step: dict[str, Tensor]) -> Tensor:
        """The loss of each image, (B,), for what :meth:`draw` gave."""
        images = to_unit_range(step["images"])
        made, posterior = network(images, step["noise"])
        made = made.float()
        loss = (made - images).abs().flatten(1).mean(1) + self.kl * posterior.kl()
        if self.features:
            with torch.no_grad():
                wanted = list(_feature_maps(images))
            differences = [
                (a - b).float().abs().flatten(1).mean(1) for a, b in zip(_feature_maps(made), wanted)
            ]
            loss = loss + self.features * torch.stack(differences).mean(0)
        return loss

    def finish(self, network: Autoencoder, slices: Tensor) -> None:
        """The last thing after training: the scale of the latents, over all that was learned from."""
        network.standardise(slices)


# ---- the file -----------------------------------------------------------------------------------


def load_autoencoder(path: str | Path = AUTOENCODER, device: torch.device | str = "cpu") -> Autoencoder:
    """The autoencoder in a file of weights, by default the one that ships, in eval mode.

    It knows the SHA-256 of its file, which a model of its latents must name. Raises ``FileNotFoundError``,
    or ``ValueError`` for a file that is damaged or of another kind.
    """
    from .training import load_network, read_header

    header = read_header(path)
    if header.kind != Autoencoding.kind:
        raise ValueError(f"{path} is of kind {header.kind!r}, not an autoencoder.")
    if header.run:
        raise ValueError(f"{path} is a checkpoint: go on with its run (--resume), which writes the weights.")
    try:
        objective = Autoencoding(**header.settings)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} has settings that this version cannot use ({error}): update oasis_helpers."
        ) from error
    network = load_network(path, objective.make_network).to(device)
    network.sha256 = hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    return network


def load_stable_diffusion(
    path: str | Path = LATENT,
    autoencoder: str | Path = AUTOENCODER,
    device: torch.device | str = "cpu",
) -> tuple[Denoiser, Autoencoder]:
    """A denoiser of latents and the autoencoder whose latents they are, by default those that ship.

    Samples of the denoiser, conditions ``{"prompt": tokenize(text)}``, are images after
    ``autoencoder.decode``; they are not clipped on the way. Raises ``ValueError`` for an autoencoder that is
    not the one the denoiser was trained with, and as ``load_weights`` and :func:`load_autoencoder`.
    """
    from .training import LatentDenoising, load_weights, read_header

    header = read_header(path)
    if header.kind != LatentDenoising.kind:
        raise ValueError(f"{path} is of kind {header.kind!r}, not a denoiser of latents.")
    between = load_autoencoder(autoencoder, device)
    if (wanted := header.settings.get("autoencoder")) != between.sha256:
        raise ValueError(
            f"{path} was trained on the latents of the autoencoder with SHA-256 {str(wanted)[:16]}…; "
            f"{autoencoder} has {between.sha256[:16]}…: give the autoencoder that belongs to it."
        )
    return load_weights(path, device), between


# ---- what is learned from ------------------------------------------------------------------------


@dataclass(frozen=True)
class Latents:
    """A set of slices as latents, computed once: an index gives (latents, what is true of the slices).

    ``latents``: float (N, c, h, w); ``known``: (N, 6), rows of :func:`~oasis_helpers.prompts.truths`.
    ``fingerprint`` is that of the slices and the autoencoder, for the latents' last bits differ from machine
    to machine.
    """

    latents: Tensor
    known: Tensor
    fingerprint: str

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.latents[rows], self.known[rows]


def load_latents(location: DataLocation, autoencoder: Autoencoder, image_size: int = 256) -> Latents:
    """The training slices of phantoms as :func:`latents_of` makes them.

    Raises ``ValueError`` for data without the causes of its heads, and as ``read_slices``.
    """
    factors = load_factors(location)
    if location.kind != "phantoms" or not factors:
        raise ValueError(f"{location.root} has no phantoms.csv: prompts are made of the causes of phantoms.")
    return latents_of(read_slices(location.train, image_size), factors, autoencoder)


def latents_of(slices: Slices, factors: dict[int, PhantomFactors], autoencoder: Autoencoder) -> Latents:
    """Slices as latents, with what is true of them, in memory: 16 kB a slice.

    They are the means that the encoder gives, not samples around them: the deviation is about as small as
    the noise of the diffusion's first timestep. Raises ``ValueError`` for a case without ``factors``.
    """
    from .training import fingerprint

    known = truths(factors, slices.case, slices.plane)
    latents = torch.cat(
        [
            autoencoder.encode(to_unit_range(part.to(autoencoder.shift.device))).cpu()
            for part in tqdm(slices.images.split(PART), desc="latents", disable=len(slices.images) < 2000)
        ]
    )
    of_both = f"{fingerprint(slices.images)}, autoencoder {str(autoencoder.sha256)[:16]}"
    return Latents(latents, known, of_both)
