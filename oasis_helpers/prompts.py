"""Phrases about a slice, made from what is true of it, and the tokens that a network reads.

A small radiological grammar: what can be said is a row in ``SLOTS``. A phrase says some of it, in one of
several wordings and in any order, as people do; what it leaves unsaid, the network may choose. The training
of Stable Diffusion takes such pairs of image and text from the web (Schuhmann et al. 2022, arXiv 2210.08402);
here the causes of the phantoms are known, so that every word is true.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .intake.phantoms import PhantomFactors

LENGTH = 32  # words of a prompt that the network reads


@dataclass(frozen=True)
class Slot:
    """Something that can be said of a slice, which is one number in truth.

    ``words``: what the number may be called, and from where to where. Between two words lies a gap in which
    none is said: there two readers would not agree. ``numbers``: those that can be said, each the nearest to
    the truth, with so many ``digits``. ``wordings`` have one place, for a word, or for a number in those that
    begin with "#".
    """

    name: str
    words: dict[str, tuple[float, float]]
    wordings: tuple[str, ...]
    numbers: tuple[float, ...] = ()
    digits: int = 0

    def said(self, truth: float) -> list[str]:
        """Every way to say it, none where it is not known (NaN) or no word fits."""
        found = [word for word, (low, high) in self.words.items() if low <= truth <= high]
        ways = [w.format(word) for w in self.wordings if w[0] != "#" for word in found]
        if self.numbers and self.numbers[0] - self.step / 2 <= truth <= self.numbers[-1] + self.step / 2:
            nearest = min(self.numbers, key=lambda n: abs(n - truth))
            ways += [w[1:].format(self.written(nearest)) for w in self.wordings if w[0] == "#"]
        return ways

    @property
    def step(self) -> float:
        """Between two numbers that can be said."""
        return self.numbers[1] - self.numbers[0]

    def written(self, number: float) -> str:
        """A number as it is written in phrases."""
        return f"{number:.{self.digits}f}"


# What is true of a slice, in this order: height above the plane under the lowest slice in mm, atrophy from 0
# to 1, volumes of the ventricles and of the brain with its CSF in ml (over the 32 slices), thickness of scalp
# and skull in mm.
SLOTS = (
    Slot(
        "height",
        {
            "basal ganglia": (1, 6), "thalamus": (10, 15), "lateral ventricles": (19, 24),
            "centrum semiovale": (28, 32),
        },
        ("at the level of the {}", "level of the {}", "{}", "#at {} mm", "#height {} mm"),
        numbers=tuple(range(1, 33)),
    ),
    Slot(
        "atrophy",
        {"no": (0, 0.12), "mild": (0.24, 0.36), "moderate": (0.48, 0.6), "marked": (0.72, 1)},
        ("{} atrophy", "#atrophy {}", "#atrophy of {}"),
        numbers=tuple(round(0.1 * n, 1) for n in range(11)),
        digits=1,
    ),
    Slot(
        "ventricles",
        {"small": (0, 25), "large": (38, 200)},
        ("{} ventricles", "#ventricles {} ml", "#ventricles of {} ml"),
        numbers=tuple(range(15, 85, 5)),
    ),
    Slot("head", {"small": (0, 558), "large": (582, 2000)}, ("{} head", "{} brain")),
    Slot("scalp", {"thin": (0, 5.1), "thick": (5.7, 20)}, ("{} scalp",)),
    Slot("skull", {"thin": (0, 4.6), "thick": (5.4, 20)}, ("{} skull",)),
)  # fmt: skip
OPENERS = ("axial slice", "slice", "axial slice of a head", "axial image", "image")
_JOINS = ("with", "and")


def truths(factors: dict[int, PhantomFactors], case: Tensor, plane: Tensor) -> Tensor:
    """What is true of slices ``plane`` of heads ``case``, both (N,): a row in the order of ``SLOTS``, (N, 6).

    ``factors`` as from :func:`~oasis_helpers.data.load_factors`, of whole heads, whose volumes are over all
    slices. Raises ``ValueError`` for a case that has none.
    """
    rows = []
    for number, index in zip(case.tolist(), plane.tolist()):
        if number not in factors:
            raise ValueError(f"phantoms.csv says nothing of case {number}: make the phantoms again.")
        of = factors[number]
        brain = of.csf_mm3 + of.grey_mm3 + of.white_mm3
        rows.append((index + 1, of.atrophy, of.ventricle_mm3 / 1000, brain / 1000, of.scalp, of.skull))
    return torch.tensor(rows)


def phrases(known: Tensor, drawn: torch.Generator) -> list[str]:
    """A true phrase for each row of :func:`truths`, (B, 6), NaN where nothing is known.

    How much is said, in which order and in which words is drawn from ``drawn`` alone.
    """
    count = len(SLOTS)
    random = torch.rand((len(known), 3 + 3 * count), generator=drawn).tolist()
    return [_phrase(row, iter(numbers)) for row, numbers in zip(known.tolist(), random)]


@cache  # a training run asks for the same heads over and over
def _ways(slot: int, truth: float) -> list[str]:
    return SLOTS[slot].said(truth)


def _phrase(row: Sequence[float], random) -> str:
    talkative, opener, join = next(random) ** 0.5, next(random), next(random)
    said = []
    for slot, truth in enumerate(row):
        chance, which, place = next(random), next(random), next(random)
        ways = _ways(slot, truth)
        if ways and chance < talkative:
            said.append((place, ways[int(which * len(ways))]))
    parts = [part for _, part in sorted(said)]
    start = OPENERS[int(opener * len(OPENERS))]
    if not parts:
        return start
    first = (f"{start}, ", f"{start} with ", "")[int(join * 3)]
    *most, last = parts
    if not most:
        return first + last
    return first + ", ".join(most) + (", and " if join > 0.9 else ", ") + last


# ---- the tokenizer -------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """The words and numbers of a text, in small letters; commas and the like are nothing."""
    return re.findall(r"[^\W\d_]+|-?\d+(?:\.\d+)?", text.lower())


def _vocabulary() -> tuple[str, ...]:
    said = [*OPENERS, *_JOINS]
    for slot in SLOTS:
        said += [w.lstrip("#").format(word) for w in slot.wordings for word in (*slot.words, "")]
        said += [slot.written(number) for number in slot.numbers]
    return tuple(sorted({word for text in said for word in words_of(text)}))


VOCABULARY = _vocabulary()
_FILLERS = {word for text in (*OPENERS, *_JOINS) for word in words_of(text)}


def read(text: str) -> dict[str, str]:
    """What a prompt says: name of the slot → word or number, as written.

    Raises ``ValueError`` for an empty prompt, a word that is unknown or fits nothing, a number that cannot be
    said, something said twice, and more than ``LENGTH`` words.
    """
    words = words_of(text)
    if not words:
        raise ValueError(
            f"the prompt is empty: say something, such as '{OPENERS[0]}, moderate atrophy', or leave it out "
            "for any head."
        )
    if len(words) > LENGTH:
        raise ValueError(f"the prompt has {len(words)} words: this network reads {LENGTH}.")
    for word in words:
        if word not in VOCABULARY and not word.lstrip("-")[0].isdecimal():
            near = difflib.get_close_matches(word, VOCABULARY, 3, 0.5)
            known = f"the nearest known are {_either(near)}." if near else _say()
            raise ValueError(f"the word {word!r} is unknown: {known}")
    left, found = " ".join(words), {}
    for slot in SLOTS:
        left, said = _taken(slot, left)
        if len(said) > 1:
            raise ValueError(f"the prompt says {slot.name} twice ({', '.join(said)}): say it once.")
        if said:
            found[slot.name] = said[0]
    if odd := [word for word in left.split() if word not in _FILLERS]:
        raise ValueError(f"{odd[0]!r} fits nothing here: {_say()}")
    return found


def _taken(slot: Slot, text: str) -> tuple[str, list[str]]:
    """The text without what it says of ``slot``, and what that is."""
    said = []
    for wording in sorted(slot.wordings, key=len, reverse=True):  # "level of the {}" before "{}"
        number = wording[0] == "#"
        what = r"(-?\d+(?:\.\d+)?)" if number else f"({'|'.join(slot.words)})"
        pattern = rf"\b{wording.lstrip('#').format(what)}\b"
        for value in re.findall(pattern, text):
            if number and value not in map(slot.written, slot.numbers):
                low, high = (slot.written(n) for n in (slot.numbers[0], slot.numbers[-1]))
                near = sorted(slot.numbers, key=lambda n: abs(n - float(value)))[:2]
                raise ValueError(
                    f"{slot.name} {value} cannot be said: the grammar has {low} to {high}; the nearest are "
                    f"{_either([slot.written(n) for n in sorted(near)])}."
                )
            said.append(value)
        text = re.sub(pattern, " ", text)
    return text, said


def _either(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(map(repr, words[:-1])), repr(words[-1]))))


def _say() -> str:
    """What can be said, in one line."""
    ways = []
    for slot in SLOTS:
        ways += [wording.format("/".join(slot.words)) for wording in slot.wordings if wording[0] != "#"][:1]
        ways += [w[1:].format(slot.written(slot.numbers[3])) for w in slot.wordings if w[0] == "#"][:1]
    return f"say such as {', '.join(ways)}."


def tokenize(texts: str | Sequence[str]) -> Tensor:
    """The places of a prompt's words in ``VOCABULARY``, long (B, LENGTH), −1 behind its end.

    Raises ``ValueError`` as :func:`read`.
    """
    texts = [texts] if isinstance(texts, str) else texts
    for text in texts:
        read(text)
    return tokens(texts)


def tokens(texts: Sequence[str]) -> Tensor:
    """:func:`tokenize` for phrases of :func:`phrases`, which need no check."""
    rows = [[_PLACES[word] for word in words_of(text)] for text in texts]
    return torch.tensor([row + [-1] * (LENGTH - len(row)) for row in rows])


_PLACES = {word: place for place, word in enumerate(VOCABULARY)}
