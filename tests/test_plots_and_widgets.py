import io

import ipywidgets
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from oasis_helpers import plots
from oasis_helpers.diffusion import NoiseSchedule
from oasis_helpers.sampling import SampleState
from oasis_helpers.widgets import Live, Screen


def _pixels(figure):
    return np.asarray(Image.open(io.BytesIO(plots.png(figure))).convert("RGB")).astype(int)


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


def test_other_figures_show_their_data():
    assert (
        _pixels(plots.lines({"a": ([0, 1], [0, 1])}, "x", "y"))
        != _pixels(plots.lines({"a": ([0, 1], [1, 0])}, "x", "y"))
    ).any()
    assert (
        _pixels(
            plots.lines({"a": ([1, 2], [1, 2]), "b": ([1, 2], [2, 1])}, "x", "y", logx=True, logy=True)
        ).std()
        > 0
    )
    assert (
        _pixels(plots.bars({"a": 1.0, "b": 2.0}, "y")) != _pixels(plots.bars({"a": 2.0, "b": 2.0}, "y"))
    ).any()
    assert _pixels(plots.histograms({"a": np.zeros(5), "b": np.ones(5)}, "x")).std() > 0
    assert (
        _pixels(plots.scatter([0, 1], [0, 1], "x", "y")) != _pixels(plots.scatter([0, 1], [1, 0], "x", "y"))
    ).any()
    ramp = np.arange(12.0).reshape(3, 4)
    assert (_pixels(plots.heatmap(ramp, "x", "y")) != _pixels(plots.heatmap(ramp[::-1], "x", "y"))).any()
    assert len(plots.heatmap({"a": ramp, "b": -ramp}, "x", "y").axes) == 3
    groups = {"loss": {"L2": [1.0, 2.0], "L1": [2.0, 3.0]}, "T": {"10": [1.0]}}
    (axis,) = plots.intervals(groups, "x", reference=1.5, logx=True).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["loss:  L2", "L1", "T:  10"]
    assert len(axis.containers) == 3
    image, mask = torch.zeros(1, 8, 8), torch.tensor([[0, 1, 2, 3]] * 4).repeat(2, 2)
    assert (_pixels(plots.slice_panel(image, mask)) != _pixels(plots.slice_panel(image, mask.flip(1)))).any()
    assert _pixels(plots.slice_panel(image, title="a")).shape != _pixels(plots.slice_panel(image, mask)).shape
    few = plots.grid([image] * 5, columns=4, titles=["a"] * 5, title="all")
    assert len(few.axes) == 8
    state = SampleState(3, -1, torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8))
    assert "not for diagnosis" in plots.step_panel(state, 10).get_suptitle()


def test_show_carries_its_text(monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "display", lambda *a, **k: shown.append((a, k)))
    plots.show(plots.bars({"a": 1.0}, "y"), "one bar")
    (data,), settings = shown[0]
    assert data["text/plain"] == "one bar"
    assert settings["metadata"]["image/png"]["alt"] == "one bar"
    assert data["image/png"].startswith(b"\x89PNG")


def test_film_strip_holds_every_frame():
    frames = [plots.png(plots.bars({"a": float(v)}, "y"), dpi=20) for v in (1, 2, 3)]
    width, height = Image.open(io.BytesIO(frames[0])).size
    assert Image.open(io.BytesIO(plots.film_strip(frames, 2))).size == (2 * width, 2 * height)


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


def test_without_a_kernel_the_film_strip_stands_in():
    live = _live()
    bundle, metadata = live._repr_mimebundle_()
    assert bundle["text/plain"] == metadata["image/png"]["alt"] == "a number that follows the slider"
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert Image.open(io.BytesIO(bundle["image/png"])).width == 160
    assert repr(live) == "Live(t=2)"


def test_a_screen_shows_what_was_drawn_last():
    screen = Screen("the loss, redrawn")
    empty = screen.value
    screen.draw(plots.progress_panel([1, 2], [1.0, 0.5], torch.zeros(4, 1, 8, 8), 2, total=5))
    assert screen.value != empty
    assert screen._repr_mimebundle_()["text/plain"] == "the loss, redrawn"
    assert repr(screen) == "Screen('the loss, redrawn')"
