"""Exercises that answer back: what is checked, what the check says of typical mistakes, and how it is solved.

A notebook holds the text of an exercise and its stub; ``nb01.py`` … hold what must not stand beside it: the
check, hints, a solution, and wrong answers with the message that each must get. The editions of the course
are made from both, and the tests hold that solutions pass and that mistakes are told apart.
"""

from __future__ import annotations

import inspect
import json
import os
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import platformdirs
import torch
from matplotlib.figure import Figure

from ..widgets import DRIVE

KINDS = ("line", "function", "experiment", "open", "diagnosis")
NOTEBOOKS = ("01", "02", "03", "04", "05", "05b", "06", "07", "08", "10")


class Wrong(Exception):
    """An answer that is not right; its text tells the learner what was seen and what to think of."""


class Unfilled(Exception):
    """An answer that is still the stub."""


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    ``key`` is "2.1" for the first of notebook 2; ``kind`` one of :data:`KINDS`: "diagnosis" asks for a
    fault's name; ``minutes`` what it takes. ``diagnose(*answer)`` returns a sentence on a right answer and
    raises :class:`Wrong` otherwise. ``solution`` is a function of the stub's name, ``prediction`` the right
    one where the stub asks for one first, and ``alternatives`` the others that it offers. ``wrong`` are
    answers as ``diagnose`` takes them, each with a part of the message that it must get.
    ``picture(*answer)`` draws what a right answer gives.
    """

    key: str
    title: str
    kind: str
    minutes: int
    hints: Sequence[str]
    diagnose: Callable[..., str]
    solution: Callable
    wrong: Sequence[tuple[tuple, str]]
    prediction: str | None = None
    alternatives: Sequence[str] = ()
    picture: Callable[..., Figure] | None = None

    @property
    def answer(self) -> tuple:
        """The right answer, as :meth:`check` takes it."""
        return (self.solution,) if self.prediction is None else (self.prediction, self.solution)

    def check(self, *answer) -> None:
        """Say whether an answer is right and, if not, what to think of. Never raises: "run all" goes on."""
        try:
            if any(part is None or part is Ellipsis for part in answer):
                raise Unfilled
            if self.prediction is not None and answer[0] not in (self.prediction, *self.alternatives):
                offered = ", ".join(map(repr, sorted((self.prediction, *self.alternatives))))
                raise Wrong(f"the prediction is {answer[0]!r}: write down one of {offered}.")
            said = self.diagnose(*(_seen(part) if callable(part) else part for part in answer))
        except Unfilled:
            asked = "write down what you expect, then fill in" if self.prediction else "fill in"
            print(f"{self.key} waits for you, {self.minutes} min: {asked} the dots and run the cell again.")
            print(f"Hint 1 of {len(self.hints)}: {self.hints[0]} More by exercise({self.key!r}).hint(2).")
        except Wrong as wrong:
            print(f"✗ {self.key}: {wrong}")
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            print(f"✗ {self.key}: {type(error).__name__} in {last.name}(): {error}")
        else:
            print(f"✓ {self.key}: {said}")
            _record(self.key)

    def hint(self, number: int = 1) -> None:
        """Print a hint, the first or a later one, which tells more. ValueError for one that there is not."""
        if not 1 <= number <= len(self.hints):
            raise ValueError(f"hint {number}: {self.key} has hints 1 to {len(self.hints)}.")
        print(f"Hint {number} of {len(self.hints)}: {self.hints[number - 1]}")

    @property
    def source(self) -> str:
        """The solution's code."""
        return textwrap.dedent(inspect.getsource(self.solution)).rstrip()

    def show_solution(self) -> None:
        """Print the worked solution, and show the picture that it gives."""
        if self.prediction is not None:
            print(f"prediction = {self.prediction!r}\n")
        print(self.source)
        self.expected()

    def expected(self) -> None:
        """Show the picture that a right answer gives, if there is one."""
        if self.picture is not None:
            from .. import plots

            plots.show(
                self.picture(*self.answer), alt=f"what a right answer to {self.key} gives: {self.title}"
            )


def _seen(function: Callable) -> Callable:
    """``function`` with a stub's answers, ``...`` and None, told apart from wrong ones."""

    def call(*args, **kwargs):
        try:
            found = function(*args, **kwargs)
        except NotImplementedError:
            raise Unfilled from None
        if found is None or found is Ellipsis:
            raise Unfilled
        return found

    return call


def compare(found, wanted, what: str, mistakes: Mapping[str, object] = {}, tolerance: float = 1e-4) -> None:
    """Raise :class:`Wrong` unless ``found`` is ``wanted``, numbers or tensors of one shape.

    ``mistakes``: message → the value that this mistake gives; the first that fits is what the learner reads.
    ``tolerance`` is relative to the largest absolute value of ``wanted``.
    """
    try:
        found, wanted = (torch.as_tensor(value, dtype=torch.double) for value in (found, wanted))
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"{what} is a {type(found).__name__}: a number or a tensor is wanted.") from None
    if found.shape != wanted.shape:
        raise Wrong(f"{what} has the shape {tuple(found.shape)}: {tuple(wanted.shape)} is wanted.")
    near = tolerance * max(float(wanted.abs().max()), 1e-12)
    if torch.allclose(found, wanted, rtol=0, atol=near):
        return
    for message, value in mistakes.items():
        value = torch.as_tensor(value, dtype=torch.double)
        if value.shape == found.shape and torch.allclose(found, value, rtol=1e-4, atol=near, equal_nan=True):
            raise Wrong(message)
    place = (found - wanted).abs().nan_to_num(torch.inf).argmax()
    at = f" at place {place.item()}" if wanted.numel() > 1 else ""
    raise Wrong(f"{what} is {found.flatten()[place]:.4g}{at} where {wanted.flatten()[place]:.4g} is right.")


# ---- which there are, and which are done --------------------------------------------------------


@cache
def _of(number: str) -> dict[str, Exercise]:
    """The exercises of one notebook: the others' modules, which import more, are left alone."""
    if not (Path(__file__).parent / f"nb{number}.py").exists():
        return {}
    return {one.key: one for one in import_module(f"{__name__}.nb{number}").EXERCISES}


@cache
def exercises() -> dict[str, Exercise]:
    """All exercises by key, in the order of the notebooks."""
    return {key: one for number in NOTEBOOKS for key, one in _of(number).items()}


def exercise(key: str) -> Exercise:
    """The exercise with this key. ValueError, with the keys of its notebook, if there is none."""
    of = [number for number in NOTEBOOKS if number.lstrip("0") == key.split(".")[0]]
    known = _of(of[0]) if of else exercises()
    if key not in known:
        raise ValueError(f"there is no exercise {key!r}: there are {', '.join(known or exercises())}.")
    return known[key]


def progress_file() -> Path:
    """Where it is kept which exercises passed."""
    return Path(platformdirs.user_data_path("oasis_helpers")) / "progress.json"


def passed() -> set[str]:
    """Keys of the exercises that passed on this computer."""
    try:
        return set(json.loads(progress_file().read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):  # none yet, or damaged: then it begins anew
        return set()


def _record(key: str) -> None:
    if os.environ.get(DRIVE):  # under test nobody learns
        return
    path = progress_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(sorted(passed() | {key})), encoding="utf-8")
