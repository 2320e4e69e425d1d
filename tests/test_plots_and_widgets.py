import io
import warnings

import ipywidgets
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from oasis_helpers import plots
from oasis_helpers.diffusion import NoiseSchedule
from oasis_helpers.sampling import SampleState
from oasis_helpers.widgets import DRIVE, Live, Screen


def _decoded(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def _pixels(figure):
    return _decoded(plots.png(figure))


def test_upright_puts_anterior_up():
    stored = torch.full((1, 6, 8), -1.0)
    stored[0, 2, 7] = 1  # at the right edge: anterior
    seen = plots.upright(stored)
    assert seen.shape == (8, 6)
    assert np.argwhere(seen == 1).tolist() == [[0, 3]]
    as_bytes = ((stored[0] + 1) * 127.5).to(torch.uint8)
    assert np.array_equal(plots.upright(Image.fromarray(as_bytes.numpy())), seen)
    assert np.array_equal(plots.upright(as_bytes), seen)
    assert plots.upright(torch.tensor([[0, 3], [1, 2]])).max() == 3
    with pytest.raises(ValueError, match="one slice"):
        plots.upright(torch.zeros(2, 1, 4, 4))


def _blocks(pixels, times):
    """Least and greatest of each block of ``times``×``times`` pixels, (2, rows, columns)."""
    grey = pixels[..., 0]
    parts = grey.reshape(grey.shape[0] // times, times, grey.shape[1] // times, times)
    return np.stack([parts.min((1, 3)), parts.max((1, 3))])


@pytest.mark.parametrize(
    ("side", "size", "times"), [(64, 1.25, 3), (32, 1.25, 6), (208, 1.1, 1), (8, 1.25, 25)]
)
def test_a_pixel_of_a_slice_is_a_whole_number_of_pixels(side, size, times):
    slices = torch.rand(3, 1, side, side, generator=torch.Generator().manual_seed(0)) * 1.3 - 1
    pixels = _pixels(plots.grid(slices, 2, ["a", "b", "c"], size))
    across, high = times * side + plots.GAP, times * side
    for index, (row, column) in enumerate(((0, 0), (0, 1), (1, 0))):
        top, left = plots.LINE + row * (high + plots.LINE + plots.GAP), column * across + plots.GAP // 2
        least, most = _blocks(pixels[top : top + high, left : left + high], times)
        assert np.array_equal(least, most)
        low, up = plots.BRAIN
        wanted = (np.rot90(slices[index, 0].numpy(), 1)[:, ::-1] - low) / (up - low) * 255
        assert abs(least - wanted).max() < 2.5  # of 255: what rounding to the map of greys leaves


def test_the_window_opens_from_the_brain_to_the_noise():
    assert plots.window(0) == plots.BRAIN
    assert plots.window(1) == pytest.approx((-3, 3))
    schedule = NoiseSchedule.cosine(10)
    assert plots.window_at(schedule, -1) == plots.BRAIN
    assert plots.window_at(schedule, 5) == plots.window(float(schedule.noise[5]))
    slices = torch.zeros(2, 1, 8, 8)
    axes = plots.grid(slices, window=[plots.WHOLE, (-3, 3)]).axes
    assert [axis.images[0].get_clim() for axis in axes] == [(-1, 1), (-3, 3)]
    with pytest.raises(ValueError, match="2 pictures have 1 windows"):
        plots.grid(slices, window=[plots.WHOLE])
    stored, same = (
        plots.grid([image]).axes[0].images[0].get_array()
        for image in (np.full((8, 8), 51, np.uint8), torch.full((1, 8, 8), 51 / 127.5 - 1))
    )
    assert np.allclose(stored, same)


def test_no_word_of_a_picture_is_smaller_than_eleven_points():
    x0 = torch.zeros(1, 8, 8)
    rows = {"a": {"KID": 0.1, "FID": 1.0}}
    parts = dict.fromkeys(("ventricles", "CSF", "grey", "symmetry"), torch.tensor([0.1, 0.2]))
    figures = [
        plots.grid([x0], titles=["a"], title="b"),
        plots.lines({"a": ([0, 1], [0, 1]), "b": ([0], [1])}, "x", "y", title="t"),
        plots.bars({"a": 1.0}, "y"),
        plots.histograms({"a": np.arange(3), "b": np.arange(3)}, "x"),
        plots.heatmap({"a": np.eye(2), "b": np.eye(2)}, "x", "y", title="t"),
        plots.intervals({"a": {"b": ([1.0, 2.0], 1, 2)}}, "x"),
        plots.slice_panel(x0, torch.ones(8, 8).long(), "a"),
        plots.noising_panel(x0, x0, NoiseSchedule.cosine(50), 3, "cosine"),
        plots.progress_panel([1], [1.0], [x0], 1, 2),
        plots.evaluation_panel(rows, {"a": parts}, [x0], [(x0, x0)], "weights"),
    ]
    for figure in figures:
        plots.png(figure)
        words = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        assert words
        assert min(text.get_fontsize() for text in words) >= 11, {t.get_text() for t in words}


@pytest.mark.parametrize("t", [0, 25, 49])
def test_panels_follow_t(t):
    s = NoiseSchedule.cosine(50)
    x0 = torch.zeros(1, 8, 8)
    noise = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))
    one, other = (_pixels(plots.noising_panel(x0, noise, s, k)) for k in (t, (t + 7) % 50))
    assert one.shape == other.shape
    assert (one != other).any()
    assert np.array_equal(one, _pixels(plots.noising_panel(x0, noise, s, t)))


def test_a_single_point_can_be_seen():
    curves = {"curve": ([1, 10], [1, 2]), "point": ([5], [1.5])}
    with_point = _pixels(plots.lines(curves, "x", "y"))
    curves["point"] = ([5], [1.6])
    assert (with_point != _pixels(plots.lines(curves, "x", "y"))).any()


def test_bounds_are_drawn_at_the_points_of_their_curve():
    curves = {"a": ([1, 2], [1, 3]), "b": ([1, 2], [2, 1])}
    (axis,) = plots.lines(curves, "x", "y", bounds={"b": [(1.5, 2.5), (0, 4)]}).axes
    (bars,) = axis.collections
    assert [bar.tolist() for bar in bars.get_segments()] == [[[1, 1.5], [1, 2.5]], [[2, 0], [2, 4]]]
    assert to_hex(bars.get_color()[0]) == to_hex(axis.lines[1].get_color())


def test_lines_show_their_data():
    curves = {"a": ([1, 2], [1, 3]), "b": ([1, 2], [2, 1])}
    (axis,) = plots.lines(curves, "x", "y", title="t", logx=True, logy=True).axes
    assert [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axis.lines] == list(
        curves.values()
    )
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "b"]
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_title()) == ("x", "y", "t")
    (axis,) = plots.lines({"a": ([0, 1], [0, 1])}, "x", "y").axes
    assert (axis.get_xscale(), axis.get_legend()) == ("linear", None)


def test_histograms_show_densities_on_common_bins():
    (axis,) = plots.histograms({"a": np.zeros(4), "b": np.array([0, 1, 1, 1])}, "x", bins=2).axes
    heights = [patch.get_xy()[:, 1].max() for patch in axis.patches]
    assert heights == [2, 1.5]  # all of it, and three quarters, in bins half as wide as the range
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "b"]


def test_no_curve_is_dropped_and_no_two_look_alike():
    names = [str(n) for n in range(24)]
    (axis,) = plots.lines({name: ([0, 1], [0, 1]) for name in names}, "x", "y").axes
    looks = [(line.get_color(), line.get_linestyle()) for line in axis.lines]
    assert len(looks) == len(set(looks)) == 24
    (axis,) = plots.histograms({name: np.arange(5) for name in names}, "x").axes
    looks = [(patch.get_edgecolor(), patch.get_linestyle()) for patch in axis.patches]
    assert len(looks) == len(set(looks)) == 24


def test_bars_points_and_intervals_show_their_data():
    (axis,) = plots.bars({"a": 1.0, "b": 2.0}, "y").axes
    assert [bar.get_height() for bar in axis.patches] == [1, 2]
    assert [text.get_text() for text in axis.texts] == ["1", "2"]
    (axis,) = plots.scatter([0, 1], [3, 2], "x", "y").axes
    assert axis.lines[0].get_xydata().tolist() == [[0, 3], [1, 2]]
    groups = {"loss": {"L2": ([1.0, 2.0], 1.2, 1.9), "L1": ([2.0, 3.0], 2, 4)}, "T": {"10": ([1.0], 1, 1)}}
    (axis,) = plots.intervals(groups, "x", reference=1.5, logx=True).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["loss:  L2", "L1", "T:  10"]
    assert [container[0].get_xdata().tolist() for container in axis.containers] == [[1.5], [2.5], [1.0]]
    ends = [container[2][0].get_segments()[0][:, 0].tolist() for container in axis.containers]
    assert ends == [[1.2, 1.9], [2.0, 4.0], [1.0, 1.0]]


def test_heatmaps_show_their_data_on_one_scale():
    ramp = np.arange(12.0).reshape(3, 4)
    *panels, bar = plots.heatmap({"a": ramp, "b": -ramp}, "x", "y").axes
    for panel, data in zip(panels, (ramp, -ramp), strict=True):
        assert np.array_equal(panel.images[0].get_array(), data)
        assert panel.images[0].get_clim() == (-11, 11)
    assert bar.get_ylim() == (-11, 11)


@pytest.mark.parametrize("kind", [torch.uint8, torch.long])
def test_a_mask_is_drawn_by_its_class_ids(kind):
    image, mask = torch.zeros(1, 8, 8), torch.tensor([[0, 1, 2, 3]] * 4).repeat(2, 2)
    figure = plots.slice_panel(image, mask.to(kind))
    left, right = figure.axes
    drawn = right.images[1]
    assert np.array_equal(drawn.get_array().filled(0), np.rot90(mask.numpy(), 1)[:, ::-1])
    colours = [to_hex(colour).upper() for colour in drawn.cmap(drawn.norm(np.array([1, 2, 3])))]
    assert colours == list(plots.TISSUE_COLOURS.values())
    legend = zip(figure.legends[0].get_texts(), right.lines, strict=True)
    assert {text.get_text(): line.get_color() for text, line in legend} == {
        plots.TISSUE_NAMES[tissue]: colour for tissue, colour in plots.TISSUE_COLOURS.items()
    }
    assert len(left.images) == 1
    assert len(plots.slice_panel(image, title="a").axes) == 1


def test_a_grid_leaves_its_last_places_empty():
    few = plots.grid([torch.zeros(1, 8, 8)] * 5, columns=4, titles=["a"] * 5, title="all")
    assert [len(axis.images) for axis in few.axes] == [1] * 5
    places = [tuple(np.round(axis.get_position().p0, 3)) for axis in few.axes]
    assert len({left for left, _ in places}) == 4
    assert places[4][0] == places[0][0]
    assert places[4][1] < places[0][1]
    assert [text.get_text() for text in few.texts] == ["all", *"aaaaa"]


def test_a_step_shows_the_sample_and_the_guess():
    state = SampleState(3, -1, torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8))
    figure = plots.step_panel(state, 10)
    assert [axis.images[0].get_array().mean() for axis in figure.axes] == [0, 1]
    words = (
        "step from t = 3 of T = 10\nsynthetic – not for diagnosis",
        "the sample",
        "estimate of x₀ at t = 3",
    )
    assert tuple(text.get_text() for text in figure.texts) == words
    state = SampleState(9, 8, torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8))
    windows = [axis.images[0].get_clim() for axis in plots.step_panel(state, 9).axes]
    assert windows == [(-3, 3), plots.BRAIN]


def test_a_report_shows_all_it_is_given():
    rows = {
        "generated": {"KID": 0.1234, "KID, low": 0.05, "KID, high": 0.2, "FID": None},
        "noise": {"KID": 11.0, "KID, low": None, "KID, high": None, "FID": 466.0},
    }
    parts, sets = ("ventricles", "CSF", "grey", "symmetry"), [f"set {n}" for n in range(7)]
    anatomy = {name: dict.fromkeys(parts, torch.tensor([0.1, 0.2, float("nan")])) for name in sets}
    pairs = [(torch.full((1, 8, 8), -1.0), torch.full((1, 8, 8), 1.0))] * 8
    figure = plots.evaluation_panel(rows, anatomy, [torch.zeros(1, 8, 8)] * 20, pairs, "weights")
    assert figure.texts[0].get_text() == "weights\nsynthetic – not for diagnosis"
    samples, nearest, kid, bodies = figure.axes[:16], figure.axes[16:32], figure.axes[32], figure.axes[33:37]
    assert [label.get_text() for label in kid.get_yticklabels()] == list(rows)
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in kid.lines[:-1]]
    assert drawn == [([0.05, 0.2], [0, 0]), ([0.1234], [0]), ([11.0], [1])]  # no interval, no line
    shades = [[float(axis.images[0].get_array().mean()) for axis in part] for part in (samples, nearest)]
    assert shades == [[0] * 16, [-1, 1] * 8]
    places = [tuple(np.round(axis.get_position().p0, 4)) for axis in nearest]
    for (left, above), (below_it, below) in zip(places[::2], places[1::2]):
        assert left == below_it
        assert above > below  # each above its training slice
    assert len(set(places)) == 16
    assert [axis.get_xlabel() for axis in bodies] == list(parts)
    for axis in bodies:
        looks = [(patch.get_edgecolor(), patch.get_linestyle()) for patch in axis.patches]
        assert len(looks) == len(set(looks)) == 7
    assert [text.get_text() for text in bodies[-1].get_legend().get_texts()] == sets
    (table,) = figure.axes[37].tables
    cells = {place: cell.get_text().get_text() for place, cell in table.get_celld().items()}
    assert [cells[0, 0], cells[0, 1], cells[1, -1], cells[2, -1]] == ["generated", "noise", "KID", "FID"]
    assert (3, -1) not in cells
    figures = [cells[1, 0], cells[1, 1], cells[2, 0], cells[2, 1]]
    assert figures == ["0.123 (0.050 to 0.200)", "11.000", "–", "466.000"]


def test_a_report_with_undefined_figures_is_drawn_and_names_every_set():
    parts, nowhere = ("ventricles", "CSF", "grey", "symmetry"), torch.full((5,), float("nan"))
    anatomy = {name: dict.fromkeys(parts, nowhere) for name in ("real", "generated")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plots.evaluation_panel({"generated": {"KID": 0.1}}, anatomy, [], [], "weights")
    (legend,) = [axis.get_legend() for axis in figure.axes if axis.get_legend()]
    assert [text.get_text() for text in legend.get_texts()] == ["real", "generated"]


def test_show_carries_its_text(monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "display", lambda *a, **k: shown.append((a, k)))
    plots.show(plots.bars({"a": 1.0}, "y"), "one bar")
    (data,), settings = shown[0]
    assert data["text/plain"] == "one bar"
    assert settings["metadata"]["image/png"]["alt"] == "one bar"
    assert data["image/png"].startswith(b"\x89PNG")


def test_film_strip_holds_every_frame():
    frames = [plots.png(plots.bars({"a": float(v)}, "y", size=(2, 1.5))) for v in (1, 2, 3)]
    first, second, third = (_decoded(frame) for frame in frames)
    wanted = np.vstack([np.hstack([first, second]), np.hstack([third, np.full_like(third, 255)])])
    strip = _decoded(plots.film_strip(frames, 2))
    assert strip.shape == wanted.shape
    assert abs(strip - wanted).max() < 12  # few colours, but the same picture


def test_a_row_of_a_film_strip_is_as_high_as_its_own_frames():
    frames = [plots.png(Figure(figsize=(1, height), dpi=plots.DPI)) for height in (1, 1, 2, 1)]
    strip = _decoded(plots.film_strip(frames, 2))
    assert strip.shape[:2] == (3 * plots.DPI, 2 * plots.DPI)


def test_a_film_strip_keeps_the_colours_of_tissues():
    """Three small squares in a legend, beside a picture of a thousand other colours."""
    generator = torch.Generator().manual_seed(0)
    image, mask = torch.rand((1, 64, 64), generator=generator) * 2 - 1, torch.zeros(64, 64).long()
    mask[8:56, 8:56] = torch.randint(1, 4, (48, 48), generator=generator)
    frames = [plots.png(plots.slice_panel(image, mask, opacity=o)) for o in (0.3, 0.6)]
    strip, sheet = plots.film_strip(frames, 2), np.hstack([_decoded(frame) for frame in frames])
    for colour in plots.TISSUE_COLOURS.values():
        legend = (sheet == tuple(bytes.fromhex(colour[1:]))).all(2)
        assert legend.sum() > 20
        assert (_decoded(strip)[legend] == tuple(bytes.fromhex(colour[1:]))).all()
    few = io.BytesIO()
    Image.fromarray(sheet.astype(np.uint8)).quantize(128).save(few, format="PNG", optimize=True)
    assert len(strip) < 1.1 * len(few.getvalue())


def _draw(t=0, name="a", on=True):
    figure = Figure(figsize=(1, 1))
    figure.text(0.1, 0.5, f"{t}{name}{on}")
    return figure


def _live(draw=_draw, **more):
    return Live(
        draw,
        "a number that follows the slider",
        [{"t": 0}, {"t": 5}],
        t=ipywidgets.IntSlider(2, 0, 10),
        **more,
    )


def test_the_picture_follows_every_control():
    live = _live(
        name=ipywidgets.Dropdown(options=[("first", "a"), ("second", "b")]),
        on=ipywidgets.Checkbox(True),
        play="t",
    )
    before = live.image.value
    live.controls["t"].value = 7
    assert live.image.value != before
    live.controls["t"].value = 2
    assert live.image.value == before
    assert live.check() == "the picture follows t at 0, 5, 10; name at a, b; on at False, True"
    assert live.values == {"t": 2, "name": "a", "on": True}


def test_the_play_button_starts_where_the_slider_is():
    # In a browser the link hands its value to the slider: a button at 0 would move it.
    button = _live(play="t").children[0].children[-1]
    assert (button.value, button.min, button.max) == (2, 0, 10)


def test_a_picture_that_does_not_follow_is_caught():
    with pytest.raises(AssertionError, match="'t': 3 positions gave 1"):
        _live(lambda t: _draw()).check()


def test_an_error_at_one_end_is_raised():
    def draw(t):
        if t == 10:
            raise RuntimeError("at the end")
        return _draw(t)

    with pytest.raises(RuntimeError, match="at the end"):
        _live(draw).check()


def test_a_mistake_of_the_reader_is_said_and_the_picture_stays(capsys):
    def draw(words):
        if "cat" in words:
            raise ValueError("'cat' is not a word of the grammar")
        return _draw(words)

    live = Live(draw, "what was typed", [], words=ipywidgets.Combobox(value="a", options=("b", "c", "d")))
    before = live.image.value
    live.controls["words"].value = "a cat"
    assert (live.said.value, live.said.layout.display) == ("'cat' is not a word of the grammar", None)
    assert live.image.value == before
    live.controls["words"].value = "b"
    assert (live.said.value, live.said.layout.display) == ("", "none")
    assert live.image.value != before
    assert live.check() == "the picture follows words at b, c, d"
    live.controls["words"].options = ("b", "cat", "d")
    with pytest.raises(AssertionError, match="'words' at 'cat': 'cat' is not a word"):
        live.check()
    assert not capsys.readouterr().err  # ipywidgets prints what a callback raises


def test_a_control_under_test_is_driven_when_it_is_shown(monkeypatch):
    monkeypatch.delenv(DRIVE, raising=False)
    stuck = _live(lambda t: _draw(t % 10))  # the same picture at 0 and at 10
    assert stuck._repr_mimebundle_()[0]["image/png"]  # a reader moves it himself
    monkeypatch.setenv(DRIVE, "1")
    with pytest.raises(AssertionError, match="'t': 3 positions gave 2"):
        stuck._repr_mimebundle_()


def test_without_a_kernel_the_film_strip_stands_in():
    live = _live()
    bundle, metadata = live._repr_mimebundle_()
    assert bundle["text/plain"] == metadata["image/png"]["alt"] == "a number that follows the slider"
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert Image.open(io.BytesIO(bundle["image/png"])).width == 2 * plots.DPI
    assert repr(live) == "Live(t=2)"


def test_a_screen_shows_what_was_drawn_last():
    screen = Screen("the loss, redrawn")
    empty = screen.value
    screen.draw(plots.progress_panel([1, 2], [1.0, 0.5], torch.zeros(4, 1, 8, 8), 2, total=5))
    assert screen.value != empty
    assert screen._repr_mimebundle_()["text/plain"] == "the loss, redrawn"
    assert repr(screen) == "Screen('the loss, redrawn')"


def test_for_a_projector_pictures_have_twice_the_pixels_and_then_again_as_many(capsys):
    figure = plots.lines({"a": ([0, 1], [0, 1])}, "x", "y")
    before = Image.open(io.BytesIO(plots.png(figure))).size
    try:
        plots.projector()
        assert Image.open(io.BytesIO(plots.png(figure))).size == tuple(2 * n for n in before)
    finally:
        plots.projector(1)
    assert Image.open(io.BytesIO(plots.png(figure))).size == before
    with pytest.raises(ValueError, match="give 1, 2 or 3"):
        plots.projector(10)
