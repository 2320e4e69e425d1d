"""Pictures for the notebooks: pure functions from data to a matplotlib ``Figure``.

No pyplot and no global state, so a figure is shown once, where :func:`show` says. Colours are
Okabe & Ito's, which people with any kind of colour vision can tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from IPython.display import display
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW)
_STYLES = ("-", "--", "-.", ":")
TISSUE_COLOURS = {1: SKY, 2: ORANGE, 3: YELLOW}
TISSUE_NAMES = {0: "background", 1: "CSF", 2: "grey matter", 3: "white matter"}

Picture = Tensor | np.ndarray | Image.Image


def upright(image: Picture) -> np.ndarray:
    """A slice as people look at it: anterior up, (rows, columns), 0–1 for images.

    Takes a PIL image or uint8 array (0–255), a float tensor in [−1, 1] with or without its
    channel axis, or a long tensor of class ids (returned as they are).
    """
    array = _turned(image)
    if array.dtype == np.uint8:
        return array / 255
    return np.clip(array / 2 + 0.5, 0, 1) if array.dtype.kind == "f" else array


def _turned(image: Picture) -> np.ndarray:
    """The values of a slice as they are, anterior up; of a mask the class ids."""
    if isinstance(image, Tensor):
        array = image.detach().cpu().float().numpy() if image.is_floating_point() else image.cpu().numpy()
    else:
        array = np.asarray(image)
    array = array.squeeze()
    if array.ndim != 2:
        raise ValueError(f"the image has shape {array.shape}: give one slice, (H, W) or (1, H, W).")
    return np.rot90(array, 1)[:, ::-1]


def _look(index: int, solid: bool = False) -> dict[str, str]:
    """Colour and line of the curve with this number: 24 differ. ``solid``: as long as colours suffice."""
    turn, colour = divmod(index, len(COLOURS))
    return {"color": COLOURS[colour], "linestyle": _STYLES[(turn + (0 if solid else colour)) % 4]}


def _image_axis(axis, image: Picture, title: str = "") -> None:
    axis.imshow(upright(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    # Not set_axis_off(): the layout would leave no room for the title.
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    if title:
        axis.set_title(title, fontsize=9)


def grid(
    images: Sequence[Picture] | Tensor,
    columns: int = 8,
    titles: Sequence[str] = (),
    size: float = 1.25,
    title: str = "",
) -> Figure:
    """Slices side by side, ``columns`` a row, each ``size`` inches wide."""
    rows = -(-len(images) // columns)
    head = 0.28 if len(titles) else 0.04
    figure = Figure(
        figsize=(size * columns, rows * (size + head) + (0.3 if title else 0)), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for index, axis in enumerate(axes):
        if index < len(images):
            _image_axis(axis, images[index], titles[index] if index < len(titles) else "")
        else:
            axis.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    *,
    title: str = "",
    logx: bool = False,
    logy: bool = False,
    size: tuple[float, float] = (5.5, 3.0),
    bounds: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Figure:
    """Curves by name, each (x, y), with a legend when there are several. One point is drawn as a dot.

    ``bounds``: for some of the names an interval (low, high) a point, drawn as bars.
    """
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    for index, (name, (x, y)) in enumerate(curves.items()):
        dot = "o" if len(x) == 1 else None
        axis.plot(np.asarray(x), np.asarray(y), marker=dot, label=name, linewidth=1.6, **_look(index))
    for index, name in enumerate(curves):
        if bounds and name in bounds:
            low, high = np.asarray(bounds[name]).T
            axis.vlines(np.asarray(curves[name][0]), low, high, color=_look(index)["color"], linewidth=1)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if logx:
        axis.set_xscale("log")
    if logy:
        axis.set_yscale("log")
    axis.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axis.legend(fontsize=8, frameon=False)
    return figure


def bars(values: Mapping[str, float], ylabel: str, *, title: str = "", size=(5.5, 2.8)) -> Figure:
    """One bar a name, with its value on top."""
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    drawn = axis.bar(list(values), list(values.values()), color=BLUE, width=0.6)
    axis.bar_label(drawn, fmt="%.3g", fontsize=8, padding=2)
    axis.set(ylabel=ylabel, title=title)
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def histograms(
    samples: Mapping[str, np.ndarray], xlabel: str, *, bins=64, title: str = "", size=(5.5, 2.8)
) -> Figure:
    """Densities of several sets of numbers on common bins."""
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    values = {name: np.asarray(v).ravel() for name, v in samples.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins)
    for index, (name, found) in enumerate(values.items()):
        look = _look(index, solid=True)
        axis.hist(found, edges, density=True, histtype="step", linewidth=1.6, label=name, **look)
    axis.set(xlabel=xlabel, ylabel="density", title=title)
    axis.spines[["top", "right"]].set_visible(False)
    if len(values) > 1:
        axis.legend(fontsize=8, frameon=False)
    return figure


def slice_panel(image: Picture, mask: Tensor | None = None, title: str = "", opacity: float = 0.45) -> Figure:
    """One slice, and beside it the same slice under its coloured tissue mask."""
    figure = Figure(figsize=(6.4 if mask is not None else 3.2, 3.5), layout="constrained")
    axes = figure.subplots(1, 1 if mask is None else 2, squeeze=False)[0]
    _image_axis(axes[0], image, title)
    if mask is not None:
        _image_axis(axes[1], image, "tissue mask")
        classes = np.ma.masked_equal(_turned(mask), 0)
        axes[1].imshow(
            classes, cmap=ListedColormap(list(TISSUE_COLOURS.values())), vmin=1, vmax=3, alpha=opacity,
            interpolation="nearest",
        )  # fmt: skip
        for tissue, colour in TISSUE_COLOURS.items():
            axes[1].plot([], [], "s", color=colour, label=TISSUE_NAMES[tissue])
        axes[1].legend(
            loc="lower center", ncols=3, fontsize=7, frameon=False, labelcolor="white", handletextpad=0.1
        )
    return figure


def noising_panel(x0: Tensor, noise: Tensor, schedule, t: int) -> Figure:
    """A slice at timestep t: the image, its histogram, and where t lies on ᾱ and the SNR."""
    x_t = schedule.q_sample(x0, t, noise)
    figure = Figure(figsize=(9.2, 2.7), layout="constrained")
    picture, histogram, alpha, snr = figure.subplots(1, 4)
    _image_axis(picture, x_t, f"x_t at t = {t}")
    edges = np.linspace(-4, 4, 65)
    histogram.hist(x_t.numpy().ravel(), edges, density=True, color=SKY)
    grid_ = np.linspace(-4, 4, 161)
    histogram.plot(grid_, np.exp(-(grid_**2) / 2) / np.sqrt(2 * np.pi), "k--", linewidth=1, label="N(0, 1)")
    histogram.set(title="pixel values", ylim=(0, 1.2), yticks=[])
    histogram.legend(fontsize=7, frameon=False)
    steps = np.arange(schedule.T)
    for axis, curve, name in ((alpha, schedule.alphas_cumprod, "ᾱ"), (snr, schedule.snr(), "SNR")):
        axis.plot(steps, curve.numpy(), color=BLUE)
        axis.plot([t], [float(curve[t])], "o", color=ORANGE)
        axis.set_title(f"{name} = {float(curve[t]):.3g}", fontsize=9)
        axis.set_xlabel("t", fontsize=8)
    snr.set_yscale("log")
    snr.set_ylim(min(1e-5, float(schedule.snr().min()) / 2), 1e5)
    for axis in (histogram, alpha, snr):
        axis.tick_params(labelsize=7)
        axis.title.set_fontsize(9)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def step_panel(state, T: int) -> Figure:
    """One step of sampling: x after the step, beside the network's estimate of x_0."""
    figure = Figure(figsize=(5.4, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    after = "the sample" if state.t_prev < 0 else f"x at t = {state.t_prev}"
    _image_axis(left, state.x[0] if state.x.ndim == 4 else state.x, after)
    _image_axis(right, state.x0[0] if state.x0.ndim == 4 else state.x0, f"x₀ as guessed at t = {state.t}")
    figure.suptitle(f"step from t = {state.t} of T = {T} · synthetic – not for diagnosis", fontsize=8)
    return figure


def png(figure: Figure, dpi: int = 80) -> bytes:
    """The figure as PNG bytes, the same bytes for the same figure and software."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def film_strip(frames: Sequence[bytes], columns: int) -> bytes:
    """PNG frames pasted into rows of ``columns``: what a moving picture is where nothing can move."""
    opened = [Image.open(io.BytesIO(frame)).convert("RGB") for frame in frames]
    width, height = max(i.width for i in opened), max(i.height for i in opened)
    rows = -(-len(opened) // columns)
    sheet = Image.new("RGB", (width * columns, height * rows), "white")
    for index, frame in enumerate(opened):
        sheet.paste(frame, (index % columns * width, index // columns * height))
    buffer = io.BytesIO()
    _with_few_colours(sheet).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _with_few_colours(sheet: Image.Image, colours: int = 128) -> Image.Image:
    """The picture in the colours that serve it best, and in those of curves and tissues, however few."""
    kept = [tuple(bytes.fromhex(colour[1:])) for colour in COLOURS]
    small = sheet.quantize(colours - len(kept))
    indices, pixels = np.array(small), np.asarray(sheet)
    for place, colour in enumerate(kept, colours - len(kept)):
        indices[(pixels == colour).all(2)] = place
    palette = small.getpalette()[: 3 * (colours - len(kept))]
    palette += [0] * (3 * (colours - len(kept)) - len(palette)) + [part for colour in kept for part in colour]
    found = Image.fromarray(indices)
    found.putpalette(palette)
    return found


def show(figure: Figure, alt: str, dpi: int = 80) -> None:
    """Put a figure into the notebook, with a text for those who do not see it."""
    display(
        {"image/png": png(figure, dpi), "text/plain": alt}, metadata={"image/png": {"alt": alt}}, raw=True
    )


def scatter(x, y, xlabel: str, ylabel: str, *, title: str = "", size=(4.6, 3.0)) -> Figure:
    """One point for each pair of numbers."""
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    axis.plot(np.asarray(x), np.asarray(y), "o", color=BLUE, markersize=5, alpha=0.8)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def intervals(
    groups: Mapping[str, Mapping[str, tuple[Sequence[float], float, float]]],
    xlabel: str,
    *,
    reference: float | None = None,
    logx: bool = False,
    title: str = "",
    width: float = 6.5,
) -> Figure:
    """Repeated measurements by group and setting, each (values, low, high) of the mean.

    ``reference`` draws a dashed line at a value to compare with.
    """
    rows = [(group, name) for group, settings in groups.items() for name in settings]
    places, place = [], 0.0
    for index, (group, _) in enumerate(rows):
        place += 1.0 if index and rows[index - 1][0] == group else 1.6
        places.append(place)
    figure = Figure(figsize=(width, 0.6 + 0.2 * place), layout="constrained")
    axis = figure.subplots()
    for (group, name), y in zip(rows, places):
        values, low, high = groups[group][name]
        mean = np.mean(values)
        axis.plot(values, np.full(len(values), y), "o", color=BLUE, alpha=0.4, markersize=4)
        spread = [[mean - low], [high - mean]]
        axis.errorbar(mean, y, xerr=spread, fmt="|", color="black", markersize=9, capsize=2)
    if reference is not None:
        axis.axvline(reference, color="grey", linestyle="--", linewidth=1)
    names = [
        f"{group}:  {name}" if i == 0 or rows[i - 1][0] != group else name
        for i, (group, name) in enumerate(rows)
    ]
    axis.set_yticks(places, names, fontsize=8)
    axis.invert_yaxis()
    if logx:
        axis.set_xscale("log")
    axis.set(xlabel=xlabel, title=title)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def heatmap(
    arrays: np.ndarray | Mapping[str, np.ndarray],
    xlabel: str,
    ylabel: str,
    *,
    title: str = "",
    size: tuple[float, float] = (5.0, 3.2),
) -> Figure:
    """Numbers as colours (viridis) with a colour bar; a mapping gives named panels on one scale.

    Rows of an array run down the picture as they are stored. ``size`` is that of one panel.
    """
    panels = {"": arrays} if not isinstance(arrays, Mapping) else arrays
    panels = {name: np.asarray(array) for name, array in panels.items()}
    figure = Figure(figsize=(size[0] * len(panels), size[1]), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    low, high = min(a.min() for a in panels.values()), max(a.max() for a in panels.values())
    for axis, (name, array) in zip(axes, panels.items()):
        drawn = axis.imshow(
            array, cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="nearest"
        )
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(xlabel)
    axes[0].set_ylabel(ylabel)
    figure.colorbar(drawn, ax=list(axes))
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def evaluation_panel(
    rows: Mapping[str, Mapping[str, float | None]],
    anatomy: Mapping[str, Mapping[str, Tensor]],
    samples: Sequence[Picture],
    pairs: Sequence[tuple[Picture, Picture]],
    title: str,
) -> Figure:
    """A report: samples, those nearest to a training slice above it, KID, anatomy, and a table of figures.

    ``rows``, ``anatomy`` and ``pairs`` as in ``Evaluation``; ``samples``: at most 16 are shown. KID stands
    beside that of a perfect generator, with intervals, on an axis that is linear near 0 and logarithmic
    beyond.
    """
    figure = Figure(figsize=(11, 10.5), layout="constrained")
    figure.suptitle(f"{title}\nsynthetic – not for diagnosis", fontsize=9)
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(3.1, 2.3, 3.2))
    left, right = top.subfigures(1, 2)
    for part, words, images in (
        (left, "samples", list(samples)[:16]),
        (right, "nearest to training, and below the training slice", [i for p in pairs for i in p][:16]),
    ):
        part.suptitle(words, fontsize=9)
        down = part is right  # pairs stand one above the other
        axes = part.subplots(4, 4)
        order = [axes[2 * (k // 8) + k % 2, k // 2 % 4] if down else axes.flat[k] for k in range(16)]
        for axis in order[len(images) :]:
            axis.set_axis_off()
        for axis, image in zip(order, images):
            _image_axis(axis, image)

    kid_axis, *others = middle.subplots(1, 5, width_ratios=(1.4, 1, 1, 1, 1))
    _kid_axis(kid_axis, rows)
    for axis, name in zip(others, ("ventricles", "CSF", "grey", "symmetry")):
        for index, (which, values) in enumerate(anatomy.items()):
            known, look = values[name][~values[name].isnan()].numpy(), _look(index, solid=True)
            if len(known):
                axis.hist(known, bins=25, density=True, histtype="step", label=which, linewidth=1.5, **look)
            else:  # nothing to draw, and named all the same
                axis.plot([], [], label=which, **look)
        axis.set(xlabel=name, yticks=[])
        axis.spines[["top", "right", "left"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)

    axis = bottom.subplots()
    axis.set_axis_off()
    names = [n for n in next(iter(rows.values())) if not n.endswith((", low", ", high"))]
    cells = [[_with_interval(row, name) for row in rows.values()] for name in names]
    drawn = axis.table(cells, rowLabels=names, colLabels=list(rows), loc="center", cellLoc="right")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(7.5)
    return figure


def _kid_axis(axis, rows: Mapping[str, Mapping[str, float | None]]) -> None:
    """KID of each row, the first on top, as a point in its interval."""
    for place, row in enumerate(rows.values()):
        low, high = (row.get(f"KID, {end}") for end in ("low", "high"))
        if None not in (low, high):
            axis.plot([low, high], [place, place], color=BLUE, linewidth=2, solid_capstyle="butt")
        axis.plot(row["KID"], place, "o", color=BLUE, markersize=4)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xscale("symlog", linthresh=0.1)
    axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axis.set(xlabel="KID, 95 % interval", ylim=(len(rows) - 0.5, -0.5))
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _with_interval(row: Mapping[str, float | None], name: str) -> str:
    """A figure as a table shows it, and its interval where it has one."""
    value, low, high = (row.get(name + end) for end in ("", ", low", ", high"))
    if value is None:
        return "–"
    return f"{value:.3f}" if None in (low, high) else f"{value:.3f} ({low:.3f} to {high:.3f})"


def progress_panel(
    steps: Sequence[int], losses: Sequence[float], samples: Sequence[Picture], step: int, total: int
) -> Figure:
    """The training loss so far of ``total`` steps, and beside it up to four samples made at ``step``."""
    figure = Figure(figsize=(6.8, 2.7), layout="constrained")
    left, right = figure.subfigures(1, 2)
    axis = left.subplots()
    axis.plot(steps, losses, color=BLUE, linewidth=1.2, marker="." if len(steps) < 3 else "")
    axis.set(xlabel="step", ylabel="loss", yscale="log", title=f"after step {step}")
    axis.set(xlim=(0, total), ylim=(0.02, 3))  # the same frame for every step: only the curve moves
    axis.spines[["top", "right"]].set_visible(False)
    if len(samples):
        right.suptitle("synthetic – not for diagnosis", fontsize=8)
        for panel, image in zip(right.subplots(2, 2).ravel(), samples):
            _image_axis(panel, image)
    return figure
