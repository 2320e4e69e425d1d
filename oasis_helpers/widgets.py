"""Live controls: a thin layer of ipywidgets around the drawing functions of :mod:`.plots`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import ipywidgets
from matplotlib.figure import Figure

from .plots import film_strip, png

DRIVE = "OASIS_DRIVE_CONTROLS"  # in the environment of a notebook under test


class Live(ipywidgets.VBox):
    """A picture that follows its controls.

    ``draw(**values)`` returns a Figure for the value of each of ``controls``, ipywidgets by
    name. ``strip`` lists the values of a few frames: they are the film strip shown where no
    kernel runs (GitHub, HTML). ``alt`` says in words what there is to see. ``play`` names an
    integer slider that gets a play button. A ValueError of ``draw`` after a control was moved, such as one
    about a word that was typed, is said below the controls, and the picture stays. Where the environment has
    ``OASIS_DRIVE_CONTROLS``, as the tests of the notebooks have, every control is moved by :meth:`check`
    before the picture is shown.
    """

    def __init__(
        self,
        draw: Callable[..., Figure],
        alt: str,
        strip: Sequence[dict],
        columns: int = 2,
        play: str | None = None,
        **controls: ipywidgets.ValueWidget,
    ):
        self.draw, self.alt, self.controls = draw, alt, controls
        self._strip, self._columns = list(strip), columns
        self._frames: dict[tuple, bytes] = {}  # a slider moved back and forth draws once
        # Inside a box an image stretches unless it is told where to stay.
        self.image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(align_self="flex-start"))
        self.said = ipywidgets.Label(layout=ipywidgets.Layout(display="none"))
        bar = list(controls.values())
        if play is not None:
            slider = controls[play]
            button = ipywidgets.Play(
                value=slider.value,  # a link in the browser hands the button's value to the slider
                min=slider.min,
                max=slider.max,
                step=max(slider.step, (slider.max - slider.min) // 40),
                interval=250,
            )
            ipywidgets.jslink((button, "value"), (slider, "value"))
            bar.append(button)
        wrapped = ipywidgets.Layout(flex_flow="row wrap")  # six controls are wider than a page
        super().__init__([ipywidgets.HBox(bar, layout=wrapped), self.said, self.image])
        self.image.value = self._frame(self.values)
        for control in controls.values():
            control.observe(self._follow, "value")

    @property
    def values(self) -> dict:
        """The value of every control, by name."""
        return {name: control.value for name, control in self.controls.items()}

    def _frame(self, values: dict) -> bytes:
        key = tuple(values.items())
        if key not in self._frames:
            if len(self._frames) > 400:
                self._frames.clear()
            self._frames[key] = png(self.draw(**values))
        return self._frames[key]

    def _follow(self, change) -> None:
        self.said.value, self.said.layout.display = "", "none"
        try:
            self.image.value = self._frame(self.values)
        except ValueError as error:
            self.said.value, self.said.layout.display = str(error), None

    def check(self) -> str:
        """Move every control to its ends and its middle; fail unless the picture follows.

        Errors of the drawing function are raised here, which a callback would swallow. The
        controls return to where they were. Returns a line that says what was seen.
        """
        seen = []
        for name, control in self.controls.items():
            before, pictures = control.value, []
            positions = _positions(control)
            for position in positions:
                control.value = position
                if self.said.value:
                    raise AssertionError(f"control {name!r} at {position!r}: {self.said.value}")
                pictures.append(self.image.value)
            control.value = before
            if len(set(pictures)) != len(positions):
                raise AssertionError(
                    f"control {name!r}: {len(positions)} positions gave "
                    f"{len(set(pictures))} different pictures."
                )
            seen.append(f"{name} at {', '.join(map(str, positions))}")
        return "the picture follows " + "; ".join(seen)

    def __repr__(self) -> str:
        return f"Live({', '.join(f'{k}={v!r}' for k, v in self.values.items())})"

    def _repr_mimebundle_(self, **kwargs):
        if os.environ.get(DRIVE):
            self.check()
        bundle = super()._repr_mimebundle_(**kwargs)
        frames = [self._frame({**self.values, **values}) for values in self._strip]
        bundle["image/png"] = film_strip(frames, self._columns)
        bundle["text/plain"] = self.alt
        return bundle, {"image/png": {"alt": self.alt}}


def _positions(control) -> list:
    if hasattr(control, "options"):
        values = [o[1] if isinstance(o, tuple) else o for o in control.options]
        return values if len(values) < 4 else [values[0], values[len(values) // 2], values[-1]]
    if isinstance(control, ipywidgets.Checkbox | ipywidgets.ToggleButton):
        return [False, True]
    middle = control.min + (control.max - control.min) // (2 * control.step) * control.step
    return [control.min, middle, control.max]


class Screen(ipywidgets.Image):
    """A picture that a running loop redraws. Where no kernel runs, only its text remains."""

    def __init__(self, alt: str):
        self.alt = alt
        super().__init__(format="png", value=png(Figure(figsize=(6.8, 2.7))))
        self.layout = ipywidgets.Layout(align_self="flex-start", max_width="100%")

    def draw(self, figure: Figure) -> None:
        """Show ``figure`` from now on."""
        self.value = png(figure)

    def __repr__(self) -> str:
        return f"Screen({self.alt!r})"

    def _repr_mimebundle_(self, **kwargs):
        return {**super()._repr_mimebundle_(**kwargs), "text/plain": self.alt}
