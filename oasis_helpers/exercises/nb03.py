"""Exercises of notebook 3: folding, the clock, a lie about t, and a network of one's own."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from .. import plots, unet
from ..data import load_slices, to_unit_range
from ..diffusion import Denoiser, NoiseSchedule, diffusion_loss
from ..intake.phantoms import make_phantoms, phantom_cache
from ..training import load_weights
from . import Exercise, Wrong, compare

# ---- 3.1 ----------------------------------------------------------------------------------------


def fold(images):
    b, c, h, w = images.shape
    blocks = images.reshape(b, c, h // 2, 2, w // 2, 2)
    return blocks.permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def _only_reshaped(images):
    b, c, h, w = images.shape
    return images.reshape(b, 4 * c, h // 2, w // 2)


def _quarters(images):
    b, c, h, w = images.shape
    return (
        images.reshape(b, c, 2, h // 2, 2, w // 2).permute(0, 1, 2, 4, 3, 5).reshape(b, 4 * c, h // 2, w // 2)
    )


def _mean_of_blocks(images):
    return F.avg_pool2d(images, 2)


def _diagnose_fold(fold) -> str:
    images = torch.arange(2 * 16 * 16, dtype=torch.float64).reshape(2, 1, 16, 16)
    mistakes = {
        "each channel holds pixels that lie side by side, so that the picture is torn into strips: `reshape` alone "
        "keeps the order of the pixels. The two rows and the two columns of a block need axes of their own, "
        "which `permute` then moves.": _only_reshaped(images),
        "each channel is a quarter of the picture. Wanted is every second pixel of the whole: the axis of length 2 "
        "stands *behind* the rows of blocks, (h // 2, 2), and not before.": _quarters(images),
    }
    compare(fold(images), F.pixel_unshuffle(images, 2), "the folded image", mistakes)
    return "four pictures of half the side, and not a bit is lost."


# ---- 3.2 ----------------------------------------------------------------------------------------


def clock(t, n):
    frequencies = 10_000.0 ** (-torch.arange(n) / n)
    angles = t[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _growing(t, n):
    angles = t[:, None] * 10_000.0 ** (torch.arange(n) / n)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _one_frequency(t, n):
    angles = t[:, None] * torch.ones(n)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _mixed(t, n):
    angles = t[:, None] * 10_000.0 ** (-torch.arange(n) / n)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def _diagnose_clock(clock) -> str:
    t, n = torch.tensor([0, 7, 500]), 4
    mistakes = {
        "all hands of your clock run at the same speed: t = 7 and t = 7 + 2π are one time for it. Let ω_k fall "
        "from 1 to about 0.0001.": _one_frequency(t, n),
        "your frequencies grow with k, so neighbouring timesteps have nothing in common: the exponent is −k/n.": _growing(
            t, n
        ),
        "sines and cosines alternate. Any fixed order would do for a network; the package has all sines first, and "
        "its weights are used to that.": _mixed(t, n),
    }
    wanted = unet.timestep_embedding(t, 2 * n)
    compare(clock(t, n), wanted, "the embedding of t = 0, 7, 500", mistakes, tolerance=1e-3)
    return "the slow hands tell early from late, the fast ones t from t + 1."


# ---- 3.3 ----------------------------------------------------------------------------------------

TRUE, TOLD = 300, (200, 300, 400)


def roughness(denoise, x_t, told):
    estimate = denoise(x_t, told)
    return float(estimate.diff(dim=-1).abs().mean())


def _of_the_input(denoise, x_t, told):
    return float(x_t.diff(dim=-1).abs().mean())


def _down_the_columns(denoise, x_t, told):
    return float(denoise(x_t, told).diff(dim=-2).abs().mean())


def _with_signs(denoise, x_t, told):
    return float(denoise(x_t, told).diff(dim=-1).mean())


@cache
def noisy_slices() -> tuple[Denoiser, Tensor]:
    """The network that ships, and 8 unseen slices under the noise of t = 300."""
    denoise = load_weights()
    images = to_unit_range(load_slices(make_phantoms(phantom_cache()).test, 64, cases=2)[::8])
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return denoise, denoise.schedule.q_sample(images, TRUE, noise)


@torch.no_grad()
def _diagnose_lie(prediction, roughness) -> str:
    denoise, x_t = noisy_slices()
    found = [float(roughness(denoise, x_t, told)) for told in TOLD]
    if max(found) - min(found) < 1e-6:
        raise Wrong(
            f"{found[0]:.3f} whatever the network is told: that is the roughness of x_t. Ask the network first, "
            "`denoise(x_t, told)`, and measure its estimate."
        )
    if max(abs(value) for value in found) < 0.02:
        raise Wrong(
            f"{found[0]:.4f} is nearly nothing: differences to the right and to the left cancel. Take their "
            "absolute values before the mean."
        )
    estimates = [denoise(x_t, told) for told in TOLD]
    right, down = ([float(e.diff(dim=dim).abs().mean()) for e in estimates] for dim in (-1, -2))
    mistakes = {
        "you compared each pixel with the one below it: the next one in the row is wanted, and columns are the "
        "last dimension.": down,
    }
    compare(found, right, f"the roughness when told t = {TOLD}", mistakes, tolerance=0.01)
    said = "As you said" if prediction == "grainy" else f"You said {prediction!r}, but"
    return (
        f"{said}: told t = {TOLD[0]} instead of {TRUE}, the network expects less noise than there is and leaves grain "
        f"({found[0]:.2f}); told the truth it is smooth ({found[1]:.2f})."
    )


@torch.no_grad()
def _estimates(prediction, roughness) -> Figure:
    denoise, x_t = noisy_slices()
    pictures = [x_t[1], *(denoise(x_t, told)[1] for told in TOLD)]
    titles = [f"x at t = {TRUE}", *(f"told {told}" for told in TOLD)]
    windows = [plots.window_at(denoise.schedule, TRUE), *[plots.BRAIN] * len(TOLD)]
    return plots.grid(pictures, 4, titles, 1.9, "synthetic – not for diagnosis", window=windows)


# ---- 3.4 ----------------------------------------------------------------------------------------

STEPS, MOST_PARAMETERS, LARGEST_LOSS = 80, 200_000, 0.28  # TinyUNet of the notebook comes to 0.32


def my_network():
    return unet.UNet(base_channels=16, channel_mult=(1, 2), attention_levels=())


class _Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 1, 3, padding=1))

    def forward(self, x, t, y=None):
        return self.layers(x)


class _Shrinking(_Plain):
    def forward(self, x, t, y=None):
        return F.avg_pool2d(self.layers(x), 2)


def _too_large():
    return unet.UNet(base_channels=32, channel_mult=(1, 2, 4))


def _diagnose_network(my_network) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = my_network()
    count = unet.count_parameters(network)
    if count > MOST_PARAMETERS:
        raise Wrong(
            f"it has {count:,} parameters: at most {MOST_PARAMETERS:,}. Fewer channels, or fewer levels?"
        )
    shape = tuple(network(torch.zeros(2, 1, 32, 32), torch.tensor([0, 999])).shape)
    if shape != (2, 1, 32, 32):
        raise Wrong(f"(2, 1, 32, 32) goes in and {shape} comes out: the answer is as large as the image.")
    loss = float(_fit(network)[-20:].mean())
    if loss > LARGEST_LOSS:
        raise Wrong(
            f"after {STEPS} steps its loss is {loss:.2f}, more than {LARGEST_LOSS}. Under much noise the answer hangs on "
            "the whole head: how far does a pixel of your output see, and does it know t?"
        )
    return f"{count:,} parameters, and a loss of {loss:.2f} after {STEPS} steps on eight slices."


def _fit(network: nn.Module) -> Tensor:
    """The losses of v while a network learns eight slices of 32×32 by heart, (steps,)."""
    slices = load_slices(make_phantoms(phantom_cache()).train, 64, cases=4)[8::16]
    images, schedule = F.avg_pool2d(to_unit_range(slices), 2), NoiseSchedule.cosine(1000)
    generator, losses = torch.Generator().manual_seed(0), []
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    for _ in range(STEPS):
        t = torch.randint(1000, (len(images),), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        loss = diffusion_loss(network, schedule, images, t, noise, "v_prediction").mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


EXERCISES = (
    Exercise(
        "3.1", "Fold pixels into channels", "line", 6,
        hints=(
            "Give the two rows and the two columns of each block axes of their own: "
            "`images.reshape(b, c, h // 2, 2, w // 2, 2)`.",
            "Then bring these axes behind the channel with `.permute(0, 1, 3, 5, 2, 4)` and reshape to "
            "`(b, 4 * c, h // 2, w // 2)`.",
        ),
        diagnose=_diagnose_fold, solution=fold,
        wrong=(
            ((_only_reshaped,), "`reshape` alone keeps the order of the pixels"),
            ((_quarters,), "each channel is a quarter of the picture"),
            ((_mean_of_blocks,), "has the shape (2, 1, 8, 8)"),
        ),
    ),
    Exercise(
        "3.2", "A clock", "function", 8,
        hints=(
            "Make the n frequencies first, then all products of t and frequency: (B, 1) times (n,).",
            "`frequencies = 10_000.0 ** (-torch.arange(n) / n)`, `angles = t[:, None] * frequencies`, then "
            "`torch.cat` of sines and cosines.",
        ),
        diagnose=_diagnose_clock, solution=clock,
        wrong=(
            ((_one_frequency,), "all hands of your clock run at the same speed"),
            ((_growing,), "the exponent is −k/n"),
            ((_mixed,), "sines and cosines alternate"),
        ),
    ),
    Exercise(
        "3.3", "A lie about t", "experiment", 10,
        hints=(
            "`denoise(x_t, told)` is the estimate of the clean slice by a network that believes `told`.",
            "The differences of neighbours are `estimate.diff(dim=-1)`; take the mean of their absolute values.",
        ),
        diagnose=_diagnose_lie, solution=roughness, prediction="grainy", picture=_estimates,
        alternatives=("smooth",),
        wrong=(
            (("grainy", _of_the_input), "Ask the network first"),
            (("grainy", _down_the_columns), "the next one in the row is wanted"),
            (("smooth", _with_signs), "Take their absolute values before the mean"),
        ),
    ),
    Exercise(
        "3.4", "A network of your own", "open", 30,
        hints=(
            "Start from `TinyUNet` above or from `unet.UNet` with few channels, and count parameters with "
            "`unet.count_parameters`.",
            "`unet.UNet(base_channels=16, channel_mult=(1, 2), attention_levels=())` passes. Can you do it with half?",
        ),
        diagnose=_diagnose_network, solution=my_network,
        wrong=(
            ((_Plain,), "how far does a pixel of your output see"),
            ((_Shrinking,), "the answer is as large as the image"),
            ((_too_large,), "Fewer channels, or fewer levels?"),
        ),
    ),
)  # fmt: skip
