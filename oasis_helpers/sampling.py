"""Running the process backwards: single steps of several samplers, and one generator over them.

A sampler knows nothing but a *denoiser*, which gives the estimate x̂_0 of the image in x_t; whatever is
wanted besides (clipping, guidance) is a denoiser around it.

Sources: DDPM, Ho et al. 2020 (arXiv 2006.11239), algorithm 2; DDIM, Song et al. 2021
(arXiv 2010.02502), eqs. 12 and 16; DPM-Solver++, Lu et al. 2022 (arXiv 2211.01095), algorithm 2;
Heun's method on the EDM variables, Karras et al. 2022 (arXiv 2206.00364), algorithm 1; spacings of
timesteps, Lin et al. 2024 (arXiv 2305.08891), table 2; dynamic thresholding, Saharia et al. 2022
(arXiv 2205.11487), section 2.3; guidance, Ho & Salimans 2022 (arXiv 2207.12598), rescaled, Lin et al. 2024,
in an interval, Kynkäänniemi et al. 2024 (arXiv 2404.07724), by a weaker network, Karras et al. 2024
(arXiv 2406.02507); starting from a noised image, SDEdit, Meng et al. 2022 (arXiv 2108.01073); inpainting,
RePaint, Lugmayr et al. 2022 (arXiv 2201.09865).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .diffusion import Denoiser, Process
from .seeds import generator

__all__ = [
    "METHODS", "SPACINGS", "VARIANCES", "Denoiser", "IdealDenoiser", "SampleState", "autoguided", "clipped",
    "ddim_invert", "ddim_step", "ddpm_step", "dpm_solver_step", "guided", "heun_step", "inpaint",
    "karras_timesteps", "limited", "sample", "sample_images", "slerp", "spaced_timesteps",
]  # fmt: skip

METHODS = ("ddpm", "ddim", "dpm_solver", "heun")
SPACINGS = ("trailing", "leading", "linspace", "karras")
VARIANCES = ("small", "large")

Conditions = dict[str, Tensor]


# ---- denoisers around denoisers ---------------------------------------------------------------


class _Around:
    """A denoiser with the schedule, shape and device of another, and an estimate of its own."""

    def __init__(self, denoise, estimate: Callable[..., Tensor]):
        self.schedule, self.shape, self.device = denoise.schedule, denoise.shape, denoise.device
        self._estimate = estimate

    def __call__(self, x_t: Tensor, t: Tensor | int, y: Conditions | None = None) -> Tensor:
        return self._estimate(x_t, t, y)


def clipped(denoise, quantile: float | None = None):
    """The denoiser with its estimates held in the range of images, [−1, 1].

    Without ``quantile`` they are cut at ±1. With one, say 0.995, each image is cut at that quantile of its
    absolute values if it is above 1, and scaled back (Saharia et al. 2022, section 2.3). Not for latents,
    which have no such range. Raises ``ValueError`` for a quantile outside (0, 1).
    """
    if quantile is not None and not 0 < quantile < 1:
        raise ValueError(f"quantile is {quantile}: give a number between 0 and 1, or None to cut at ±1.")

    def estimate(x_t: Tensor, t: Tensor | int, y: Conditions | None) -> Tensor:
        x0 = denoise(x_t, t, y)
        if quantile is None:
            return x0.clamp(-1, 1)
        rank = max(1, math.ceil(quantile * x0[0].numel()))
        limits = x0.abs().flatten(1).kthvalue(rank, dim=1).values.clamp(min=1)
        limit = limits.reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-limit, limit) / limit

    return _Around(denoise, estimate)


def guided(denoise, scale: float, rescale: float = 0.0):
    """The denoiser with classifier-free guidance: x̂_u + s (x̂_c − x̂_u), with and without the conditions.

    ``scale`` s: 0 is without conditions, 1 is with them and no guidance, more exaggerates what they change.
    In the noise it is the same rule, ε_u + s (ε_c − ε_u), since ε is linear in x̂_0 (Ho & Salimans 2022,
    eq. 6, where s is 1 + w). ``rescale`` φ is the share, 0 to 1, to which the deviation of each guided
    estimate over its pixels is brought back to that of x̂_c, which guidance exaggerates too (Lin et al. 2024,
    section 3.4, there of the network's output). Raises ``ValueError`` for another ``rescale``, and when
    called without conditions, unless s is 0.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale is {rescale}: give a share from 0 to 1.")

    def estimate(x_t: Tensor, t: Tensor | int, y: Conditions | None) -> Tensor:
        if scale == 0:
            return denoise(x_t, t, None)
        if not y:
            raise ValueError("guidance needs conditions y: there is nothing to guide towards.")
        with_y = denoise(x_t, t, y)
        if scale == 1:
            return with_y
        without = denoise(x_t, t, None)
        x0 = without + scale * (with_y - without)
        if rescale:
            wanted, found = (images.flatten(1).std(1) for images in (with_y, x0))
            factor = 1 + rescale * (wanted / found - 1)
            x0 = x0 * factor.reshape(-1, *[1] * (x0.ndim - 1))
        return x0

    return _Around(denoise, estimate)


def autoguided(denoise, weak, scale: float):
    """The denoiser guided away from a weaker one: x̂_weak + s (x̂ − x̂_weak), both with the same conditions.

    ``weak``: the same kind of network, smaller or trained for less long, whose faults are those of
    ``denoise`` and larger; ``scale`` s as in :func:`guided`, 1 is ``denoise`` alone. What it exaggerates is
    what more training changes, so it needs no condition. Karras et al. 2024, with s for w. Raises
    ``ValueError`` for two denoisers of different shape or schedule.
    """
    (s, n), (s_weak, n_weak) = ((d.schedule.signal, d.schedule.noise) for d in (denoise, weak))
    same = weak.shape == denoise.shape and torch.equal(s, s_weak) and torch.equal(n, n_weak)
    if not same:
        raise ValueError(
            f"the weak denoiser makes {weak.shape} by {weak.schedule}, the other {denoise.shape} by "
            f"{denoise.schedule}: give two of one kind."
        )

    def estimate(x_t: Tensor, t: Tensor | int, y: Conditions | None) -> Tensor:
        strong = denoise(x_t, t, y)
        if scale == 1:
            return strong
        weaker = weak(x_t, t, y)
        return weaker + scale * (strong - weaker)

    return _Around(denoise, estimate)


def limited(inside, outside, low: int, high: int):
    """``inside`` for the timesteps ``low`` to ``high``, both included, and ``outside`` for all others.

    ``limited(guided(denoise, 4), denoise, 200, 700)`` guides where what the picture shows is decided, neither
    in almost pure noise, where it would throw away what could still come, nor at the end, where it changes
    little (Kynkäänniemi et al. 2024). Raises ``ValueError`` for timesteps out of order or range.
    """
    if not 0 <= low <= high < inside.schedule.T:
        raise ValueError(f"from {low} to {high} is no interval of timesteps 0 … {inside.schedule.T - 1}.")

    def estimate(x_t: Tensor, t: Tensor | int, y: Conditions | None) -> Tensor:
        within = (torch.as_tensor(t) >= low) & (torch.as_tensor(t) <= high)
        if within.all() or not within.any():
            return (inside if within.any() else outside)(x_t, t, y)
        rows = within.reshape(-1, *[1] * (x_t.ndim - 1)).to(x_t.device)
        return torch.where(rows, inside(x_t, t, y), outside(x_t, t, y))

    return _Around(inside, estimate)


# ---- single steps -----------------------------------------------------------------------------


def ddpm_step(
    schedule: Process,
    x0: Tensor,
    t: int,
    x_t: Tensor,
    *,
    variance: str = "small",
    noise: Tensor | None = None,
) -> Tensor:
    """x_{t−1} (B, …) from x_t and the estimate ``x0``: one step of ancestral sampling.

    The posterior q(x_{t−1} | x_t, x̂_0) with the estimate in place of the image (Ho et al. 2020, eqs. 6, 7
    and 15). ``noise`` is standard normal of x_t's shape; with None the result is the mean. The variance
    is the "small" one, β̃_t, or the "large" one, β_t; at t = 0 it is 0. Raises ``ValueError`` for a timestep
    outside 0 … T−1.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance is {variance!r}: choose one of {', '.join(map(repr, VARIANCES))}.")
    mean, added = schedule.q_posterior(x0, x_t, t)
    deviation = added.sqrt()
    if variance == "large" and t > 0:
        deviation = math.sqrt(schedule.transition(t, t - 1)[1])
    return mean if noise is None else mean + deviation * noise


def ddim_step(
    schedule: Process,
    x0: Tensor,
    t: int,
    t_prev: int,
    x_t: Tensor,
    *,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """x at ``t_prev`` (B, …) from x_t and the estimate ``x0``: Song et al. 2021, eqs. 12 and 16.

    ``t_prev`` is any timestep below ``t``, or −1 for "no noise left". ``eta`` in [0, 1]: 0 is deterministic,
    1 has the variance of ancestral sampling. ``noise`` as in :func:`ddpm_step`; with None the
    result is the mean. Raises ``ValueError`` for timesteps out of order or range.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: give a number from 0 (deterministic) to 1 (ancestral).")
    added = schedule.transition(t, t_prev)[1]
    (s, n), (s_prev, n_prev) = schedule.levels(t), schedule.levels(t_prev)
    epsilon = (x_t - s * x0) / n
    sigma = eta * n_prev / n * math.sqrt(added)
    mean = s_prev * x0 + math.sqrt(max(n_prev**2 - sigma**2, 0.0)) * epsilon
    return mean if noise is None else mean + sigma * noise


def dpm_solver_step(
    schedule: Process,
    x0: Tensor,
    t: int,
    t_prev: int,
    x_t: Tensor,
    *,
    previous: tuple[int, Tensor] | None = None,
) -> Tensor:
    """x at ``t_prev`` (B, …) by DPM-Solver++ (2M): Lu et al. 2022, algorithm 2.

    ``previous`` is the timestep before ``t`` on the way down, and the estimate x̂_0 made there: the
    straight line through both estimates makes the step second order. Without it, and for
    ``t_prev`` = −1, the step is first order: :func:`ddim_step` with ``eta`` 0.
    Raises ``ValueError`` for timesteps out of order or range.
    """
    if t_prev < 0 or previous is None:
        return ddim_step(schedule, x0, t, t_prev, x_t)
    earlier, x0_earlier = previous
    if not t < earlier < schedule.T:
        raise ValueError(f"the step before was at {earlier}, this one is at {t}: times run backwards.")
    (_, n), (s_prev, n_prev) = schedule.levels(t), schedule.levels(t_prev)
    lam = schedule.half_log_snr()
    h = float(lam[t_prev] - lam[t])
    r = float(lam[t] - lam[earlier]) / h  # infinite where no signal is left at the step before
    direction = x0 + (x0 - x0_earlier) / (2 * r)
    return n_prev / n * x_t - s_prev * math.expm1(-h) * direction


def heun_step(schedule: Process, x0: Tensor, t: int, t_prev: int, x_t: Tensor, x0_prev: Tensor) -> Tensor:
    """x at ``t_prev`` (B, …) from the mean of two slopes: Karras et al. 2022, algorithm 1.

    ``x0_prev`` is the estimate at the first guess, that of :func:`ddim_step` with ``eta`` 0 (Euler's
    method in the variables x/s and n/s of the process). Raises ``ValueError`` for timesteps out of order or
    range, for ``t_prev`` = −1, and where no signal is left at ``t``.
    """
    if t_prev < 0:
        raise ValueError("t_prev is -1: the last step has no second slope; use ddim_step.")
    guess = ddim_step(schedule, x0, t, t_prev, x_t)
    (s, n), (s_prev, n_prev) = schedule.levels(t), schedule.levels(t_prev)
    if s == 0:
        raise ValueError(f"no signal is left at t = {t}, so x/s is infinite there; use ddim_step.")
    slope = ((x_t - s * x0) / n + (guess - s_prev * x0_prev) / n_prev) / 2
    return s_prev / s * x_t + s_prev * (n_prev / s_prev - n / s) * slope


# ---- which timesteps --------------------------------------------------------------------------


def spaced_timesteps(T: int, steps: int, spacing: str = "trailing") -> list[int]:
    """``steps`` timesteps of 0 … T−1 downward, evenly spaced (Lin et al. 2024, table 2).

    "trailing" begins at T − 1, as training ended; "leading" ends at 0 and begins below T − 1;
    "linspace" has both ends. Raises ``ValueError`` for ``steps`` outside 1 … T.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"steps is {steps}: give 1 to T = {T}.")
    if spacing == "trailing":
        return [round(T - i * T / steps) - 1 for i in range(steps)]
    if spacing == "leading":
        return [i * (T // steps) for i in reversed(range(steps))]
    if spacing == "linspace":
        return [round(i * (T - 1) / max(steps - 1, 1)) for i in reversed(range(steps))]
    raise ValueError(f"spacing is {spacing!r}: choose one of {', '.join(map(repr, SPACINGS))}.")


def karras_timesteps(
    schedule: Process,
    steps: int,
    *,
    rho: float = 7.0,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> list[int]:
    """At most ``steps`` timesteps downward whose noise n/s is spaced as in Karras et al. 2022, eq. 5.

    Each is the nearest of the schedule; what would come twice is left out. Where almost no signal is left,
    noise above ``sigma_max`` is skipped: Heun's long first steps would go far astray there.
    """
    if not 1 <= steps <= schedule.T:
        raise ValueError(f"steps is {steps}: give 1 to T = {schedule.T}.")
    noise = schedule.noise / schedule.signal
    high, low = min(float(noise[-1]), sigma_max) ** (1 / rho), max(float(noise[0]), sigma_min) ** (1 / rho)
    wanted = torch.linspace(high, low, steps, dtype=noise.dtype) ** rho
    nearest = (noise[None, :] - wanted[:, None]).abs().argmin(1).tolist()
    return sorted(set(nearest), reverse=True)


def _timesteps(schedule: Process, method: str, steps: int | None, spacing: str) -> list[int]:
    """The timesteps that ``method`` visits, downward."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: choose one of {', '.join(map(repr, METHODS))}.")
    if method == "ddpm" and steps not in (None, schedule.T):
        raise ValueError(f"ddpm takes all {schedule.T} steps, not {steps}: use method='ddim' for fewer.")
    if method == "ddpm" and spacing == "karras":
        raise ValueError(
            "ddpm goes from t to t − 1 and karras leaves timesteps out: use method='ddim', eta=1."
        )
    count = schedule.T if method == "ddpm" else min(50, schedule.T) if steps is None else steps
    if spacing == "karras":
        return karras_timesteps(schedule, count)
    return spaced_timesteps(schedule.T, count, spacing)


# ---- the generator over them ------------------------------------------------------------------


@dataclass(frozen=True)
class SampleState:
    """One step of :func:`sample`: at timestep ``t`` the estimate was ``x0``; ``x`` came of it.

    ``x`` and ``x0``: (B, C, H, W); ``x`` is the image after the step, at ``t_prev`` (−1: done).
    ``evaluations`` counts the calls of the denoiser so far.
    """

    t: int
    t_prev: int
    x: Tensor
    x0: Tensor
    evaluations: int = 0


@torch.no_grad()
def sample(
    denoise,
    count: int,
    *,
    method: str = "ddpm",
    steps: int | None = None,
    spacing: str = "trailing",
    seed: int = 0,
    y: Conditions | None = None,
    start: tuple[Tensor, int] | None = None,
    eta: float = 0.0,
) -> Iterator[SampleState]:
    """Generate ``count`` images of the denoiser's shape, yielding a :class:`SampleState` per step.

    ``method`` "ddpm" visits every timestep; the others visit ``steps`` of them (default 50), chosen by
    ``spacing`` as in :func:`spaced_timesteps` or "karras" as in :func:`karras_timesteps`: "ddim" with ``eta``
    as in :func:`ddim_step`; "dpm_solver", second order, one call of the denoiser a step; "heun", second
    order, two calls a step but one in the last. ``y`` goes to the denoiser, (count, …) by name.
    ``start=(x_t, t)`` begins at noised images instead of pure noise. The noise is drawn on the CPU from
    ``seed``, so every device starts alike. Raises ``ValueError`` for an unknown method, ``steps`` that do
    not fit, or a ``start`` of another shape.
    """
    schedule = denoise.schedule
    timesteps = _timesteps(schedule, method, steps, spacing)
    if count < 1:
        raise ValueError(f"count is {count}: ask for at least one image.")
    shape, drawn = (count, *denoise.shape), generator(seed)

    if start is None:
        x = torch.randn(shape, generator=drawn).to(denoise.device)
    else:
        x, first = start
        if tuple(x.shape) != shape:
            raise ValueError(f"start holds images of shape {tuple(x.shape)}, asked for {shape}.")
        if not 0 <= first < schedule.T:
            raise ValueError(f"start is at t = {first}: this schedule has 0 … {schedule.T - 1}.")
        x = x.to(denoise.device)
        timesteps = [first] + [t for t in timesteps if t < first]

    evaluations, previous = 0, None
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1]):
        x0 = denoise(x, t, y)
        evaluations += 1
        needs_noise = t_prev >= 0 and (method == "ddpm" or (method == "ddim" and eta > 0))
        noise = torch.randn(shape, generator=drawn).to(x.device) if needs_noise else None
        if method == "ddpm":
            x = ddpm_step(schedule, x0, t, x, noise=noise)
        elif method == "dpm_solver":
            x = dpm_solver_step(schedule, x0, t, t_prev, x, previous=previous)
            previous = t, x0
        elif method == "heun" and t_prev >= 0 and schedule.levels(t)[0] > 0:
            x0_prev = denoise(ddim_step(schedule, x0, t, t_prev, x), t_prev, y)
            evaluations += 1
            x = heun_step(schedule, x0, t, t_prev, x, x0_prev)
        else:
            x = ddim_step(schedule, x0, t, t_prev, x, eta=eta, noise=noise)
        yield SampleState(t, t_prev, x, x0, evaluations)


def sample_images(denoise, count: int, **settings) -> Tensor:
    """The images at the end of :func:`sample`, with the same arguments."""
    for state in sample(denoise, count, **settings):  # noqa: B007
        pass
    return state.x


# ---- with a given image ---------------------------------------------------------------------


@torch.no_grad()
def inpaint(
    denoise,
    image: Tensor,
    hole: Tensor,
    *,
    steps: int = 50,
    resamples: int = 5,
    seed: int = 0,
    y: Conditions | None = None,
) -> Iterator[SampleState]:
    """Fill the ``hole`` of an image with what the model expects there, a :class:`SampleState` per step.

    ``image``: (B, C, H, W); ``hole``: bool, broadcasts against it, True where something is to be made.
    Outside the hole each step puts the given image back, noised to its timestep; then the step is
    undone with fresh noise and made again, ``resamples`` times in all, so that inside and outside come
    to agree. Lugmayr et al. 2022, algorithm 1, with random steps over ``steps`` timesteps. Raises
    ``ValueError`` for a hole of another shape or type, and for ``resamples`` below 1.
    """
    if hole.dtype != torch.bool:
        raise ValueError(f"hole is {hole.dtype}: give booleans, True where something is to be made.")
    try:
        fits = torch.broadcast_shapes(hole.shape, image.shape) == image.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"hole has shape {tuple(hole.shape)}, the images {tuple(image.shape)}.")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}: give at least 1.")
    schedule, drawn = denoise.schedule, generator(seed)
    image, hole = image.to(denoise.device), hole.to(denoise.device)

    def fresh() -> Tensor:
        return torch.randn(image.shape, generator=drawn, dtype=image.dtype).to(image.device)

    timesteps, x, evaluations = spaced_timesteps(schedule.T, steps), fresh(), 0
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1]):
        for repeat in range(resamples):
            x0 = denoise(x, t, y)
            evaluations += 1
            x = ddim_step(schedule, x0, t, t_prev, x, eta=1.0, noise=fresh())
            known = image if t_prev < 0 else schedule.q_sample(image, t_prev, fresh())
            x = torch.where(hole, x, known)
            if t_prev < 0:
                break  # nothing is random any more
            if repeat + 1 < resamples:
                factor, added = schedule.transition(t, t_prev)
                x = factor * x + math.sqrt(added) * fresh()
        yield SampleState(t, t_prev, x, x0, evaluations)


@torch.no_grad()
def ddim_invert(
    denoise, image: Tensor, *, steps: int = 50, y: Conditions | None = None
) -> Iterator[SampleState]:
    """Run DDIM upward: from an image (B, C, H, W) to the noise that it would come from.

    The last state's ``x``, at T − 1, given to :func:`sample` as ``start`` with ``method="ddim"``, leads back
    to about the image; the difference falls with ``steps``. In each state ``t_prev`` is where the step
    began (−1: the image) and ``t`` where it ended. Song et al. 2021, section 4.3. The denoiser is asked
    at the start of each step, and for the first, which has no timestep, at that of its end.
    """
    schedule, x = denoise.schedule, image.to(denoise.device)
    timesteps = spaced_timesteps(schedule.T, steps)[::-1]
    for evaluations, (t_prev, t) in enumerate(zip([-1, *timesteps[:-1]], timesteps), 1):
        asked = max(t_prev, timesteps[0])
        estimate = denoise(x, asked, y)
        epsilon = schedule.predict_noise(x, asked, estimate, "sample")
        x0 = x if t_prev < 0 else estimate
        x = schedule.q_sample(x0, t, epsilon)
        yield SampleState(t, t_prev, x, x0, evaluations)


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Between two noises (B, …) along the sphere they lie on: ``weight`` 0 gives ``a``, 1 gives ``b``.

    A straight line would pass through points that are too short to be noise. Shoemake 1985
    (SIGGRAPH, "Animating rotation with quaternion curves").
    """
    first, second = a.flatten(1), b.flatten(1)
    cosine = (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))
    angle = cosine.clamp(-1, 1).acos().clamp(min=1e-6).reshape(-1, *[1] * (a.ndim - 1))
    return (((1 - weight) * angle).sin() * a + (weight * angle).sin() * b) / angle.sin()


class IdealDenoiser:
    """The best answer there is for a finite data set, in closed form: the mean of x_0 given x_t.

    A denoiser, ``(x_t, t, y=None)`` → the images of ``data``, (N, C, H, W), weighted by how likely each is to
    have led to x_t. A network that fits a finite set perfectly is this, and what it samples are copies of
    the set. Karras et al. 2022 (arXiv 2206.00364), appendix B.3.
    """

    def __init__(self, schedule: Process, data: Tensor):
        self.schedule, self.data = schedule, data
        self.shape, self.device = tuple(data.shape[1:]), data.device

    def weights(self, x: Tensor, t: Tensor | int) -> Tensor:
        """How likely each image is to have led to each x_t: (B, C, H, W) → (B, N) float64, rows sum to 1."""
        t = torch.as_tensor(t).cpu()
        s, n = (values[t].reshape(-1, 1) for values in (self.schedule.signal, self.schedule.noise))
        # On the CPU before float64, which MPS lacks.
        data, x = (images.flatten(1).cpu().double() for images in (self.data, x))
        # −‖x − s x_i‖² / 2n², without the part that is the same for every i
        return ((s * (x @ data.T) - s**2 * data.square().sum(1) / 2) / n**2).softmax(1)

    def __call__(self, x: Tensor, t: Tensor | int, y: Conditions | None = None) -> Tensor:
        mean = self.weights(x, t).to(self.data.dtype).to(self.data.device) @ self.data.flatten(1)
        return mean.reshape(x.shape).to(x.dtype).to(x.device)
