"""The forward process: noise schedules, q(x_t | x_0), its posterior, and what a network predicts.

Every process here is x_t = s_t x_0 + n_t ε, and whatever a network puts out is a ε + b x_0: two small
tables, from which all conversions follow. Timesteps are integers 0 … T−1; t = 0 already holds one step
of noise. "No noise" has no index; where a step ends there it is written −1.

Sources: DDPM, Ho et al. 2020 (arXiv 2006.11239); cosine schedule, Nichol & Dhariwal 2021
(arXiv 2102.09672); v-prediction, Salimans & Ho 2022 (arXiv 2202.00512); sigmoid schedule,
Jabri et al. 2022 (arXiv 2212.11972); shifted schedules, Hoogeboom et al. 2023 (arXiv 2301.11093); the
process in s and n, Kingma et al. 2021 (arXiv 2107.00630).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What a network can put out: the shares (a, b) of noise and image in it, given those of the process,
# s (image) and n (noise). A row is all that a new prediction needs.
PREDICTIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "epsilon": lambda s, n: (torch.ones_like(s), torch.zeros_like(n)),
    "sample": lambda s, n: (torch.zeros_like(s), torch.ones_like(n)),
    "v_prediction": lambda s, n: (s, -n),
}


def check_prediction(prediction: str) -> None:
    """Raise ``ValueError`` unless ``prediction`` names what a network can output."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction is {prediction!r}: choose one of {', '.join(map(repr, PREDICTIONS))}.")


class Process:
    """x_t = s_t x_0 + n_t ε for T timesteps, and every closed form that follows from it.

    ``signal`` and ``noise``: s and n of every timestep, (T,), ratio s/n falling. Kept in float64 (small
    differences of numbers near 1 lose digits in float32); results have the dtype and device of the images
    given. Images are floats (B, …); ``t`` is an integer or (B,) integers in 0 … T−1. All methods raise
    ``TypeError`` for images or timesteps of another kind and ``ValueError`` for timesteps outside.
    """

    def __init__(self, signal: Tensor, noise: Tensor, name: str = "custom"):
        self.signal, self.noise = (torch.as_tensor(v, dtype=torch.float64) for v in (signal, noise))
        self.name = name

    @property
    def T(self) -> int:
        """Number of steps."""
        return len(self.signal)

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}(T={self.T})"

    def snr(self) -> Tensor:
        """Signal-to-noise ratio s²/n² of every step, shape (T,), float64."""
        return (self.signal / self.noise) ** 2

    def half_log_snr(self) -> Tensor:
        """λ_t = log(s/n) of every step, shape (T,), float64 (Lu et al. 2022, arXiv 2211.01095)."""
        return (self.signal / self.noise).log()

    def levels(self, t: int) -> tuple[float, float]:
        """s and n at one timestep; −1 is the image without noise, (1, 0)."""
        if not -1 <= t < self.T:
            raise ValueError(f"t is {t}: this schedule has 0 … {self.T - 1}, and −1 for no noise.")
        return (float(self.signal[t]), float(self.noise[t])) if t >= 0 else (1.0, 0.0)

    def transition(self, t: int, t_prev: int) -> tuple[float, float]:
        """Factor f and variance of the noising from ``t_prev`` to ``t``: q(x_t | x) = N(f x, variance)."""
        if not -1 <= t_prev < t:
            raise ValueError(f"t_prev is {t_prev} and t is {t}: give −1 ≤ t_prev < t.")
        (s, n), (s_prev, n_prev) = self.levels(t), self.levels(t_prev)
        return s / s_prev, n**2 - (s / s_prev * n_prev) ** 2

    def _pick(self, values: Tensor, t: Tensor | int, dtype: torch.dtype) -> Tensor:
        """``values[t]`` where t is; a single one stays on the CPU, from where it multiplies on any device."""
        t = torch.as_tensor(t)
        if t.is_floating_point():
            raise TypeError(f"t has dtype {t.dtype}: timesteps are integers 0 … {self.T - 1}.")
        # On a GPU a look at t would wait for all that runs there; it refuses an index outside by itself.
        if t.device.type == "cpu" and t.numel() and (int(t.min()) < 0 or int(t.max()) >= self.T):
            raise ValueError(
                f"t runs from {int(t.min())} to {int(t.max())}: this schedule has 0 … {self.T - 1}."
            )
        return values.to(dtype).to(t.device, non_blocking=t.is_cuda)[t]  # the type first: MPS has no float64

    def _at(self, values: Tensor, t: Tensor | int, like: Tensor) -> Tensor:
        """``values[t]``, shaped to multiply a batch like ``like``."""
        if not like.is_floating_point():
            raise TypeError(f"images are {like.dtype}: give floats (to_unit_range makes them of bytes).")
        picked = self._pick(values, t, like.dtype)
        if picked.ndim == 0:
            return picked
        if len(picked) != len(like):
            raise ValueError(f"t has {len(picked)} entries for a batch of {len(like)}: give one per image.")
        return picked.to(like.device, non_blocking=like.is_cuda).reshape(-1, *[1] * (like.ndim - 1))

    def q_sample(self, x0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """x_t = s_t x_0 + n_t ε in one jump (Ho et al. 2020, eq. 4, where s = √ᾱ and n = √(1 − ᾱ))."""
        return self._at(self.signal, t, x0) * x0 + self._at(self.noise, t, x0) * noise

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """Mean (B, …) and variance of q(x_{t−1} | x_t, x_0) (Ho et al. 2020, eqs. 6 and 7).

        At t = 0 the step before is the image itself: the mean is x_0 and the variance 0.
        The variance broadcasts against the mean.
        """
        s_prev = torch.cat([self.signal.new_ones(1), self.signal[:-1]])
        n_prev = torch.cat([self.noise.new_zeros(1), self.noise[:-1]])
        factor = self.signal / s_prev
        added = self.noise**2 - (factor * n_prev) ** 2  # variance of one step of noising: β
        of_x0, of_xt = s_prev * added / self.noise**2, factor * (n_prev / self.noise) ** 2
        mean = self._at(of_x0, t, x0) * x0 + self._at(of_xt, t, x0) * x_t
        return mean, self._at(added * (n_prev / self.noise) ** 2, t, x0)

    # ---- what the network predicts ------------------------------------------------------

    def _shares(self, prediction: str) -> tuple[Tensor, Tensor, Tensor]:
        """a, b and s·a − n·b of every timestep: what inverting x_t = s x₀ + n ε, out = a ε + b x₀ needs."""
        check_prediction(prediction)
        a, b = PREDICTIONS[prediction](self.signal, self.noise)
        return a, b, self.signal * a - self.noise * b

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | int, prediction: str) -> Tensor:
        """What the network should output, a ε + b x_0, (B, …): ε, x_0, or v = √ᾱ ε − √(1 − ᾱ) x_0.

        v is Salimans & Ho 2022, section 4. Raises ``ValueError`` for another ``prediction``.
        """
        a, b, _ = self._shares(prediction)
        return self._at(a, t, x0) * noise + self._at(b, t, x0) * x0

    def predict_x0(self, x_t: Tensor, t: Tensor | int, output: Tensor, prediction: str) -> Tensor:
        """The image that ``output`` implies, (a x_t − n out)/(s a − n b): the inverse of :meth:`target`.

        For ε it is Ho et al. 2020, eq. 15; for v Salimans & Ho 2022, section 4. Raises ``ValueError`` where
        the output says nothing of the image.
        """
        a, _, both = self._shares(prediction)
        of_xt = self._at(a / both, t, x_t)
        if of_xt.device.type == "cpu" and not of_xt.isfinite().all():
            raise ValueError(
                "no signal is left at this timestep, so the noise says nothing of the image: "
                "use a network that predicts v or the image."
            )
        return of_xt * x_t - self._at(self.noise / both, t, x_t) * output

    def predict_noise(self, x_t: Tensor, t: Tensor | int, output: Tensor, prediction: str) -> Tensor:
        """The noise that ``output`` implies, (s out − b x_t)/(s a − n b), (B, …): the other inverse."""
        _, b, both = self._shares(prediction)
        # Where no signal is left and the output is the noise, 0/0 stands for 1.
        of_output = (self.signal / both).nan_to_num(1.0)
        return self._at(of_output, t, x_t) * output - self._at((b / both).nan_to_num(0.0), t, x_t) * x_t

    def min_snr_weight(self, t: Tensor, prediction: str, gamma: float, offset: float = 0.0) -> Tensor:
        """The weight of each image's loss, shape of ``t``, that trains as if its SNR were at most ``gamma``.

        min(SNR + ``offset``, γ) times the squared error of x₀ (Hang et al. 2023, arXiv 2303.09556; ``offset``
        1 is "SNR + 1" of Salimans & Ho 2022, section 4). As a factor of the error that the network makes,
        that is min(SNR + offset, γ) (n/(s a − n b))². For v without offset it is min(SNR, γ)/(SNR + 1), which
        vanishes with the signal; with offset 1 it is min(1, γ/(SNR + 1)), which does not. Raises
        ``ValueError`` for an offset where ε is predicted and a timestep has no signal: it would be infinite.
        """
        _, _, both = self._shares(prediction)
        weight = (self.snr() + offset).clamp(max=gamma) * (self.noise / both) ** 2
        if weight.isinf().any():
            raise ValueError(
                "no signal is left at the last timestep, so with an offset the error of the noise has an "
                "infinite weight there: use a network that predicts v or the image, or offset 0."
            )
        # 0·∞ without offset: min(SNR, γ)/SNR, which is 1 where no signal is left
        return self._pick(weight.nan_to_num(1.0), t, torch.float32)


class NoiseSchedule(Process):
    """How much noise each of T steps adds: the variance-preserving process of DDPM, s² + n² = 1.

    ``betas``: T variances in (0, 1); the last may be 1 (then no signal is left at T − 1).
    ``alphas_cumprod[t]`` is the product of ``1 − betas[0..t]``, (T,), strictly decreasing in (0, 1), or to
    0. Raises ``ValueError`` for betas that are not one-dimensional or leave (0, 1).
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
        self.betas = betas
        self.alphas = 1 - betas
        self.alphas_cumprod = self.alphas.cumprod(0)
        super().__init__(self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt(), name)

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
        """The schedule called ``name`` with its default settings.

        linear, quadratic, cosine, sigmoid, or "shifted cosine": the cosine schedule for images of 128×128,
        :meth:`shifted` by 64/128. Raises ``ValueError`` for another name.
        """
        makers = {
            "linear": cls.linear,
            "quadratic": cls.quadratic,
            "cosine": cls.cosine,
            "sigmoid": cls.sigmoid,
            "shifted cosine": lambda T: cls.cosine(T).shifted(64 / 128),
        }
        if name not in makers:
            raise ValueError(f"schedule is {name!r}: choose one of {', '.join(makers)}.")
        return makers[name](T)

    def shifted(self, factor: float) -> NoiseSchedule:
        """The same schedule with every SNR times ``factor``²: log SNR moved by 2 log ``factor``.

        A larger picture shows more through the same noise, because neighbouring pixels say the same: for
        d×d pixels take 64/d, if the schedule is right for 64×64. Raises ``ValueError`` for a factor that is
        not positive. Hoogeboom et al. 2023 (arXiv 2301.11093), section 3.1.
        """
        if not factor > 0:
            raise ValueError(f"factor is {factor}: give a number above 0, such as 64/128 for 128×128 pixels.")
        # ᾱ' = f² ᾱ/d with d = f² ᾱ + 1 − ᾱ; the quotients of neighbours give β' = β/d without a difference
        betas = self.betas / (1 + (factor**2 - 1) * self.alphas_cumprod)
        return type(self)(betas, f"{self.name}, shifted by {factor:g}")

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


def _check_T(T: int) -> None:
    if T < 1:
        raise ValueError(f"T is {T}: a schedule needs at least one step.")


LOSSES = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}


def diffusion_loss(
    network: Callable[..., Tensor],
    process: Process,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    prediction: str,
    y: dict[str, Tensor] | None = None,
    *,
    loss: str = "l2",
    min_snr_gamma: float | None = None,
    snr_offset: float = 0.0,
) -> Tensor:
    """Mean error of each image, (B,), between ``network(x_t, t, y)`` and its target.

    With ``prediction="epsilon"`` and ``loss="l2"`` this is L_simple of Ho et al. 2020, eq. 14; "l1"
    is the absolute error, "huber" half the square below 1 and linear above. ``min_snr_gamma``
    weights by :meth:`Process.min_snr_weight` with the offset ``snr_offset``. ``x0`` and ``noise``:
    (B, C, H, W); ``t``: (B,). Not averaged over the batch, so that a caller can sort it by timestep.
    """
    output = network(process.q_sample(x0, t, noise), t, y).float()
    target = process.target(x0, noise, t, prediction)
    each = LOSSES[loss](output, target, reduction="none").flatten(1).mean(1)
    if min_snr_gamma is not None:
        each = each * process.min_snr_weight(t, prediction, min_snr_gamma, snr_offset).to(each.device)
    return each


class Denoiser(nn.Module):
    """A network as what all samplers want of it: the estimate of the image in a noisy one.

    ``denoise(x_t, t, y=None)``: (B, …), an integer or (B,) timesteps, and conditions by name → the estimate
    of x_0, (B, …): the mean of all images that may have led to x_t, as far as the network knows.
    ``network(x, t, y)`` puts out what ``prediction`` says of the process ``schedule``; ``shape`` is that of
    one image, (C, H, W). Whatever is called in this way and has ``schedule``, ``shape`` and ``device`` is a
    denoiser as well. After Karras et al. 2022 (arXiv 2206.00364), section 5.
    """

    def __init__(
        self, network: Callable[..., Tensor], schedule: Process, prediction: str, shape: tuple[int, ...]
    ):
        super().__init__()
        check_prediction(prediction)
        self.network, self.schedule, self.prediction, self.shape = network, schedule, prediction, tuple(shape)

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def forward(self, x_t: Tensor, t: Tensor | int, y: dict[str, Tensor] | None = None) -> Tensor:
        times = t.to(x_t.device) if isinstance(t, Tensor) else torch.full((len(x_t),), t, device=x_t.device)
        return self.schedule.predict_x0(x_t, t, self.network(x_t, times, y), self.prediction)
