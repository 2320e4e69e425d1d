"""What diffusion asks of the training loop: which network, what is random in a step, and the loss.

The loop knows no diffusion. It asks an objective for a network (``make_network``), what comes before the
first step (``begin``, if there is such) and after the last (``finish``), for all that a step needs
of a batch (``draw``: everything random is drawn here, on the CPU, from one generator) and for the loss of
each image (the objective called). Ho et al. 2020 (arXiv 2006.11239), algorithm 1; dropped conditions, Ho &
Salimans 2022 (arXiv 2207.12598), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..conditions import Condition, Tokens, from_json, to_json, without
from ..data import to_unit_range
from ..diffusion import LOSSES, Denoiser, NoiseSchedule, check_prediction, diffusion_loss
from ..prompts import LENGTH, VOCABULARY, phrases, tokens
from ..seeds import generator
from ..unet import UNet
from .reading import teach_reading

if TYPE_CHECKING:
    from .config import TrainConfig


def _small_unet() -> dict[str, Any]:
    return {
        "base_channels": 32, "channel_mult": (1, 2, 4), "num_res_blocks": 1, "attention_levels": (2,),
        "patch_size": 2,
    }  # fmt: skip


_schedule = cache(NoiseSchedule.named)  # a step asks for it, and it is always the same


@dataclass(frozen=True)
class Denoising:
    """The objective of diffusion: tell noise and image apart at every timestep.

    ``image_size`` in pixels; ``network``: settings of the :class:`~oasis_helpers.unet.UNet`;
    ``schedule``, ``T``, ``prediction``, ``loss``, ``min_snr_gamma`` and ``snr_offset`` as in
    :mod:`~oasis_helpers.diffusion`; ``conditions`` by name as in :mod:`~oasis_helpers.conditions`, left out
    of the share ``drop`` of the images, so that the network is unconditional as well; where there are
    several, each is also left out alone as often, so that any of them can be asked for without the others.
    Raises ``ValueError`` for settings that do not exist.
    """

    image_size: int = 64
    network: Mapping[str, Any] = field(default_factory=_small_unet)
    schedule: str = "cosine"
    T: int = 1000
    prediction: str = "v_prediction"
    loss: str = "l2"
    min_snr_gamma: float | None = None
    snr_offset: float = 0.0
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    drop: float = 0.1
    kind: ClassVar[str] = "denoiser"

    def __post_init__(self):
        for name, most in (("image_size", 4096), ("T", 100_000)):  # a file may ask for anything
            if not 0 < getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number from 1 to {most:,}.")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma is {self.min_snr_gamma}: give a number above 0, or None.")
        if not self.snr_offset >= 0:
            raise ValueError(f"snr_offset is {self.snr_offset}: give 0 or more.")
        if self.snr_offset and self.min_snr_gamma is None:
            raise ValueError(
                f"snr_offset is {self.snr_offset}, but min_snr_gamma is None and so there is no weight: "
                "give min_snr_gamma as well, or snr_offset 0."
            )
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}: choose one of {', '.join(LOSSES)}.")
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop is {self.drop}: give a share from 0 to 1.")
        check_prediction(self.prediction)
        self.make_schedule()
        # JSON has no tuples; settings read back must equal those written.
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in self.network.items()}
        object.__setattr__(self, "network", settings)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image, (C, H, W)."""
        return self.network.get("in_channels", 1), self.image_size, self.image_size

    def settings(self) -> dict[str, Any]:
        """All of it as JSON can hold it; :meth:`from_settings` is the way back."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return found | {"conditions": to_json(self.conditions)}

    @classmethod
    def from_settings(cls, stored: dict[str, Any]) -> Denoising:
        """The objective of :meth:`settings`; ``ValueError`` or ``TypeError`` for what cannot be one."""
        return cls(**{**stored, "conditions": from_json(stored.get("conditions", {}))})

    def make_schedule(self) -> NoiseSchedule:
        """The noise schedule that ``schedule`` names."""
        return _schedule(self.schedule, self.T)

    def make_network(self) -> UNet:
        """A fresh network."""
        return UNet(**self.network, conditions=self.conditions)

    def denoiser(self, network: nn.Module) -> Denoiser:
        """The network as what samplers want."""
        return Denoiser(network, self.make_schedule(), self.prediction, self.shape)

    def draw(self, batch, drawn: torch.Generator) -> dict[str, Any]:
        """Timesteps, noise and dropped conditions for a batch: images, or (images, conditions by name).

        Images are bytes from :func:`~oasis_helpers.data.load_slices`, or floats as they are to be noised.
        Raises ``ValueError`` for images of another size or kind.
        """
        images, y = batch if isinstance(batch, tuple) else (batch, {})
        if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}: give uint8 from load_slices, or "
                "floats, (N, C, H, W)."
            )
        if tuple(images.shape[1:]) != self.shape:
            found, wanted = ("×".join(map(str, shape)) for shape in (images.shape[1:], self.shape))
            raise ValueError(
                f"images are {found}, the configuration says {wanted}: "
                f"load them with load_slices(root, {self.image_size})."
            )
        t = torch.randint(0, self.T, (len(images),), generator=drawn)
        noise = torch.randn(images.shape, generator=drawn)
        if y:
            y = without(self.conditions, y, torch.rand(len(images), generator=drawn) < self.drop)
            if len(y) > 1:
                for name, values in y.items():
                    alone = torch.rand(len(images), generator=drawn) < self.drop
                    y |= without(self.conditions, {name: values}, alone)
        return {"images": images, "t": t, "noise": noise, "y": y}

    def __call__(self, network: nn.Module, step: dict[str, Any]) -> Tensor:
        """The loss of each image, (B,), for what :meth:`draw` gave."""
        images = step["images"]
        x0 = to_unit_range(images) if images.dtype == torch.uint8 else images
        return diffusion_loss(
            network, self.make_schedule(), x0, step["t"], step["noise"], self.prediction, step["y"] or None,
            loss=self.loss, min_snr_gamma=self.min_snr_gamma, snr_offset=self.snr_offset,
        )  # fmt: skip


def _latent_unet() -> dict[str, Any]:
    return {
        "in_channels": 4, "base_channels": 48, "channel_mult": (1, 2, 3), "num_res_blocks": 1,
        "attention_levels": (1, 2), "patch_size": 1,
    }  # fmt: skip


def _a_prompt() -> dict[str, Condition]:
    return {"prompt": Tokens(len(VOCABULARY), LENGTH)}


@dataclass(frozen=True)
class LatentDenoising(Denoising):
    """The objective of Stable Diffusion: :class:`Denoising`, of latents, by phrases about them.

    ``image_size`` is that of the latents. ``autoencoder``: the SHA-256 of the file of weights whose latents
    they are; those of another autoencoder mean nothing to the network. ``words``: the vocabulary that its
    tokens number. Before the first step the transformer learns for ``reading_steps`` to read
    (:mod:`~oasis_helpers.training.reading`). Each time a latent is seen, a new phrase is made of what is true
    of it.
    """

    image_size: int = 32
    network: Mapping[str, Any] = field(default_factory=_latent_unet)
    min_snr_gamma: float | None = 5.0
    snr_offset: float = 1.0
    conditions: Mapping[str, Condition] = field(default_factory=_a_prompt)
    autoencoder: str = ""
    words: tuple[str, ...] = VOCABULARY
    reading_steps: int = 1200
    kind: ClassVar[str] = "latent denoiser"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "words", tuple(self.words))
        if self.words != VOCABULARY:
            raise ValueError("its prompts have other words than this version's grammar")
        if self.reading_steps < 0:
            raise ValueError(f"reading_steps is {self.reading_steps}: give 0 or more.")

    def begin(self, network: UNet, data, seed: int) -> None:
        """Teach the transformer of a fresh network to read phrases about ``data``."""
        # in parts: what comes with the truths, latents or pixels, may fill the memory
        known = torch.cat([data[rows][1] for rows in torch.arange(len(data)).split(512)])
        teach_reading(network.conditions["prompt"], known, self.reading_steps, seed)

    def draw(self, batch, drawn: torch.Generator) -> dict[str, Any]:
        """Phrases for latents (B, c, h, w) of which (B, 6) is true, and the rest as :class:`Denoising`."""
        latents, known = batch
        return super().draw((latents, {"prompt": tokens(phrases(known, drawn))}), drawn)


@torch.no_grad()
def validation_loss(
    network: nn.Module, config: TrainConfig, images: Tensor, *, buckets: int = 10, seed: int = 0
) -> Tensor:
    """Mean squared error of the network's output in each of ``buckets`` equal ranges of t, shape (buckets,).

    ``images``: uint8 (N, C, H, W). Every one is noised once in each bucket, with timesteps and noise fixed by
    ``seed``, so that two networks, or two moments of one, are compared on the same questions.
    """
    objective, losses = config.objective, []
    device, schedule = next(network.parameters()).device, objective.make_schedule()
    edges = torch.linspace(0, objective.T, buckets + 1).round().long()
    for bucket, (low, high) in enumerate(pairwise(edges.tolist())):
        drawn, found = generator(seed, bucket), []
        for part in images.split(64):
            x0 = to_unit_range(part).to(device)
            t = torch.randint(low, high, (len(x0),), generator=drawn).to(device)
            noise = torch.randn(x0.shape, generator=drawn).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                found.append(diffusion_loss(network, schedule, x0, t, noise, objective.prediction))
        losses.append(torch.cat(found).mean())
    return torch.stack(losses).cpu()
