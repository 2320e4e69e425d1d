"""The forward process: noise schedules, q(x_t | x_0), its posterior, and what a network predicts.

Timesteps are integers 0 … T−1 and ``alphas_cumprod[t]`` is the product of ``1 − betas[0..t]``,
so t = 0 already holds one step of noise. "No noise" has no index.

Sources: DDPM, Ho et al. 2020 (arXiv 2006.11239); cosine schedule, Nichol & Dhariwal 2021
(arXiv 2102.09672); v-prediction, Salimans & Ho 2022 (arXiv 2202.00512); sigmoid schedule,
Jabri et al. 2022 (arXiv 2212.11972).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PREDICTIONS = ("epsilon", "sample", "v_prediction")


def check_prediction(prediction: str) -> None:
    """Raise ``ValueError`` unless ``prediction`` names what a network can output."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction is {prediction!r}: choose one of {', '.join(map(repr, PREDICTIONS))}.")


class NoiseSchedule:
    """How much noise each of T steps adds, and every closed form that follows from it.

    ``betas``: T variances in (0, 1); the last may be 1 (then no signal is left at T − 1). Kept in
    float64 (small differences of numbers near 1 lose digits in float32); results have the dtype
    and device of the images given. ``alphas_cumprod`` (T,) is strictly decreasing in (0, 1),
    or to 0. Raises ``ValueError`` for betas that are not one-dimensional or leave (0, 1).
    """

    def __init__(self, betas: Tensor, name: str = "custom"):
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas has shape {tuple(betas.shape)}: give one number per step, shape (T,).")
        outside = ~((betas > 0) & (betas < 1))
        outside[-1] &= betas[-1] != 1
        if outside.any():
            first = int(outside.nonzero()[0])
            raise ValueError(f"betas[{first}] is {float(betas[first]):g}: every beta must lie in (0, 1).")
        self.name = name
        self.betas = betas
        self.alphas = 1 - betas
        self.alphas_cumprod = self.alphas.cumprod(0)

    @property
    def T(self) -> int:
        """Number of steps."""
        return len(self.betas)

    def __repr__(self) -> str:
        return f"NoiseSchedule.{self.name}(T={self.T})"

    # ---- the schedules ------------------------------------------------------------------

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """betas evenly spaced from ``beta_start`` to ``beta_end`` (Ho et al. 2020, section 4).

        The two ends belong to T = 1000; with fewer steps raise them in proportion, or much of
        the image is left at the end.
        """
        _check_T(T)
        return cls(torch.linspace(beta_start, beta_end, T, dtype=torch.float64), "linear")

    @classmethod
    def quadratic(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Square roots of betas evenly spaced ("scaled linear" in Stable Diffusion's code)."""
        _check_T(T)
        return cls(torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2, "quadratic")

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008) -> NoiseSchedule:
        """ᾱ follows a squared cosine; betas are capped at 0.999 (Nichol & Dhariwal 2021, eq. 17)."""
        _check_T(T)
        u = torch.linspace(0, 1, T + 1, dtype=torch.float64)
        return cls._from_curve(torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2, "cosine")

    @classmethod
    def sigmoid(cls, T: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> NoiseSchedule:
        """ᾱ follows a sigmoid from ``start`` to ``end`` (Jabri et al. 2022, algorithm 1)."""
        _check_T(T)
        u = torch.linspace(0, 1, T + 1, dtype=torch.float64)
        first, last = torch.sigmoid(torch.tensor([start / tau, end / tau], dtype=torch.float64))
        curve = (last - torch.sigmoid((u * (end - start) + start) / tau)) / (last - first)
        return cls._from_curve(curve, "sigmoid")

    @classmethod
    def named(cls, name: str, T: int) -> NoiseSchedule:
        """The schedule called ``name`` (linear, quadratic, cosine, sigmoid) with its default settings."""
        makers = {
            "linear": cls.linear,
            "quadratic": cls.quadratic,
            "cosine": cls.cosine,
            "sigmoid": cls.sigmoid,
        }
        if name not in makers:
            raise ValueError(f"schedule is {name!r}: choose one of {', '.join(makers)}.")
        return makers[name](T)

    def zero_terminal_snr(self) -> NoiseSchedule:
        """The same schedule, √ᾱ shifted and scaled so that no signal is left at T − 1.

        The first step stays as it is. Lin et al. 2024 (arXiv 2305.08891), algorithm 1. Such a schedule
        needs a network that predicts v or the image: at T − 1 the noise says nothing of the image.
        """
        root = self.alphas_cumprod.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        alphas = torch.cat([root[:1] ** 2, (root[1:] / root[:-1]) ** 2])
        return type(self)(1 - alphas, f"{self.name}, zero terminal SNR")

    @classmethod
    def _from_curve(cls, alphas_cumprod: Tensor, name: str) -> NoiseSchedule:
        """betas from ᾱ at T + 1 points, the first of them "no noise"."""
        return cls((1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(1e-8, 0.999), name)

    # ---- the forward process ------------------------------------------------------------

    def snr(self) -> Tensor:
        """Signal-to-noise ratio ᾱ_t / (1 − ᾱ_t) of every step, shape (T,), float64."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    def log_snr(self) -> Tensor:
        """λ_t = ½ log SNR of every step, shape (T,), float64 (Lu et al. 2022, arXiv 2211.01095)."""
        return 0.5 * self.snr().log()

    def _at(self, values: Tensor, t: Tensor | int, like: Tensor) -> Tensor:
        """``values[t]``, shaped to multiply a batch like ``like``."""
        t = torch.as_tensor(t)
        if t.is_floating_point():
            raise TypeError(f"t has dtype {t.dtype}: timesteps are integers 0 … {self.T - 1}.")
        if t.numel() and (int(t.min()) < 0 or int(t.max()) >= self.T):
            raise ValueError(
                f"t runs from {int(t.min())} to {int(t.max())}: this schedule has 0 … {self.T - 1}."
            )
        if t.ndim == 1 and len(t) != len(like):
            raise ValueError(f"t has {len(t)} entries for a batch of {len(like)}: give one per image.")
        picked = values[t.to(values.device)].to(like.dtype).to(like.device)  # MPS has no float64
        return picked.reshape(-1, *[1] * (like.ndim - 1)) if t.ndim else picked

    def _mix(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1 − ᾱ_t): the shares of image and noise in x_t."""
        return (
            self._at(self.alphas_cumprod.sqrt(), t, like),
            self._at((1 - self.alphas_cumprod).sqrt(), t, like),
        )

    def q_sample(self, x0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε in one jump (Ho et al. 2020, eq. 4).

        ``x0`` and ``noise``: (B, …); ``t``: an integer or (B,) integers in 0 … T−1. Raises
        ``ValueError`` for a timestep outside and ``TypeError`` for one that is no integer.
        """
        signal, sigma = self._mix(t, x0)
        return signal * x0 + sigma * noise

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """Mean (B, …) and variance of q(x_{t−1} | x_t, x_0) (Ho et al. 2020, eqs. 6 and 7).

        At t = 0 the step before is the image itself: the mean is x_0 and the variance 0.
        The variance broadcasts against the mean.
        """
        before = torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])
        of_x0 = before.sqrt() * self.betas / (1 - self.alphas_cumprod)
        of_xt = self.alphas.sqrt() * (1 - before) / (1 - self.alphas_cumprod)
        variance = self.betas * (1 - before) / (1 - self.alphas_cumprod)
        mean = self._at(of_x0, t, x0) * x0 + self._at(of_xt, t, x0) * x_t
        return mean, self._at(variance, t, x0)

    # ---- what the network predicts ------------------------------------------------------

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | int, prediction: str) -> Tensor:
        """What the network should output, (B, …): ε, x_0, or v = √ᾱ ε − √(1 − ᾱ) x_0.

        v is Salimans & Ho 2022, section 4. Raises ``ValueError`` for another ``prediction``.
        """
        check_prediction(prediction)
        if prediction == "epsilon":
            return noise
        if prediction == "sample":
            return x0
        signal, sigma = self._mix(t, x0)
        return signal * noise - sigma * x0

    def predict_x0(self, x_t: Tensor, t: Tensor | int, output: Tensor, prediction: str) -> Tensor:
        """The image that ``output`` implies, (B, …): the inverse of :meth:`target`.

        For ε it is Ho et al. 2020, eq. 15; for v Salimans & Ho 2022, section 4.
        """
        check_prediction(prediction)
        if prediction == "sample":
            return output
        signal, sigma = self._mix(t, x_t)
        if prediction == "epsilon":
            if (signal == 0).any():
                raise ValueError(
                    "no signal is left at this timestep, so the noise says nothing of the image: "
                    "use a network that predicts v or the image."
                )
            return (x_t - sigma * output) / signal
        return signal * x_t - sigma * output

    def predict_noise(self, x_t: Tensor, t: Tensor | int, output: Tensor, prediction: str) -> Tensor:
        """The noise ε that ``output`` implies, (B, …): the other inverse of :meth:`target`."""
        check_prediction(prediction)
        if prediction == "epsilon":
            return output
        signal, sigma = self._mix(t, x_t)
        if prediction == "sample":
            return (x_t - signal * output) / sigma
        return signal * output + sigma * x_t


def _check_T(T: int) -> None:
    if T < 1:
        raise ValueError(f"T is {T}: a schedule needs at least one step.")


LOSSES = ("l2", "l1", "huber")


def min_snr_weight(schedule: NoiseSchedule, t: Tensor, prediction: str, gamma: float) -> Tensor:
    """The weight of each image's loss, shape of ``t``, that trains as if its SNR were at most ``gamma``.

    Hang et al. 2023 (arXiv 2303.09556): min(SNR, γ) times the error of x₀. As a factor of the error
    that the network makes, that is min(SNR, γ)/SNR for ε, min(SNR, γ) for x₀ and min(SNR, γ)/(SNR + 1) for v.
    """
    snr = schedule.snr().to(t.device)[t].float()
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1)  # 1 where no signal is left
    return snr.clamp(max=gamma) / (snr + 1 if prediction == "v_prediction" else 1)


def diffusion_loss(
    model,
    schedule: NoiseSchedule,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    prediction: str = "epsilon",
    y: Tensor | None = None,
    *,
    loss: str = "l2",
    min_snr_gamma: float | None = None,
) -> Tensor:
    """Mean error of each image, (B,), between the model's output at x_t and its target.

    With ``prediction="epsilon"`` and ``loss="l2"`` this is L_simple of Ho et al. 2020, eq. 14; "l1"
    is the absolute error, "huber" half the square below 1 and linear above. ``min_snr_gamma``
    weights by :func:`min_snr_weight`. ``x0`` and ``noise``: (B, C, H, W); ``t``: (B,). Not averaged
    over the batch, so that a caller can sort it by timestep.
    """
    output = model(schedule.q_sample(x0, t, noise), t, y).float()
    target = schedule.target(x0, noise, t, prediction)
    error = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}[loss](output, target, reduction="none")
    each = error.flatten(1).mean(1)
    if min_snr_gamma is not None:
        each = each * min_snr_weight(schedule, t, prediction, min_snr_gamma)
    return each
