"""Running the process backwards: ancestral (DDPM) and DDIM steps, and a generator over them.

Sources: DDPM, Ho et al. 2020 (arXiv 2006.11239), algorithm 2; DDIM, Song et al. 2021
(arXiv 2010.02502), eqs. 12 and 16; "trailing" timesteps, Lin et al. 2024 (arXiv 2305.08891);
starting from a noised image, SDEdit, Meng et al. 2022 (arXiv 2108.01073).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .diffusion import NoiseSchedule, check_prediction

METHODS = ("ddpm", "ddim")


def ddpm_step(
    schedule: NoiseSchedule,
    output: Tensor,
    t: int,
    x_t: Tensor,
    *,
    prediction: str = "epsilon",
    clip: bool = True,
    noise: Tensor | None = None,
) -> Tensor:
    """x_{t−1} (B, …) from x_t and the network's ``output``: one step of ancestral sampling.

    The posterior q(x_{t−1} | x_t, x̂_0) with the estimate x̂_0 in place of the image (Ho et al.
    2020, eqs. 6, 7 and 15). ``clip`` holds x̂_0 to [−1, 1]. ``noise`` is standard normal of
    x_t's shape; with None the result is the mean. The variance is the small one, β̃_t, and 0
    at t = 0. Raises ``ValueError`` for a timestep outside 0 … T−1.
    """
    x0 = _estimate(schedule, output, t, x_t, prediction, clip)
    mean, variance = schedule.q_posterior(x0, x_t, t)
    return mean if noise is None else mean + variance.sqrt() * noise


def ddim_step(
    schedule: NoiseSchedule,
    output: Tensor,
    t: int,
    t_prev: int,
    x_t: Tensor,
    *,
    prediction: str = "epsilon",
    eta: float = 0.0,
    clip: bool = True,
    noise: Tensor | None = None,
) -> Tensor:
    """x at ``t_prev`` (B, …) from x_t, over any distance: Song et al. 2021, eqs. 12 and 16.

    ``t_prev`` is below ``t``, or −1 for "no noise left". ``eta`` in [0, 1]: 0 is deterministic,
    1 has the variance of ancestral sampling. ``noise`` as in :func:`ddpm_step`; with None the
    result is the mean. Raises ``ValueError`` for timesteps out of order or range.
    """
    if not -1 <= t_prev < t:
        raise ValueError(f"t_prev is {t_prev} and t is {t}: give −1 ≤ t_prev < t.")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: give a number from 0 (deterministic) to 1 (ancestral).")
    x0 = _estimate(schedule, output, t, x_t, prediction, clip)
    epsilon = schedule.predict_noise(x_t, t, output, prediction)
    now = schedule.alphas_cumprod[t]
    before = schedule.alphas_cumprod[t_prev] if t_prev >= 0 else torch.ones_like(now)
    sigma = eta * ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
    mean = float(before.sqrt()) * x0 + float((1 - before - sigma**2).clamp(min=0).sqrt()) * epsilon
    return mean if noise is None else mean + float(sigma) * noise


def _estimate(schedule, output, t, x_t, prediction, clip) -> Tensor:
    x0 = schedule.predict_x0(x_t, t, output, prediction)
    return x0.clamp(-1, 1) if clip else x0


def trailing_timesteps(T: int, steps: int) -> list[int]:
    """``steps`` timesteps from T − 1 downward, evenly spaced (Lin et al. 2024, table 2)."""
    if not 1 <= steps <= T:
        raise ValueError(f"steps is {steps}: give 1 to T = {T}.")
    return [round(T - i * T / steps) - 1 for i in range(steps)]


@dataclass(frozen=True)
class SampleState:
    """One step of :func:`sample`: at timestep ``t`` the network guessed ``x0``; ``x`` came of it.

    ``x`` and ``x0``: (B, C, H, W); ``x`` is the image after the step, at ``t_prev`` (−1: done).
    """

    t: int
    t_prev: int
    x: Tensor
    x0: Tensor


def sample(
    model,
    schedule: NoiseSchedule,
    shape: tuple[int, ...],
    *,
    method: str = "ddpm",
    steps: int | None = None,
    seed: int = 0,
    prediction: str = "epsilon",
    eta: float = 0.0,
    clip: bool = True,
    y: Tensor | None = None,
    start: tuple[Tensor, int] | None = None,
) -> Iterator[SampleState]:
    """Generate images of ``shape`` (B, C, H, W), yielding a :class:`SampleState` per step.

    ``method`` "ddpm" visits every timestep; "ddim" visits ``steps`` of them (default 50),
    with ``eta`` as in :func:`ddim_step`. ``model(x, t, y)`` gives what ``prediction`` says.
    ``start=(x_t, t)`` begins at a noised image instead of pure noise. The noise is drawn on
    the CPU from ``seed``, so every device starts alike. Raises ``ValueError`` for an unknown
    method, ``steps`` that do not fit, or a ``start`` of another shape.
    """
    check_prediction(prediction)
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: choose one of {', '.join(map(repr, METHODS))}.")
    if method == "ddpm" and steps not in (None, schedule.T):
        raise ValueError(f"ddpm takes all {schedule.T} steps, not {steps}: use method='ddim' for fewer.")
    count = schedule.T if method == "ddpm" else min(50, schedule.T) if steps is None else steps
    timesteps = trailing_timesteps(schedule.T, count)
    generator = torch.Generator().manual_seed(seed)
    parameter = next(model.parameters(), None) if hasattr(model, "parameters") else None
    device = torch.device("cpu") if parameter is None else parameter.device

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

    for t, t_prev in zip(timesteps, [*timesteps[1:], -1]):
        with torch.no_grad():
            output = model(x, torch.full((len(x),), t, device=device), y)
            x0 = _estimate(schedule, output, t, x, prediction, clip)
            needs_noise = t_prev >= 0 and (method == "ddpm" or eta > 0)
            noise = torch.randn(shape, generator=generator).to(device) if needs_noise else None
            if method == "ddpm":
                x = ddpm_step(schedule, output, t, x, prediction=prediction, clip=clip, noise=noise)
            else:
                x = ddim_step(
                    schedule, output, t, t_prev, x, prediction=prediction, eta=eta, clip=clip, noise=noise
                )
        yield SampleState(t, t_prev, x, x0)


def sample_images(model, schedule: NoiseSchedule, shape: tuple[int, ...], **settings) -> Tensor:
    """The images at the end of :func:`sample`, with the same arguments."""
    for state in sample(model, schedule, shape, **settings):  # noqa: B007
        pass
    return state.x
