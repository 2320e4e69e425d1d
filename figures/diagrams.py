"""The drawn figures of the notebooks, as vectors: ``make figures`` writes each as an SVG beside this file.

Where a drawing shows numbers, they are computed by the package: the tiles of the chain by ``q_sample``, the
sizes of the U-Net by ``trace_shapes``, the arrows of a step by ``ddpm_step`` and ``ddim_step``.
"""

from __future__ import annotations

import pathlib
from itertools import pairwise

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path

from oasis_helpers import plots, unet
from oasis_helpers.diffusion import NoiseSchedule
from oasis_helpers.sampling import ddim_step, ddpm_step

HERE = pathlib.Path(__file__).parent
GREY, PALE = "#555555", "#F2F2F2"


def _canvas(width: float, height: float):
    """A figure of so many inches, and an axis over all of it that counts in them, without a frame."""
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axis.set_axis_off()
    return figure, axis


def _arrow(
    axis, start, end, *, colour="black", bend=0.0, dashed=False, width=1.6, shrink=0.0
) -> FancyArrowPatch:
    patch = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=14, color=colour, linewidth=width, shrinkA=shrink,
        shrinkB=shrink, linestyle="--" if dashed else "-", connectionstyle=f"arc3,rad={bend}",
    )  # fmt: skip
    axis.add_patch(patch)
    return patch


def _box(axis, x: float, y: float, text: str, *, width=1.0, height=0.5, colour=PALE, code="") -> None:
    """A box around its middle; a click on it leads to the module ``code`` of the package."""
    corner, url = (x - width / 2, y - height / 2), f"../oasis_helpers/{code}.py" if code else None
    style = {"boxstyle": "round,pad=0,rounding_size=0.08", "facecolor": colour, "edgecolor": GREY}
    axis.add_patch(FancyBboxPatch(corner, width, height, url=url, **style))
    axis.text(x, y, text, ha="center", va="center", url=url)


def _head(side: int = 16) -> torch.Tensor:
    """A head of a few pixels, (side, side): scalp, skull, brain and ventricles, no one's."""
    rows, columns = np.mgrid[:side, :side] - (side - 1) / 2
    r = np.hypot(rows / 0.94, columns / 0.82) / (side / 2)
    values = np.select([r > 0.98, r > 0.8, r > 0.66], [-1.0, 0.3, -0.8], -0.1)
    values[(abs(columns) > 0.6) & (abs(columns) < 2) & (abs(rows) < 2.6)] = -0.8
    return torch.from_numpy(values).float()


def _tile(axis, x: float, y: float, values: torch.Tensor, window, side: float) -> None:
    """A small picture as squares, its middle at (x, y)."""
    low, high = window
    levels = ((values - low) / (high - low) * 20).clamp(0, 20).round()
    step = side / len(values)
    for level in levels.unique():  # one path for all squares of a grey: a small file
        squares = []
        for row, column in (levels == level).nonzero().tolist():
            left, top = x - side / 2 + column * step, y + side / 2 - row * step
            corners = [
                (left, top),
                (left + step, top),
                (left + step, top - step),
                (left, top - step),
                (left, top),
            ]
            squares.append(Path(corners, closed=True))
        grey = str(float(level) / 20)
        axis.add_patch(
            PathPatch(Path.make_compound_path(*squares), facecolor=grey, edgecolor=grey, linewidth=0.3)
        )


def chain() -> Figure:
    """The forward steps, the jump over them, and the way back."""
    figure, axis = _canvas(10, 3.3)
    schedule, head = NoiseSchedule.linear(1000), _head()
    noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    places = {-1: 0.8, 0: 2.7, 100: 4.6, 250: 6.9, 999: 9.2}
    names = {-1: "the image $x_0$", 0: "t = 0", 100: "t − 1", 250: "t", 999: "t = T − 1"}
    for t, x in places.items():
        picture = head if t < 0 else schedule.q_sample(head, t, noise)
        _tile(axis, x, 1.65, picture, plots.window_at(schedule, t), 1.0)
        axis.text(x, 1.0, names[t], ha="center", va="top")
    edges = list(places.values())
    for left, right in pairwise(edges):
        _arrow(axis, (left + 0.56, 1.85), (right - 0.56, 1.85), colour=plots.BLUE)
        _arrow(axis, (right - 0.56, 1.45), (left + 0.56, 1.45), colour=plots.ORANGE, dashed=True)
    for x in (3.65, 8.05):
        axis.text(x, 1.63, "…", ha="center", va="center", fontsize=16)
    axis.text(5.75, 1.95, "one step: $\\beta_t$", ha="center", va="bottom", color=plots.BLUE)
    axis.text(
        5.0,
        0.5,
        "the way back: the network's estimate, one step after the other",
        ha="center",
        color=plots.ORANGE,
    )
    _arrow(axis, (0.8, 2.2), (6.9, 2.2), colour=plots.GREEN, bend=-0.16)
    axis.text(
        3.85,
        3.0,
        "the jump: $\\sqrt{\\bar\\alpha_t}\\,x_0 + \\sqrt{1-\\bar\\alpha_t}\\,\\epsilon$",
        ha="center",
        color=plots.GREEN,
    )
    return figure


def predictions(t: int = 420) -> Figure:
    """Image, noise, x_t and v as directions, and how each answer of a network leads to the image."""
    figure, axis = _canvas(10, 4.2)
    s, n = NoiseSchedule.cosine(1000).levels(t)
    origin, unit = np.array([1.6, 0.6]), 3.0
    points = {"x_0": (1, 0), "\\epsilon": (0, 1), "x_t": (s, n)}
    colours = {"x_0": plots.BLUE, "\\epsilon": plots.ORANGE, "x_t": "black"}
    angle = np.linspace(0, np.pi / 2, 91)
    axis.plot(
        origin[0] + unit * np.cos(angle), origin[1] + unit * np.sin(angle), color="lightgrey", linewidth=1.5
    )
    for name, (x, y) in points.items():
        _arrow(axis, origin, origin + unit * np.array([x, y]), colour=colours[name])
        where = origin + (unit + 0.28) * np.array([x, y])
        axis.text(*where, f"${name}$", ha="center", va="center", fontsize=15, color=colours[name])
    tip = origin + unit * np.array([s, n])
    _arrow(axis, tip, tip + 0.45 * unit * np.array([-n, s]), colour=plots.GREEN)
    axis.text(
        *(tip + 0.55 * unit * np.array([-n, s])),
        "$v$",
        ha="center",
        va="center",
        fontsize=15,
        color=plots.GREEN,
    )
    foot = origin + unit * np.array([s, 0])
    axis.plot([foot[0], tip[0]], [foot[1], tip[1]], color=plots.ORANGE, linestyle=":", linewidth=1.5)
    axis.text(
        *(origin + unit * np.array([s / 2, -0.1])), "$\\sqrt{\\bar\\alpha_t}$", ha="center", va="center"
    )
    axis.text(
        *(foot + unit * np.array([0.16, n / 2])), "$\\sqrt{1-\\bar\\alpha_t}$", ha="center", va="center"
    )
    axis.text(7.35, 3.75, "what the network says, and the image that follows", ha="center")
    rows = (
        (
            "$\\epsilon$",
            "$(x_t - \\sqrt{1-\\bar\\alpha_t}\\;\\epsilon)\\,/\\,\\sqrt{\\bar\\alpha_t}$",
            plots.ORANGE,
        ),
        ("$x_0$", "$x_0$", plots.BLUE),
        ("$v$", "$\\sqrt{\\bar\\alpha_t}\\;x_t - \\sqrt{1-\\bar\\alpha_t}\\;v$", plots.GREEN),
    )
    for row, (said, image, colour) in enumerate(rows):
        y = 3.0 - 0.9 * row
        _box(axis, 5.6, y, said, width=0.8, height=0.6)
        _arrow(axis, (6.05, y), (6.75, y), colour=colour)
        axis.text(6.95, y, image, va="center", fontsize=13, color=colour)
    return figure


def residual_block() -> Figure:
    """The residual block, with the timestep going in."""
    figure, axis = _canvas(10, 3.2)
    names = ("norm", "SiLU", "conv", "norm", "scale,\nshift", "SiLU", "conv")
    places = [1.35 + 1.12 * k for k in range(7)]
    axis.text(0.25, 1.5, "x", ha="center", va="center", fontsize=14)
    edges = [0.4] + [x + side for x in places for side in (-0.42, 0.42)] + [9.03]
    for left, right in zip(edges[::2], edges[1::2]):
        _arrow(axis, (left, 1.5), (right, 1.5))
    for x, name in zip(places, names):
        colour = "#CDE8F7" if name == "conv" else "#FBE3D2" if name == "scale,\nshift" else PALE
        _box(axis, x, 1.5, name, width=0.84, height=0.62, colour=colour)
    axis.add_patch(Circle((9.2, 1.5), 0.17, facecolor="white", edgecolor=GREY))
    axis.text(9.2, 1.5, "+", ha="center", va="center", fontsize=14)
    _arrow(axis, (9.37, 1.5), (9.9, 1.5))
    axis.plot([0.6, 0.6, 9.2], [1.5, 0.6, 0.6], color=plots.GREEN, linewidth=1.6)
    _arrow(axis, (9.2, 0.6), (9.2, 1.33), colour=plots.GREEN)
    axis.text(4.7, 0.42, "shortcut: x itself, or a 1×1 convolution where the number of channels changes",
              ha="center", va="top", color=plots.GREEN)  # fmt: skip
    axis.text(0.6, 2.75, "t", ha="center", va="center", fontsize=14, color=plots.ORANGE)
    for x, text, width in (
        (2.0, "sines and cosines", 1.75),
        (4.15, "two linear layers", 1.75),
        (6.0, "linear", 1.0),
    ):
        _box(axis, x, 2.75, text, width=width, colour="#FBE3D2")
    for left, right in ((0.75, 1.1), (2.9, 3.25), (5.05, 5.48)):
        _arrow(axis, (left, 2.75), (right, 2.75), colour=plots.ORANGE)
    _arrow(axis, (places[4], 2.49), (places[4], 1.83), colour=plots.ORANGE)
    axis.text(
        places[4] + 0.85, 2.75, "a factor and an offset\nfor each channel", va="center", color=plots.ORANGE
    )
    return figure


def u_net() -> Figure:
    """The U-Net of the package for 64×64 pixels: height is the side of a feature map, width its channels."""
    figure, axis = _canvas(10, 4.9)
    model = unet.UNet(base_channels=16, channel_mult=(1, 2, 4), attention_levels=(2,))
    shapes = [(where, kind, shape) for where, kind, shape, _ in unet.trace_shapes(model, 64)]
    blocks = [(w, k, s) for w, k, s in shapes if k.startswith("ResBlock")]
    down = [s for w, _, s in blocks if w == "down"]
    middle, up = [s for w, _, s in blocks if w == "middle"], [s for w, _, s in blocks if w == "up"]
    levels = {side: y for side, y in zip(sorted({s[1] for s in down}, reverse=True), (3.75, 2.25, 0.95))}

    def place(shape, x):
        channels, side, _ = shape
        height, width = 1.1 * (side / 32) ** 0.75, 0.16 + channels / 110
        y = levels[side]
        axis.add_patch(
            Rectangle((x - width / 2, y - height / 2), width, height, facecolor="#CDE8F7", edgecolor=GREY)
        )
        return x - width / 2, x + width / 2, y, height

    lefts = [place(shape, x) for shape, x in zip(down, (2.3, 2.9, 3.6))]
    centres = [place(shape, x) for shape, x in zip(middle, (4.75, 5.75))]
    rights = [place(shape, x) for shape, x in zip(up[::2], (6.95, 7.6, 8.05))]
    for shape, (left, right, y, height) in zip([*down, *middle, *up[::2]], [*lefts, *centres, *rights]):
        name, under = "×".join(map(str, shape)), y - height / 2 - 0.06
        if shape[1] == 8:
            axis.text((left + right) / 2, under, name, ha="center", va="top")
        elif left < 5:
            axis.text(left - 0.08, y - height / 2, name, ha="right", va="bottom")
        else:
            axis.text(right + 0.08, y - height / 2, name, ha="left", va="bottom")
    for one, other in pairwise(lefts):
        _arrow(axis, (one[1], one[2] - 0.1), (other[0], other[2] + other[3] / 2), colour="black")
    _arrow(axis, (lefts[-1][1], lefts[-1][2]), (centres[0][0], lefts[-1][2]))
    _arrow(axis, (centres[0][1], lefts[-1][2]), (centres[1][0], lefts[-1][2]))
    _arrow(axis, (centres[1][1], lefts[-1][2]), (rights[0][0], lefts[-1][2]))
    for one, other in pairwise(rights):
        _arrow(axis, (one[1], one[2] + one[3] / 2), (other[0], other[2] - 0.1))
    for left, right in zip(lefts[:2], rights[:0:-1]):
        _arrow(
            axis,
            (left[1] + 0.05, left[2] + 0.2),
            (right[0] - 0.05, right[2] + 0.2),
            colour=plots.GREEN,
            dashed=True,
        )
        axis.text(
            (left[1] + right[0]) / 2, left[2] + 0.26, "skip", ha="center", va="bottom", color=plots.GREEN
        )
    start, end = (lefts[2][1] - 0.1, lefts[2][2] + 0.32), (rights[0][0] + 0.1, lefts[2][2] + 0.32)
    _arrow(axis, start, end, colour=plots.GREEN, dashed=True, bend=-0.25)
    axis.text(5.25, 1.78, "skip", ha="center", va="bottom", color=plots.GREEN)
    axis.text(0.75, 3.75, "slice\n1×64×64", ha="center", va="center")
    _arrow(axis, (1.3, 3.75), (lefts[0][0], 3.75))
    axis.text(1.72, 3.84, "fold", ha="center", va="bottom")
    axis.text(9.35, 3.75, "answer\n1×64×64", ha="center", va="center")
    _arrow(axis, (rights[2][1], 3.75), (8.85, 3.75))
    axis.text(8.5, 3.84, "unfold", ha="center", va="bottom")
    axis.text(5.25, 0.25, "middle: attention", ha="center", va="center")
    axis.text(
        1.15, 0.95, "the timestep t goes\ninto every block", ha="center", va="center", color=plots.ORANGE
    )
    words = "taller: a larger feature map; wider: more channels; on the way up one of two blocks is drawn"
    axis.text(5.25, 4.72, words, ha="center", va="center", color=GREY)
    return figure


X0, X_T = (0.9, 0.35), (-0.55, 1.55)  # two pixels of an estimate and of x_t
STEP = NoiseSchedule.linear(10, 0.02, 0.35)


def ddpm_arrows(t: int = 5) -> dict[str, tuple[float, float]]:
    """Points of a DDPM step from timestep ``t`` of ``STEP`` in the plane of two pixels, by name."""
    x0, x_t = torch.tensor(X0, dtype=torch.float64), torch.tensor(X_T, dtype=torch.float64)
    mean = ddpm_step(STEP, x0, t, x_t)
    drawn = ddpm_step(STEP, x0, t, x_t, noise=torch.tensor([0.9, 0.7], dtype=torch.float64))
    return {
        name: tuple(p.tolist()) for name, p in {"x0": x0, "x_t": x_t, "mean": mean, "next": drawn}.items()
    }


def ddim_arrows(t: int = 8, t_prev: int = 4) -> dict[str, tuple[float, float]]:
    """Points of a DDIM step from ``t`` to ``t_prev`` of ``STEP`` in the plane of two pixels, by name.

    "image" and "image_next" are the shares of the estimate in x_t and in what follows; the noise leads on.
    """
    x0, x_t = torch.tensor(X0, dtype=torch.float64), torch.tensor(X_T, dtype=torch.float64)
    points = {"x0": x0, "x_t": x_t, "next": ddim_step(STEP, x0, t, t_prev, x_t)}
    points["image"], points["image_next"] = STEP.levels(t)[0] * x0, STEP.levels(t_prev)[0] * x0
    return {name: tuple(p.tolist()) for name, p in points.items()}


def _plane(width: float = 8.0):
    figure = Figure(figsize=(width, 4.4))
    axis = figure.add_axes((0.08, 0.13, 0.9, 0.84))
    axis.set(xlabel="pixel 1", ylabel="pixel 2", aspect="equal", xlim=(-1.25, 2.3), ylim=(-0.25, 1.85))
    axis.axhline(0, color="lightgrey", linewidth=1)
    axis.axvline(0, color="lightgrey", linewidth=1)
    return figure, axis


def _point(axis, where, text: str, offset, colour: str = "black") -> None:
    axis.plot(*where, "o", color=colour, markersize=7)
    axis.annotate(text, where, offset, textcoords="offset points", color=colour, fontsize=13)


def ddpm() -> Figure:
    """One step of DDPM: towards the estimate, shrunk less, and fresh noise."""
    figure, axis = _plane()
    p, deviation = ddpm_arrows(), float(STEP.q_posterior(torch.zeros(1), torch.zeros(1), 5)[1]) ** 0.5
    _arrow(axis, p["x_t"], p["x0"], colour="lightgrey", dashed=True)
    axis.add_patch(Circle(p["mean"], deviation, facecolor=plots.SKY, alpha=0.25))
    _arrow(axis, p["x_t"], p["mean"], colour=plots.BLUE)
    _arrow(axis, p["mean"], p["next"], colour=plots.ORANGE)
    _point(axis, p["x_t"], "$x_t$", (-28, 2))
    _point(axis, p["x0"], "estimate $\\hat x_0$", (8, -16), plots.GREEN)
    _point(axis, p["mean"], "mean $\\tilde\\mu_t$", (-74, -16), plots.BLUE)
    _point(axis, p["next"], "$x_{t-1}$", (8, 4))
    words = "blue: the mean of the step\norange: fresh noise\ndisc: its deviation $\\sqrt{\\tilde\\beta_t}$"
    axis.text(1.15, 1.75, words, va="top")
    return figure


def ddim() -> Figure:
    """One step of DDIM: the same two directions, image and noise, in other shares."""
    figure, axis = _plane()
    p = ddim_arrows()
    for image, end, colour in (("image", "x_t", GREY), ("image_next", "next", plots.BLUE)):
        _arrow(axis, (0, 0), p[image], colour=colour)
        _arrow(axis, p[image], p[end], colour=plots.ORANGE, dashed=image == "image")
    _arrow(axis, p["x_t"], p["next"], colour="black", width=1, bend=-0.15, shrink=5)
    _point(axis, p["x_t"], "$x_t$", (-28, 2))
    _point(axis, p["x0"], "estimate $\\hat x_0$", (8, -16), plots.GREEN)
    _point(axis, p["next"], "$x_{t'}$", (10, 2), plots.BLUE)
    words = "orange: the noise in $x_t$, kept in direction,\nless of it after the step\n"
    axis.text(
        0.62, 1.78, words + "blue and grey: the share of the image,\nmore of it after the step", va="top"
    )
    return figure


def stable_diffusion() -> Figure:
    """The four parts of Stable Diffusion, each box linked to its code: what training adds is dashed."""
    figure, axis = _canvas(10, 5.0)
    boxes = {
        "prompt": (0.9, 3.9, "a phrase", 1.2, "#FFFFFF", ""),
        "tokenizer": (2.7, 3.9, "tokenizer", 1.3, PALE, "prompts"),
        "transformer": (4.7, 3.9, "transformer", 1.5, PALE, "conditions"),
        "noise": (0.9, 2.3, "noise\n32×32×4", 1.2, "#FFFFFF", ""),
        "unet": (4.7, 2.3, "U-Net with\ncross-attention", 1.9, "#DCE9F5", "unet"),
        "guidance": (2.7, 1.1, "guidance", 1.3, PALE, "sampling"),
        "sampler": (2.7, 2.3, "sampler", 1.2, PALE, "sampling"),
        "decoder": (7.2, 2.3, "decoder", 1.3, PALE, "autoencoder"),
        "head": (9.1, 2.3, "a head\n256×256", 1.3, "#FFFFFF", ""),
        "slice": (9.0, 0.5, "a slice, and\nwhat is true of it", 1.9, "#FFFFFF", ""),
        "encoder": (7.0, 0.5, "encoder", 1.3, PALE, "autoencoder"),
        "noising": (4.7, 0.5, "noising", 1.3, PALE, "diffusion"),
        "grammar": (8.15, 3.9, "grammar", 1.3, PALE, "prompts"),
    }
    for x, y, text, width, colour, code in boxes.values():
        _box(axis, x, y, text, width=width, height=0.72, colour=colour, code=code)

    def join(start: str, end: str, dashed=False) -> None:
        (x, y, _, width, *_), (to_x, to_y, _, to_width, *_) = boxes[start], boxes[end]
        if x == to_x:
            down = 1 if y > to_y else -1
            ends = (x, y - 0.36 * down), (to_x, to_y + 0.36 * down)
        else:
            right = 1 if to_x > x else -1
            ends = (x + width / 2 * right, y), (to_x - to_width / 2 * right, to_y)
        _arrow(axis, *ends, dashed=dashed, colour=plots.ORANGE if dashed else "black")

    solid = "prompt tokenizer, tokenizer transformer, transformer unet, noise sampler, sampler unet"
    for pair in f"{solid}, guidance sampler, decoder head".split(", "):
        join(*pair.split())
    for pair in ("slice encoder", "encoder noising", "noising unet"):
        join(*pair.split(), dashed=True)
    training = {"dashed": True, "colour": plots.ORANGE}
    _arrow(axis, (8.15, 0.86), (8.15, 3.54), **training)
    _arrow(axis, (8.15, 4.26), (0.9, 4.26), bend=0.07, **training)
    axis.text(8.25, 1.4, "the truths", ha="left", va="center", color=plots.ORANGE)
    axis.text(6.2, 4.62, "true phrases", ha="center", va="bottom", color=plots.ORANGE)
    axis.text(4.82, 3.34, "what the words mean", ha="left", va="center")
    _arrow(axis, (4.1, 1.94), (3.35, 1.1), bend=-0.25)
    axis.text(2.55, 1.7, "12 to 20 times", ha="right", va="center")
    _arrow(axis, (2.9, 2.66), (6.9, 2.66), bend=-0.16)
    axis.text(6.45, 2.95, "at the end", ha="left", va="bottom")
    axis.text(5.85, 0.6, "latents", ha="center", va="bottom", color=plots.ORANGE)
    axis.text(4.82, 1.4, "in training", ha="left", va="center", color=plots.ORANGE)
    return figure


DIAGRAMS = {
    "stable_diffusion": (
        stable_diffusion,
        "A phrase and noise lead through transformer, U-Net, guidance and sampler to the decoder and a head.",
    ),
    "chain": (chain, "Tiles from an image to noise: one step, the jump over many, and the way back."),
    "predictions": (predictions, "x_t between image and noise, v at right angles, and three formulas."),
    "residual_block": (residual_block, "Norm, SiLU, convolution, twice; scale and shift from t; a shortcut."),
    "u_net": (u_net, "Boxes from 16×32×32 down to 64×8×8 and up again, with skips across."),
    "ddpm_step": (ddpm, "From x_t an arrow to the mean near the estimate, and from there fresh noise."),
    "ddim_step": (ddim, "x_t and the next point: each a share of the estimate and of the same noise."),
}


def save(name: str) -> pathlib.Path:
    """Write one of ``DIAGRAMS`` as an SVG, the same bytes for the same software."""
    draw, words = DIAGRAMS[name]
    path = HERE / f"{name}.svg"
    with rc_context(plots.STYLE | {"svg.hashsalt": name}):
        draw().savefig(
            path, format="svg", metadata={"Date": None, "Creator": None, "Title": name, "Description": words}
        )
    return path
