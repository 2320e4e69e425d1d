"""Running the process backwards: single steps of several samplers, and one generator over them.

Sources: DDPM, Ho et al. 2020 (arXiv 2006.11239), algorithm 2; DDIM, Song et al. 2021
(arXiv 2010.02502), eqs. 12 and 16; DPM-Solver++, Lu et al. 2022 (arXiv 2211.01095), algorithm 2;
Heun's method on the EDM variables, Karras et al. 2022 (arXiv 2206.00364), algorithm 1; spacings of
timesteps, Lin et al. 2024 (arXiv 2305.08891), table 2; dynamic thresholding, Saharia et al. 2022
(arXiv 2205.11487), section 2.3; starting from a noised image, SDEdit, Meng et al. 2022
(arXiv 2108.01073); inpainting, RePaint, Lugmayr et al. 2022 (arXiv 2201.09865).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .diffusion import NoiseSchedule, check_prediction

METHODS = ("ddpm", "ddim", "dpm_solver", "heun")
SPACINGS = ("trailing", "leading", "linspace", "karras")
VARIANCES = ("small", "large")


def ddpm_step(
    schedule: NoiseSchedule,
    output: Tensor,
    t: int,
    x_t: Tensor,
    *,
    prediction: str = "epsilon",
    clip: bool | float = True,
    variance: str = "small",
    noise: Tensor | None = None,
) -> Tensor:
    """x_{t−1} (B, …) from x_t and the network's ``output``: one step of ancestral sampling.

    The posterior q(x_{t−1} | x_t, x̂_0) with the estimate x̂_0 in place of the image (Ho et al.
    2020, eqs. 6, 7 and 15). ``clip`` as in :func:`estimate_x0`. ``noise`` is standard normal of
    x_t's shape; with None the result is the mean. The variance is the "small" one, β̃_t, or
    the "large" one, β_t; at t = 0 it is 0. Raises ``ValueError`` for a timestep outside 0 … T−1.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance is {variance!r}: choose one of {', '.join(map(repr, VARIANCES))}.")
    x0 = estimate_x0(schedule, output, t, x_t, prediction=prediction, clip=clip)
    mean, added = schedule.q_posterior(x0, x_t, t)
    if variance == "large" and t > 0:
        added = schedule.betas[t].to(x_t.dtype).to(x_t.device)
    return mean if noise is None else mean + added.sqrt() * noise


def ddim_step(
    schedule: NoiseSchedule,
    output: Tensor,
    t: int,
    t_prev: int,
    x_t: Tensor,
    *,
    prediction: str = "epsilon",
    eta: float = 0.0,
    clip: bool | float = True,
    noise: Tensor | None = None,
) -> Tensor:
    """x at ``t_prev`` (B, …) from x_t, over any distance: Song et al. 2021, eqs. 12 and 16.

    ``t_prev`` is below ``t``, or −1 for "no noise left". ``eta`` in [0, 1]: 0 is deterministic,
    1 has the variance of ancestral sampling. ``noise`` as in :func:`ddpm_step`; with None the
    result is the mean. Raises ``ValueError`` for timesteps out of order or range.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: give a number from 0 (deterministic) to 1 (ancestral).")
    now, before = _two_levels(schedule, t, t_prev)
    x0 = estimate_x0(schedule, output, t, x_t, prediction=prediction, clip=clip)
    epsilon = schedule.predict_noise(x_t, t, output, prediction)
    sigma = eta * ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
    mean = float(before.sqrt()) * x0 + float((1 - before - sigma**2).clamp(min=0).sqrt()) * epsilon
    return mean if noise is None else mean + float(sigma) * noise


def dpm_solver_step(
    schedule: NoiseSchedule,
    output: Tensor,
    t: int,
    t_prev: int,
    x_t: Tensor,
    *,
    previous: tuple[int, Tensor] | None = None,
    prediction: str = "epsilon",
    clip: bool | float = True,
) -> Tensor:
    """x at ``t_prev`` (B, …) by DPM-Solver++ (2M): Lu et al. 2022, algorithm 2.

    ``previous`` is the timestep before ``t`` on the way down, and the estimate x̂_0 made there: the
    straight line through both estimates makes the step second order. Without it, and for
    ``t_prev`` = −1, the step is first order: :func:`ddim_step` with ``eta`` 0, if nothing is clipped.
    Raises ``ValueError`` for timesteps out of order or range.
    """
    now, before = _two_levels(schedule, t, t_prev)
    x0 = estimate_x0(schedule, output, t, x_t, prediction=prediction, clip=clip)
    if t_prev < 0:
        return x0
    log_snr = schedule.log_snr()
    h = log_snr[t_prev] - log_snr[t]  # infinite where no signal is left at t
    direction = x0
    if previous is not None:
        earlier, x0_earlier = previous
        if not t < earlier < schedule.T:
            raise ValueError(f"the step before was at {earlier}, this one is at {t}: times run backwards.")
        r = float((log_snr[t] - log_snr[earlier]) / h)
        direction = x0 + (x0 - x0_earlier) / (2 * r)
    kept = ((1 - before) / (1 - now)).sqrt()
    return float(kept) * x_t - float(before.sqrt() * torch.expm1(-h)) * direction


def heun_step(
    schedule: NoiseSchedule,
    output: Tensor,
    t: int,
    t_prev: int,
    x_t: Tensor,
    output_prev: Tensor,
    x_prev: Tensor,
    *,
    prediction: str = "epsilon",
    clip: bool | float = True,
) -> Tensor:
    """x at ``t_prev`` (B, …) from the mean of two slopes: Karras et al. 2022, algorithm 1.

    ``x_prev`` is the first guess, that of :func:`ddim_step` with ``eta`` 0 (Euler's method in the
    variables x/√ᾱ and √(1 − ᾱ)/√ᾱ), and ``output_prev`` the network's output there. Raises
    ``ValueError`` for timesteps out of order or range, for ``t_prev`` = −1, and where no signal
    is left at ``t``.
    """
    now, before = _two_levels(schedule, t, t_prev)
    if t_prev < 0:
        raise ValueError("t_prev is -1: the last step has no second slope; use ddim_step.")
    if now == 0:
        raise ValueError(f"no signal is left at t = {t}, so x/√ᾱ is infinite there; use ddim_step.")
    slopes = []
    for x, at, level, out in ((x_t, t, now, output), (x_prev, t_prev, before, output_prev)):
        x0 = estimate_x0(schedule, out, at, x, prediction=prediction, clip=clip)
        slopes.append((x - float(level.sqrt()) * x0) / float((1 - level).sqrt()))
    distance = ((1 - before) / before).sqrt() - ((1 - now) / now).sqrt()
    mean_slope = (slopes[0] + slopes[1]) / 2
    return float((before / now).sqrt()) * x_t + float(before.sqrt() * distance) * mean_slope


def _two_levels(schedule: NoiseSchedule, t: int, t_prev: int) -> tuple[Tensor, Tensor]:
    """ᾱ at ``t`` and at ``t_prev``, where −1 has ᾱ = 1."""
    if not -1 <= t_prev < t:
        raise ValueError(f"t_prev is {t_prev} and t is {t}: give −1 ≤ t_prev < t.")
    now = schedule.alphas_cumprod[t]
    return now, schedule.alphas_cumprod[t_prev] if t_prev >= 0 else torch.ones_like(now)


def estimate_x0(
    schedule: NoiseSchedule,
    output: Tensor,
    t: int,
    x_t: Tensor,
    *,
    prediction: str = "epsilon",
    clip: bool | float = True,
) -> Tensor:
    """The image that the network's ``output`` implies, (B, …), held in the range of images.

    ``clip`` True cuts at ±1. A number p in (0, 1), say 0.995, cuts each image at the p-quantile of its
    absolute values if that is above 1, and scales it back (Saharia et al. 2022, section 2.3).
    False leaves it as it is.
    """
    x0 = schedule.predict_x0(x_t, t, output, prediction)
    if clip is True:
        return x0.clamp(-1, 1)
    if clip is False:
        return x0
    if not 0 < clip < 1:
        raise ValueError(f"clip is {clip}: give True, False or a quantile between 0 and 1.")
    limit = x0.abs().flatten(1).quantile(clip, dim=1).clamp(min=1).reshape(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-limit, limit) / limit


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
    schedule: NoiseSchedule,
    steps: int,
    *,
    rho: float = 7.0,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> list[int]:
    """At most ``steps`` timesteps downward whose noise √(1 − ᾱ)/√ᾱ is spaced as in Karras et al. 2022, eq. 5.

    Each is the nearest of the schedule; what would come twice is left out. Where almost no signal is left,
    noise above ``sigma_max`` is skipped: Heun's long first steps would go far astray there.
    """
    if not 1 <= steps <= schedule.T:
        raise ValueError(f"steps is {steps}: give 1 to T = {schedule.T}.")
    noise = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt()
    high, low = min(float(noise[-1]), sigma_max) ** (1 / rho), max(float(noise[0]), sigma_min) ** (1 / rho)
    wanted = torch.linspace(high, low, steps, dtype=noise.dtype) ** rho
    nearest = (noise[None, :] - wanted[:, None]).abs().argmin(1).tolist()
    return sorted(set(nearest), reverse=True)


@dataclass(frozen=True)
class SampleState:
    """One step of :func:`sample`: at timestep ``t`` the network guessed ``x0``; ``x`` came of it.

    ``x`` and ``x0``: (B, C, H, W); ``x`` is the image after the step, at ``t_prev`` (−1: done).
    ``evaluations`` counts the calls of the network so far.
    """

    t: int
    t_prev: int
    x: Tensor
    x0: Tensor
    evaluations: int = 0


def sample(
    model,
    schedule: NoiseSchedule,
    shape: tuple[int, ...],
    *,
    method: str = "ddpm",
    steps: int | None = None,
    spacing: str = "trailing",
    seed: int = 0,
    prediction: str = "epsilon",
    eta: float = 0.0,
    variance: str = "small",
    clip: bool | float = True,
    y: Tensor | None = None,
    start: tuple[Tensor, int] | None = None,
) -> Iterator[SampleState]:
    """Generate images of ``shape`` (B, C, H, W), yielding a :class:`SampleState` per step.

    ``method`` "ddpm" visits every timestep, with ``variance`` as in :func:`ddpm_step`; the others
    visit ``steps`` of them (default 50), chosen by ``spacing`` as in :func:`spaced_timesteps` or
    "karras" as in :func:`karras_timesteps`:
    "ddim" with ``eta`` as in :func:`ddim_step`; "dpm_solver", second order, one call of the network
    a step; "heun", second order, two calls a step but one in the last.
    ``model(x, t, y)`` gives what ``prediction`` says. ``start=(x_t, t)`` begins at a noised image
    instead of pure noise. The noise is drawn on the CPU from ``seed``, so every device starts
    alike. Raises ``ValueError`` for an unknown method, ``steps`` that do not fit, or a ``start``
    of another shape.
    """
    check_prediction(prediction)
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: choose one of {', '.join(map(repr, METHODS))}.")
    if method == "ddpm" and steps not in (None, schedule.T):
        raise ValueError(f"ddpm takes all {schedule.T} steps, not {steps}: use method='ddim' for fewer.")
    count = schedule.T if method == "ddpm" else min(50, schedule.T) if steps is None else steps
    if spacing == "karras":
        timesteps = karras_timesteps(schedule, count)
    else:
        timesteps = spaced_timesteps(schedule.T, count, spacing)
    generator = torch.Generator().manual_seed(seed)
    device = _device(model)

    if start is None:
        x = torch.randn(shape, generator=generator).to(device)
    else:
        x, first = start
        if tuple(x.shape) != tuple(shape):
            raise ValueError(f"start holds images of shape {tuple(x.shape)}, asked for {tuple(shape)}.")
        if not 0 <= first < schedule.T:
            raise ValueError(f"start is at t = {first}: this schedule has 0 … {schedule.T - 1}.")
        x = x.to(device)
        timesteps = [first] + [t for t in timesteps if t < first]

    evaluations, previous = 0, None
    how = {"prediction": prediction, "clip": clip}
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1]):
        with torch.no_grad():
            output = model(x, torch.full((len(x),), t, device=device), y)
            evaluations += 1
            x0 = estimate_x0(schedule, output, t, x, **how)
            needs_noise = t_prev >= 0 and (method == "ddpm" or (method == "ddim" and eta > 0))
            noise = torch.randn(shape, generator=generator).to(device) if needs_noise else None
            if method == "ddpm":
                x = ddpm_step(schedule, output, t, x, variance=variance, noise=noise, **how)
            elif method == "dpm_solver":
                x = dpm_solver_step(schedule, output, t, t_prev, x, previous=previous, **how)
                previous = t, x0
            elif method == "heun" and t_prev >= 0 and schedule.alphas_cumprod[t] > 0:
                guess = ddim_step(schedule, output, t, t_prev, x, **how)
                second = model(guess, torch.full((len(x),), t_prev, device=device), y)
                evaluations += 1
                x = heun_step(schedule, output, t, t_prev, x, second, guess, **how)
            else:
                x = ddim_step(schedule, output, t, t_prev, x, eta=eta, noise=noise, **how)
        yield SampleState(t, t_prev, x, x0, evaluations)


def _device(model) -> torch.device:
    parameter = next(model.parameters(), None) if hasattr(model, "parameters") else None
    return torch.device("cpu") if parameter is None else parameter.device


def sample_images(model, schedule: NoiseSchedule, shape: tuple[int, ...], **settings) -> Tensor:
    """The images at the end of :func:`sample`, with the same arguments."""
    for state in sample(model, schedule, shape, **settings):  # noqa: B007
        pass
    return state.x


# ---- with a given image ---------------------------------------------------------------------


def inpaint(
    model,
    schedule: NoiseSchedule,
    image: Tensor,
    hole: Tensor,
    *,
    steps: int = 50,
    resamples: int = 5,
    seed: int = 0,
    prediction: str = "epsilon",
    clip: bool | float = True,
    y: Tensor | None = None,
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
    generator = torch.Generator().manual_seed(seed)
    device = _device(model)
    image, hole = image.to(device), hole.to(device)

    def fresh() -> Tensor:
        return torch.randn(image.shape, generator=generator, dtype=image.dtype).to(device)

    levels = torch.cat([schedule.alphas_cumprod, torch.ones(1, dtype=torch.float64)])  # [-1]: no noise
    timesteps, x, evaluations = spaced_timesteps(schedule.T, steps), fresh(), 0
    how = {"prediction": prediction, "clip": clip}
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1]):
        for repeat in range(resamples):
            with torch.no_grad():
                output = model(x, torch.full((len(x),), t, device=device), y)
            evaluations += 1
            x0 = estimate_x0(schedule, output, t, x, **how)
            x = ddim_step(schedule, output, t, t_prev, x, eta=1.0, noise=fresh(), **how)
            known = image if t_prev < 0 else schedule.q_sample(image, t_prev, fresh())
            x = torch.where(hole, x, known)
            if repeat + 1 < resamples and t_prev >= 0:
                kept = levels[t] / levels[t_prev]
                x = float(kept.sqrt()) * x + float((1 - kept).sqrt()) * fresh()
            elif t_prev < 0:
                break  # nothing is random any more
        yield SampleState(t, t_prev, x, x0, evaluations)


def ddim_invert(
    model,
    schedule: NoiseSchedule,
    image: Tensor,
    *,
    steps: int = 50,
    prediction: str = "epsilon",
    y: Tensor | None = None,
) -> Iterator[SampleState]:
    """Run DDIM upward: from an image (B, C, H, W) to the noise that it would come from.

    The last state's ``x``, at T − 1, given to :func:`sample` as ``start`` with ``method="ddim"``, leads back
    to about the image; the difference falls with ``steps``. In each state ``t_prev`` is where the step
    began (−1: the image) and ``t`` where it ended. Song et al. 2021, section 4.3. The network is asked
    at the start of each step, and for the first, which has no timestep, at that of its end.
    """
    device = _device(model)
    x = image.to(device)
    timesteps = spaced_timesteps(schedule.T, steps)[::-1]
    for evaluations, (t_prev, t) in enumerate(zip([-1, *timesteps[:-1]], timesteps), 1):
        asked = max(t_prev, timesteps[0])
        with torch.no_grad():
            output = model(x, torch.full((len(x),), asked, device=device), y)
        x0 = x if t_prev < 0 else schedule.predict_x0(x, asked, output, prediction)
        x = schedule.q_sample(x0, t, schedule.predict_noise(x, asked, output, prediction))
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

    ``data``: (N, C, H, W). Called like a network, ``(x, t, y=None)`` → the estimate of x_0 (so its
    ``prediction`` is "sample"): the images of the set, weighted by how likely each is to have led to x_t. A
    network that fits a finite set perfectly is this, and what it samples are copies of the set.
    Karras et al. 2022 (arXiv 2206.00364), appendix B.3.
    """

    def __init__(self, schedule: NoiseSchedule, data: Tensor):
        self.schedule, self.data = schedule, data

    def weights(self, x: Tensor, t: Tensor) -> Tensor:
        """How likely each image is to have led to each x_t: (B, C, H, W), (B,) → (B, N), rows sum to 1."""
        level = self.schedule.alphas_cumprod[t.cpu()][:, None]
        data = self.data.flatten(1).double().cpu()
        # −‖x − √ᾱ x_i‖² / 2(1 − ᾱ), without the part that is the same for every i
        fit = level.sqrt() * x.flatten(1).double().cpu() @ data.T - level * data.square().sum(1) / 2
        return (fit / (1 - level)).softmax(1)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.weights(x, t).to(self.data.dtype).to(self.data.device) @ self.data.flatten(1)
        return mean.reshape(x.shape).to(x.dtype).to(x.device)
