"""What decides a training run: the loop's settings here, what is learned in its objective."""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from ..autoencoder import Autoencoding
from ..conditions import PHANTOM_CONDITIONS
from ..seeds import check_seed
from ..unet import UNet
from .objective import Denoising, LatentDenoising

_CHOICES = {"precision": ("fp32", "bf16", "auto"), "lr_schedule": ("cosine", "linear", "constant")}


@dataclass(frozen=True)
class TrainConfig:
    """How a run goes, whatever it learns; stored with the weights.

    ``objective`` is what is learned, by default :class:`~oasis_helpers.training.Denoising`; ``lr`` is the
    peak of a linear warm-up over ``warmup`` steps, then "cosine" or "linear" to zero at
    ``steps`` or "constant"; ``batch_size`` counts over all processes and is computed in ``accumulate``
    parts; ``grad_clip`` is the largest gradient norm; ``precision`` "fp32", "bf16" for autocast, or "auto"
    for the faster of the two here; ``seed`` decides the initial weights and all that is drawn. Raises
    ``ValueError`` for numbers outside their range.
    """

    objective: Any = field(default_factory=Denoising)
    steps: int = 200
    batch_size: int = 16
    lr: float = 1e-3
    warmup: int = 50
    lr_schedule: str = "cosine"
    accumulate: int = 1
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "lr", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0.")
        for name in ("warmup", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 or more.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}: give a number in [0, 1).")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}.")
        check_seed(self.seed)

    def make_network(self) -> torch.nn.Module:
        """A fresh network of the objective; its initial weights depend on ``seed`` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.objective.make_network()

    def begin(self, data) -> torch.nn.Module:
        """A fresh network ready for its first step on ``data``.

        An objective may have a first thing to do with it, ``begin(network, data, seed)``.
        """
        network = self.make_network()
        if begin := getattr(self.objective, "begin", None):
            begin(network, data, self.seed)
        return network

    def loop(self) -> dict[str, Any]:
        """The loop's own settings by name, as JSON can hold them."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "objective"}

    def settings(self) -> dict[str, Any]:
        """Every setting by name: the loop's, the objective's, and those of its network."""
        found = {f.name: getattr(self.objective, f.name) for f in fields(self.objective)}
        if "network" in found:
            unet = {name: p.default for name, p in inspect.signature(UNet).parameters.items()}
            found = unet | found.pop("network") | found
        return found | self.loop()

    def replace(self, **changes: Any) -> TrainConfig:
        """The same with some settings changed, each where it belongs: the loop, the objective or its network.

        Raises ``ValueError`` for a setting that none of them has.
        """
        known, objective, loop = self.settings(), {}, {}
        network = dict(getattr(self.objective, "network", {}))
        for name, value in changes.items():
            if name in self.loop() or name == "objective":
                loop[name] = value
            elif name in {f.name for f in fields(self.objective)}:
                objective[name] = value
            elif name in known:
                network[name] = value
            else:
                raise ValueError(f"there is no setting {name!r}: the settings are {', '.join(known)}.")
        if network != getattr(self.objective, "network", {}):
            objective.setdefault("network", network)
        if objective:
            loop["objective"] = dataclasses.replace(loop.get("objective", self.objective), **objective)
        return dataclasses.replace(self, **loop)


PROFILES = {
    # a taste, in CI and on any laptop: about a minute, not yet heads
    "quick": TrainConfig(steps=200, lr=2e-3, ema_decay=0.98).replace(base_channels=16),
    # heads in five minutes on two cores (steps=1000); all of it takes an hour there
    "laptop": TrainConfig(
        Denoising(min_snr_gamma=5.0, snr_offset=1.0),
        steps=12_051,
        batch_size=8,
        lr=1e-3,
        warmup=100,
        precision="auto",
    ),
    # told the height of a slice, atrophy and size of the head, or of people what their table says
    "guided": TrainConfig(
        Denoising(min_snr_gamma=5.0, snr_offset=1.0, conditions=PHANTOM_CONDITIONS),
        steps=16_000,
        batch_size=16,
        lr=1e-3,
        warmup=100,
        precision="auto",
    ),
    # a GPU's worth: 128×128, 23 million parameters
    "full": TrainConfig(
        Denoising(schedule="shifted cosine", min_snr_gamma=5.0, snr_offset=1.0),
        steps=200_000,
        batch_size=32,
        lr=4e-4,
        warmup=1000,
        ema_decay=0.9995,
        precision="auto",
    ).replace(
        image_size=128, base_channels=64, channel_mult=(1, 2, 3, 4), num_res_blocks=2, attention_levels=(2, 3)
    ),
    # Stable Diffusion's two halves: 256×256 to 32×32×4 and back, then heads by a prompt among those
    "autoencoder": TrainConfig(
        Autoencoding(), steps=6000, batch_size=16, lr=1e-3, warmup=200, precision="auto"
    ),
    "latent": TrainConfig(
        LatentDenoising(), steps=9000, batch_size=64, lr=1e-3, warmup=200, precision="auto"
    ),
}


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to ``config.lr``, then the way down (or not) that ``config.lr_schedule`` names."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = min((step - config.warmup) / max(config.steps - config.warmup, 1), 1.0)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return config.lr * left[config.lr_schedule]


def pick_device(wanted: torch.device | str | None = None) -> torch.device:
    """``wanted`` if it is here, by default the fastest: CUDA, else Apple's MPS, else the CPU.

    A card that this PyTorch has no kernels for is passed over with a warning. Raises ``ValueError`` for a
    device that was asked for and is not here.
    """
    if wanted is None:
        if torch.cuda.is_available() and _computes("cuda"):
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(wanted)
    here = {
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if not here.get(device.type, True):
        raise ValueError(f"device {device} is not here: leave it out for the fastest that is, or take 'cpu'.")
    return device


def _computes(device: str) -> bool:
    try:
        torch.ones(1, device=device).add(1).item()
        return True
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"the card cannot be used by this PyTorch ({reason}): going on without.", stacklevel=3)
        return False
