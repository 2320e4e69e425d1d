"""Pictures for the notebooks: pure functions from data to a matplotlib ``Figure``.

No pyplot and no global state, so a figure is shown once, where :func:`show` says. Type has 11 points and
more, and a pixel of a slice is a whole number of pixels on the screen; :func:`projector` enlarges all.
Colours are Okabe & Ito's, which people with any kind of colour vision can tell apart.

Greys have a window (black, white) in the units of the images. Brighter than the brain is only the scalp, so
``BRAIN`` ends below it; noise needs more room, and :func:`window` opens from the one to ±3 for the other.
"""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from IPython.display import display
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image
from torch import Tensor

BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW)
_STYLES = ("-", "--", "-.", ":")
TISSUE_COLOURS = {1: SKY, 2: ORANGE, 3: YELLOW}
TISSUE_NAMES = {0: "background", 1: "CSF", 2: "grey matter", 3: "white matter"}

DPI = 160  # pixels an inch of every picture
STYLE = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "figure.titlesize": 11,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
}
LINE = 30  # pixels of a line of that type
GAP = 10  # pixels between two pictures
LETTER = 13  # pixels of its mean letter

Picture = Tensor | np.ndarray | Image.Image
Window = tuple[float, float]
BRAIN: Window = (-1.0, 0.3)  # of a clean slice; 0.3 is 166 of 255
WHOLE: Window = (-1.0, 1.0)  # all that a stored slice can hold


def window(noise: float) -> Window:
    """What is black and what is white in a slice under noise of this standard deviation, 0 to 1.

    ``BRAIN`` without noise, ±3 in noise alone, and in proportion between.
    """
    return BRAIN[0] + noise * (-3 - BRAIN[0]), BRAIN[1] + noise * (3 - BRAIN[1])


def window_at(schedule, t: int) -> Window:
    """:func:`window` at timestep ``t`` of a schedule; −1 is no noise."""
    return window(schedule.levels(t)[1])


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """The drawing function in our type, whatever the settings of matplotlib are."""

    @functools.wraps(draw)
    def inside(*args, **kwargs):
        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return inside


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


def _seen(image: Picture) -> np.ndarray:
    """The slice upright, in [−1, 1] whether it is stored as bytes or not."""
    array = _turned(image)
    return array / 127.5 - 1 if array.dtype == np.uint8 else array


def _at(figure: Figure, left: float, top: float, width: float, height: float):
    """An axis at pixels of the figure, counted from its upper left corner."""
    across, down = np.round(figure.get_size_inches() * DPI)
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def _sheet(width: float, height: float) -> Figure:
    """An empty figure of so many pixels."""
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI)


def _enlarged(images: Sequence[Picture], size: float) -> list[tuple[np.ndarray, int]]:
    """Each slice as it is seen, and the whole number that brings it nearest to ``size`` inches."""
    seen = [_seen(image) for image in images]
    return [(array, max(1, round(size * DPI / array.shape[1]))) for array in seen]


def _picture(figure: Figure, left: float, top: float, array: np.ndarray, times: int, window: Window):
    """A slice with its upper left corner at pixels of the figure, ``times`` as large."""
    height, width = (times * n for n in array.shape)
    axis = _at(figure, left, top, width, height)
    low, high = window
    axis.imshow(array, cmap="gray", vmin=low, vmax=high, interpolation="nearest", aspect="auto")
    axis.set_axis_off()
    return axis


def _words(figure: Figure, left: float, top: float, text: str) -> None:
    """Lines of type, centred at a pixel of the figure and below another."""
    across, down = np.round(figure.get_size_inches() * DPI)
    figure.text(left / across, 1 - top / down, text, ha="center", va="top", linespacing=1.15)


def _lines_of(text: str, width: float) -> str:
    """The text in lines of so many pixels; where it has lines of its own it keeps them."""
    letters = max(1, int(width / LETTER))
    return "\n".join(textwrap.fill(line, letters, break_long_words=False) for line in text.split("\n"))


@_styled
def grid(
    images: Sequence[Picture] | Tensor,
    columns: int = 8,
    titles: Sequence[str] = (),
    size: float = 1.25,
    title: str = "",
    *,
    window: Window | Sequence[Window] = BRAIN,
) -> Figure:
    """Slices side by side, ``columns`` a row, each about ``size`` inches wide: a multiple of its pixels.

    ``window``: the values that are black and white, one for all slices or one for each.
    """
    found = _enlarged(images, size)
    windows = [window] * len(found) if np.ndim(window) == 1 else list(window)
    if len(windows) != len(found):
        raise ValueError(f"{len(found)} pictures have {len(windows)} windows: give one, or one for each.")
    width = max(times * array.shape[1] for array, times in found)
    height = max(times * array.shape[0] for array, times in found)
    named = [_lines_of(text, width + GAP) for text in titles]
    head = LINE * max((text.count("\n") + 1 for text in named), default=0)
    above = _lines_of(title, columns * (width + GAP))
    top = LINE * (above.count("\n") + 1) + GAP if title else 0
    rows = -(-len(found) // columns)
    figure = _sheet(columns * (width + GAP), top + rows * (head + height + GAP))
    if title:
        _words(figure, columns * (width + GAP) / 2, 2, above)
    for index, (array, times) in enumerate(found):
        row, column = divmod(index, columns)
        left, down = column * (width + GAP) + GAP / 2, top + row * (head + height + GAP) + head
        _picture(figure, left + (width - times * array.shape[1]) // 2, down, array, times, windows[index])
        if index < len(named) and named[index]:
            free = LINE * (head // LINE - named[index].count("\n") - 1)  # a short title stands by its picture
            _words(figure, left + width / 2, down - head + free + 1, named[index])
    return figure


@_styled
def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    *,
    title: str = "",
    logx: bool = False,
    logy: bool = False,
    size: tuple[float, float] = (6.5, 3.4),
    bounds: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Figure:
    """Curves by name, each (x, y), with a legend when there are several. One point is drawn as a dot.

    ``bounds``: for some of the names an interval (low, high) a point, drawn as bars.
    """
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    for index, (name, (x, y)) in enumerate(curves.items()):
        dot = "o" if len(x) == 1 else None
        axis.plot(np.asarray(x), np.asarray(y), marker=dot, label=name, **_look(index))
    for index, name in enumerate(curves):
        if bounds and name in bounds:
            low, high = np.asarray(bounds[name]).T
            axis.vlines(np.asarray(curves[name][0]), low, high, color=_look(index)["color"], linewidth=1)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if logx:
        axis.set_xscale("log")
    if logy:
        axis.set_yscale("log")
    if len(curves) > 1:
        axis.legend()
    return figure


@_styled
def bars(values: Mapping[str, float], ylabel: str, *, title: str = "", size=(6.5, 3.2)) -> Figure:
    """One bar a name, with its value on top."""
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    drawn = axis.bar(list(values), list(values.values()), color=BLUE, width=0.6)
    axis.bar_label(drawn, fmt="%.3g", padding=2)
    axis.set(ylabel=ylabel, title=title)
    axis.margins(y=0.15)
    return figure


@_styled
def histograms(
    samples: Mapping[str, np.ndarray], xlabel: str, *, bins=64, title: str = "", size=(6.5, 3.2)
) -> Figure:
    """Densities of several sets of numbers on common bins."""
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    values = {name: np.asarray(v).ravel() for name, v in samples.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins)
    for index, (name, found) in enumerate(values.items()):
        look = _look(index, solid=True)
        axis.hist(found, edges, density=True, histtype="step", linewidth=1.8, label=name, **look)
    axis.set(xlabel=xlabel, ylabel="density", title=title)
    if len(values) > 1:
        axis.legend()
    return figure


@_styled
def slice_panel(image: Picture, mask: Tensor | None = None, title: str = "", opacity: float = 0.45) -> Figure:
    """One slice, and beside it the same slice under its coloured tissue mask."""
    names = [title] if mask is None else [title, "tissue mask"]
    ((array, times),) = _enlarged([image], 2.6)
    height, width = (times * n for n in array.shape)
    figure = _sheet(len(names) * (width + GAP), 2 * LINE + height + 8)
    for place, name in enumerate(names):
        _words(figure, (place + 0.5) * (width + GAP), 2, name)
        axis = _picture(figure, GAP // 2 + place * (width + GAP), LINE, array, times, BRAIN)
    if mask is not None:
        classes = np.ma.masked_equal(_turned(mask), 0)
        colours = ListedColormap(list(TISSUE_COLOURS.values()))
        axis.imshow(
            classes, cmap=colours, vmin=1, vmax=3, alpha=opacity, interpolation="nearest", aspect="auto"
        )
        for tissue, colour in TISSUE_COLOURS.items():
            axis.plot([], [], "s", color=colour, label=TISSUE_NAMES[tissue])
        figure.legend(loc="lower center", ncols=3, handletextpad=0, borderpad=0)
    return figure


@_styled
def noising_panel(x0: Tensor, noise: Tensor, schedule, t: int, name: str = "") -> Figure:
    """A slice at timestep t: the image, its histogram, and where t lies on ᾱ and the SNR."""
    x_t = schedule.q_sample(x0, t, noise)
    ((array, times),) = _enlarged([x_t], 2.0)
    side, plot, room = times * array.shape[1], 340, 100
    figure = _sheet(side + 3 * (plot + room) + LINE, LINE + side + 2.5 * LINE)
    _words(figure, side / 2, 2, f"{name}, t = {t}" if name else f"t = {t}")
    _picture(figure, 0, LINE, array, times, window_at(schedule, t))
    histogram, alpha, snr = (
        _at(figure, side + room + k * (plot + room), LINE + 4, plot, side - 4) for k in range(3)
    )
    edges = np.linspace(-4, 4, 65)
    histogram.hist(x_t.numpy().ravel(), edges, density=True, color=SKY)
    places = np.linspace(-4, 4, 161)
    histogram.plot(places, np.exp(-(places**2) / 2) / np.sqrt(2 * np.pi), "k--", label="N(0, 1)")
    histogram.set(title="pixel values", ylim=(0, 1.2), yticks=[])
    histogram.legend()
    steps = np.arange(schedule.T)
    for axis, curve, label in ((alpha, schedule.alphas_cumprod, "ᾱ"), (snr, schedule.snr(), "SNR")):
        axis.plot(steps, curve.numpy(), color=BLUE)
        axis.plot([t], [float(curve[t])], "o", color=ORANGE)
        axis.set(title=f"{label} = {float(curve[t]):.4g}", xlabel="t")
    snr.set_yscale("log")
    snr.set_ylim(min(1e-9, float(schedule.snr().min()) / 2), 1e5)
    return figure


@_styled
def step_panel(state, T: int) -> Figure:
    """One step of sampling: x after the step, beside the network's estimate of x_0."""
    pictures = [images[0] if images.ndim == 4 else images for images in (state.x, state.x0)]
    after = "the sample" if state.t_prev < 0 else f"x at t = {state.t_prev}"
    return grid(
        pictures,
        2,
        [after, f"estimate of x₀ at t = {state.t}"],
        2.4,
        f"step from t = {state.t} of T = {T}\nsynthetic – not for diagnosis",
        window=[window((state.t_prev + 1) / T), BRAIN],
    )


_enlarged_for_all = [1]  # by projector(), for as long as this Python runs


def projector(times: int = 2) -> None:
    """From now on draw with ``times`` as many pixels, and enlarge type and code of the page; 1 is as before.

    One call at the top of a notebook, for a lecture. Raises ``ValueError`` for numbers other than 1, 2 and 3.
    """
    if times not in (1, 2, 3):
        raise ValueError(f"times is {times!r}: give 1, 2 or 3.")
    _enlarged_for_all[0] = times
    text, code = (round(n * (1 + 0.35 * (times - 1))) for n in (14, 13))
    style = f":root {{ --jp-content-font-size1: {text}px; --jp-code-font-size: {code}px; }}"
    page = f"<style>{style}</style>pictures and type ×{times}"
    display({"text/html": page, "text/plain": f"pictures ×{times}"}, raw=True)


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes, the same for the same figure and software; grey alone has one channel."""
    figure.set_dpi(DPI * _enlarged_for_all[0])
    canvas = FigureCanvasAgg(figure)
    with rc_context(STYLE):  # ticks are made when they are drawn
        canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    grey = (pixels == pixels[..., :1]).all()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if grey else pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def film_strip(frames: Sequence[bytes], columns: int) -> bytes:
    """PNG frames pasted into rows of ``columns``: what a moving picture is where nothing can move."""
    opened = [Image.open(io.BytesIO(frame)).convert("RGB") for frame in frames]
    rows = [opened[first : first + columns] for first in range(0, len(opened), columns)]
    width, heights = max(i.width for i in opened), [max(i.height for i in row) for row in rows]
    sheet = Image.new("RGB", (width * columns, sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, frame in enumerate(row):
            sheet.paste(frame, (column * width, sum(heights[:number])))
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


def show(figure: Figure, alt: str) -> None:
    """Put a figure into the notebook, with a text for those who do not see it."""
    display({"image/png": png(figure), "text/plain": alt}, metadata={"image/png": {"alt": alt}}, raw=True)


@_styled
def scatter(x, y, xlabel: str, ylabel: str, *, title: str = "", size=(5.5, 3.4)) -> Figure:
    """One point for each pair of numbers."""
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    axis.plot(np.asarray(x), np.asarray(y), "o", color=BLUE, markersize=5, alpha=0.8)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    return figure


@_styled
def intervals(
    groups: Mapping[str, Mapping[str, tuple[Sequence[float], float, float]]],
    xlabel: str,
    *,
    reference: float | None = None,
    logx: bool = False,
    title: str = "",
    width: float = 7.5,
) -> Figure:
    """Repeated measurements by group and setting, each (values, low, high) of the mean.

    ``reference`` draws a dashed line at a value to compare with.
    """
    rows = [(group, name) for group, settings in groups.items() for name in settings]
    places, place = [], 0.0
    for index, (group, _) in enumerate(rows):
        place += 1.0 if index and rows[index - 1][0] == group else 1.6
        places.append(place)
    figure = Figure(figsize=(width, 0.7 + 0.25 * place), layout="constrained")
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
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    if logx:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set(xlabel=xlabel, title=title)
    return figure


@_styled
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
        axis.set(title=name, xlabel=xlabel)
    axes[0].set_ylabel(ylabel)
    figure.colorbar(drawn, ax=list(axes))
    if title:
        figure.suptitle(title)
    return figure


@_styled
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
    names = [n for n in next(iter(rows.values())) if not n.endswith((", low", ", high"))]
    size, half = 1.2, 4 * (round(1.2 * DPI / 64) * 64 + GAP)  # four samples of 64 pixels side by side
    width = max(2 * half + 4 * LINE, 320 + 310 * len(rows))
    down, plot, table = 6 * LINE + half, 320, (len(names) + 1) * (LINE + 8)
    figure = _sheet(width, down + plot + 3 * LINE + table + LINE)
    _words(figure, width / 2, 4, f"{title}\nsynthetic – not for diagnosis")
    nearest = [image for pair in pairs for image in pair]
    for left, words, images in (
        (width / 2 - half - LINE, "samples", list(samples)[:16]),
        (width / 2 + LINE, "nearest to training, and below the training slice", nearest[:16]),
    ):
        _words(figure, left + half / 2, 3 * LINE, words)
        for k, (array, times) in enumerate(_enlarged(images, size)):
            # pairs stand one above the other
            row, column = divmod(k, 4) if words == "samples" else (2 * (k // 8) + k % 2, k // 2 % 4)
            places = (left + column * half / 4, 4.2 * LINE + row * half / 4)
            _picture(figure, *(round(place) for place in places), array, times, BRAIN)

    share, first = (width - 320 - LINE) / 5.6, 320  # room for the names of rows
    _kid_axis(_at(figure, first, down, 1.4 * share, plot), rows)
    for k, name in enumerate(("ventricles", "CSF", "grey", "symmetry")):
        axis = _at(figure, first + (1.6 + 1.03 * k) * share, down, 0.9 * share, plot)
        for index, (which, values) in enumerate(anatomy.items()):
            known, look = values[name][~values[name].isnan()].numpy(), _look(index, solid=True)
            if len(known):
                axis.hist(known, bins=25, density=True, histtype="step", label=which, linewidth=1.8, **look)
            else:  # nothing to draw, and named all the same
                axis.plot([], [], label=which, **look)
        axis.set(xlabel=name, yticks=[])
        axis.spines["left"].set_visible(False)
    axis.legend()
    axis.set_ylim(top=1.4 * axis.get_ylim()[1])  # the names stand above the curves

    axis = _at(figure, 300, down + plot + 3 * LINE, width - 310, table)
    axis.set_axis_off()
    cells = [[_with_interval(row, name) for row in rows.values()] for name in names]
    drawn = axis.table(cells, rowLabels=names, colLabels=list(rows), bbox=(0, 0, 1, 1), cellLoc="right")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(11)
    return figure


def _kid_axis(axis, rows: Mapping[str, Mapping[str, float | None]]) -> None:
    """KID of each row, the first on top, as a point in its interval."""
    for place, row in enumerate(rows.values()):
        low, high = (row.get(f"KID, {end}") for end in ("low", "high"))
        if None not in (low, high):
            axis.plot([low, high], [place, place], color=BLUE, linewidth=2, solid_capstyle="butt")
        axis.plot(row["KID"], place, "o", color=BLUE, markersize=5, clip_on=False)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xscale("symlog", linthresh=0.1)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set(xlabel="KID, 95 % interval", ylim=(len(rows) - 0.5, -0.5))
    axis.set_xticks([0, 0.1, 1, 10], ["0", "0.1", "1", "10"])
    axis.spines["left"].set_visible(False)


def _with_interval(row: Mapping[str, float | None], name: str) -> str:
    """A figure as a table shows it, and its interval where it has one."""
    value, low, high = (row.get(name + end) for end in ("", ", low", ", high"))
    if value is None:
        return "–"
    return f"{value:.3f}" if None in (low, high) else f"{value:.3f} ({low:.3f} to {high:.3f})"


@_styled
def progress_panel(
    steps: Sequence[int], losses: Sequence[float], samples: Sequence[Picture], step: int, total: int
) -> Figure:
    """The training loss so far of ``total`` steps, and beside it up to four samples made at ``step``."""
    side, plot = 192, (110, LINE + 10, 550, 310)
    figure = _sheet(700 + 2 * (side + GAP), 2 * (side + GAP) + LINE + GAP)
    axis = _at(figure, *plot)
    axis.plot(steps, losses, color=BLUE, marker="." if len(steps) < 3 else "")
    axis.set(xlabel="step", ylabel="loss", yscale="log", title=f"after step {step}")
    axis.set(xlim=(0, total), ylim=(0.02, 3))  # the same frame for every step: only the curve moves
    if len(samples):
        _words(figure, 700 + side + GAP / 2, 2, "synthetic – not for diagnosis")
    for index, (array, times) in enumerate(_enlarged(samples[:4], side / DPI)):
        row, column = divmod(index, 2)
        left, top = 700 + column * (side + GAP), LINE + row * (side + GAP)
        _picture(figure, left, top, array, times, BRAIN)
    return figure
