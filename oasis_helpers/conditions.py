"""What a network can be told besides the timestep: a label, a number, a sequence of tokens.

Each condition is a description (``Label(2)``) that builds its embedding for a network's width. Every one has
a "nothing", a value like any other with an embedding that is learned: a network that sometimes gets it in
training is conditional and unconditional in one (Ho & Salimans 2022, arXiv 2207.12598). A batch can mix rows
with and without a condition. What is known of a data set comes from its table: :func:`load_conditioned`.

Sources: class embedding, Dhariwal & Nichol 2021 (arXiv 2105.05233); sinusoids of a number and the encoder
that reads the tokens, Vaswani et al. 2017 (arXiv 1706.03762); tokens for cross-attention, Rombach et al. 2022
(arXiv 2112.10752).
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .data import load_factors, read_slices
from .intake.subjects import RATINGS
from .layout import PLANES, DataLocation
from .unet import timestep_embedding

# The range of a factor, in radians of the fastest of its waves: five periods. The thousand of the timesteps
# would tell 0.431 from 0.432, so that a network could learn a case by heart by its number, and would know
# nothing of the numbers between.
_WAVES = 30.0


class _LabelEmbedding(nn.Module):
    gives_tokens = False

    def __init__(self, label: Label, width: int):
        super().__init__()
        self.condition = label
        self.table = nn.Embedding(label.classes + 1, width)  # the last row is "nothing"

    def forward(self, values: Tensor) -> Tensor:
        return self.table(torch.where(values < 0, self.condition.classes, values))


class _FactorEmbedding(nn.Module):
    gives_tokens = False

    def __init__(self, factor: Factor, width: int):
        super().__init__()
        self.condition = factor
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.learned_nothing = nn.Parameter(torch.zeros(width))

    def forward(self, values: Tensor) -> Tensor:
        low, high = self.condition.low, self.condition.high
        place = (values.nan_to_num(low) - low) / (high - low)
        sinusoids = timestep_embedding(_WAVES * place, self.mlp[0].in_features)
        return torch.where(values.isnan()[:, None], self.learned_nothing, self.mlp(sinusoids))


class _TokensEmbedding(nn.Module):
    gives_tokens = True

    def __init__(self, tokens: Tokens, width: int):
        super().__init__()
        self.condition = tokens
        self.table = nn.Embedding(tokens.vocabulary + 1, width)  # the last row is "nothing"
        # As large as words: beside those, places of 0.02 stay unlearned, and a phrase is a bag of words.
        self.places = nn.Parameter(torch.randn(tokens.length, width))
        heads = width // 32 if width % 32 == 0 else 1
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, tokens.layers, enable_nested_tensor=False)

    def forward(self, values: Tensor) -> Tensor:
        values = torch.where(values < 0, self.condition.vocabulary, values)
        return self.encoder(self.table(values) + self.places)


@dataclass(frozen=True)
class Label:
    """One of ``classes`` kinds: values are (B,) integers 0 … classes − 1, or −1 for nothing."""

    classes: int
    kind: ClassVar[str] = "label"

    def nothing(self, count: int) -> Tensor:
        """``count`` times no label."""
        return torch.full((count,), -1)

    def check(self, name: str, values: Tensor) -> None:
        """Raise ``ValueError``, which names ``name``, for values that this condition does not have."""
        _check_integers(name, values, (), self.classes)

    def embedding(self, width: int) -> nn.Module:
        """The module (B,) → (B, width)."""
        return _LabelEmbedding(self, width)


@dataclass(frozen=True)
class Factor:
    """A number from ``low`` to ``high``: values are floats (B,), or NaN for nothing."""

    low: float = 0.0
    high: float = 1.0
    kind: ClassVar[str] = "factor"

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(f"a factor from {self.low} to {self.high} has no range: low must be below high.")

    def nothing(self, count: int) -> Tensor:
        """``count`` times no number."""
        return torch.full((count,), float("nan"))

    def check(self, name: str, values: Tensor) -> None:
        """Raise ``ValueError``, which names ``name``, for values that this condition does not have."""
        if values.ndim != 1 or not values.is_floating_point():
            raise ValueError(f"{name} is {values.dtype} of shape {tuple(values.shape)}: give floats (B,).")
        known = values[~values.isnan()]
        if known.numel() and not (self.low <= float(known.min()) and float(known.max()) <= self.high):
            raise ValueError(
                f"{name} runs from {float(known.min()):g} to {float(known.max()):g}: "
                f"this network knows {self.low:g} to {self.high:g}."
            )

    def embedding(self, width: int) -> nn.Module:
        """The module (B,) → (B, width)."""
        return _FactorEmbedding(self, width)


@dataclass(frozen=True)
class Tokens:
    """A sequence: values are (B, length) integers 0 … vocabulary − 1, with −1 where there is nothing.

    ``layers`` of a transformer's encoder read it before the pixels ask it.
    """

    vocabulary: int
    length: int
    layers: int = 2
    kind: ClassVar[str] = "tokens"

    def nothing(self, count: int) -> Tensor:
        """``count`` empty sequences."""
        return torch.full((count, self.length), -1)

    def check(self, name: str, values: Tensor) -> None:
        """Raise ``ValueError``, which names ``name``, for values that this condition does not have."""
        _check_integers(name, values, (self.length,), self.vocabulary)

    def embedding(self, width: int) -> nn.Module:
        """The module (B, length) → (B, length, width)."""
        return _TokensEmbedding(self, width)


Condition = Label | Factor | Tokens


def _check_integers(name: str, values: Tensor, shape: tuple[int, ...], count: int) -> None:
    if values.is_floating_point() or tuple(values.shape[1:]) != shape or values.ndim < 1:
        wanted = ", ".join(map(str, ("B", *shape)))
        raise ValueError(
            f"{name} is {values.dtype} of shape {tuple(values.shape)}: give integers ({wanted})."
        )
    if values.numel() and (int(values.min()) < -1 or int(values.max()) >= count):
        raise ValueError(
            f"{name} runs from {int(values.min())} to {int(values.max())}: "
            f"this network knows 0 … {count - 1}, and −1 for nothing."
        )


def without(conditions: dict[str, Condition], y: dict[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
    """``y`` with nothing in place of every condition in the rows where ``dropped`` (B,) is True."""
    found = {}
    for name, values in y.items():
        rows = dropped.reshape(-1, *[1] * (values.ndim - 1))
        found[name] = torch.where(rows, conditions[name].nothing(len(values)).to(values), values)
    return found


def to_json(conditions: dict[str, Condition]) -> dict[str, dict]:
    """The descriptions as what JSON can hold; :func:`from_json` is the way back."""
    return {name: {"kind": c.kind, **asdict(c)} for name, c in conditions.items()}


def from_json(stored: dict[str, dict]) -> dict[str, Condition]:
    """Conditions of :func:`to_json`; ``ValueError`` for a kind that this version does not have."""
    kinds = {c.kind: c for c in (Label, Factor, Tokens)}
    found = {}
    for name, settings in stored.items():
        settings = dict(settings)
        kind = settings.pop("kind", None)
        if kind not in kinds:
            raise ValueError(f"the condition {name!r} is of kind {kind!r}: update oasis_helpers.")
        found[name] = kinds[kind](**settings)
    return found


# ---- what is known of a data set ----------------------------------------------------------------

HEADS = ("small", "medium", "large")  # a third of all phantoms each
_HEAD_BOUNDS = (0.9755, 0.9885)  # of head_scale
SEXES = ("F", "M")

# By name: the condition, and its value for a case and plane, or None where it is not known. The second table
# is that of people; ages are those of OASIS 1 to 3.
_Known = dict[str, tuple[Condition, Callable[[Any, int], float | None]]]
_HEIGHT = (Factor(0, PLANES - 1), lambda case, plane: plane)  # mm above the lowest plane
_OF_PHANTOMS: _Known = {
    "height": _HEIGHT,
    "atrophy": (Factor(0, 1), lambda case, plane: case.atrophy),
    "head": (Label(len(HEADS)), lambda case, plane: bisect(_HEAD_BOUNDS, case.head_scale)),
}
_OF_PEOPLE: _Known = {
    "height": _HEIGHT,
    "age": (Factor(18, 98), lambda case, plane: case.age),
    "sex": (Label(len(SEXES)), lambda case, plane: None if case.sex is None else SEXES.index(case.sex)),
    "cdr": (Label(len(RATINGS)), lambda case, plane: None if case.cdr is None else RATINGS.index(case.cdr)),
}
PHANTOM_CONDITIONS = {name: condition for name, (condition, _) in _OF_PHANTOMS.items()}


@dataclass(frozen=True)
class ConditionedSlices:
    """Slices with what is known of each: data for :func:`~oasis_helpers.training.train`.

    ``images`` uint8 (N, 1, H, W), 0–255; ``y``: values by name, (N, …), nothing where it is not known;
    ``conditions``: what they are, by the same names. An index takes rows of both: (images, y).
    """

    images: Tensor
    y: dict[str, Tensor]
    conditions: dict[str, Condition]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.images[rows], {name: values[rows] for name, values in self.y.items()}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of it, from which the fingerprint is made."""
        return self.images, *self.y.values()


def load_conditioned(location: DataLocation, image_size: int, split: str = "train") -> ConditionedSlices:
    """The slices of a split in memory with what the data set's table says of each.

    Of phantoms "height" (0–31, mm above the lowest plane), "atrophy" (0–1) and "head" (0 small, 1 medium,
    2 large); of people "height", "age" (years), "sex" (0 F, 1 M) and "cdr" (the place of the rating in 0,
    0.5, 1, 2, 3). A case that is not in the table has its height alone. Raises ``ValueError`` for a data set
    without a table, for a table of other cases and for a value outside its range, and as
    :func:`~oasis_helpers.data.load_slices`.
    """
    known, table = (
        (_OF_PHANTOMS, "phantoms.csv") if location.kind == "phantoms" else (_OF_PEOPLE, "subjects.csv")
    )
    factors = load_factors(location)
    if factors is None:
        raise ValueError(
            f"{location.root} has no {table}, so nothing is known of its cases. Convert OASIS with "
            "--subjects TABLE.csv, make phantoms, or train a profile without conditions."
        )
    slices = read_slices(location.folder(split), image_size)
    rows = [(factors.get(case), plane) for case, plane in zip(slices.case.tolist(), slices.plane.tolist())]
    if not any(case for case, _ in rows):
        raise ValueError(
            f"{location.root / table} says nothing of case {int(slices.case[0])} or any other that is here: "
            "it belongs to other data."
        )
    y = {}
    for name, (condition, of) in known.items():
        found = [None if case is None and name != "height" else of(case, plane) for case, plane in rows]
        y[name] = condition.nothing(len(rows))
        there = torch.tensor([value is not None for value in found])
        y[name][there] = torch.tensor([v for v in found if v is not None]).to(y[name])
        condition.check(name, y[name])
    return ConditionedSlices(slices.images, y, {name: condition for name, (condition, _) in known.items()})
