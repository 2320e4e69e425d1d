"""What a network can be told besides the timestep: a label, a number, a sequence of tokens.

Each condition is a description (``Label(2)``) that builds its embedding for a network's width. Every one has
a "nothing", a value like any other with an embedding that is learned: a network that sometimes gets it in
training is conditional and unconditional in one (Ho & Salimans 2022, arXiv 2207.12598). A batch can mix rows
with and without a condition.

Sources: class embedding, Dhariwal & Nichol 2021 (arXiv 2105.05233); sinusoids of a number and the encoder
that reads the tokens, Vaswani et al. 2017 (arXiv 1706.03762); tokens for cross-attention, Rombach et al. 2022
(arXiv 2112.10752).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .unet import timestep_embedding


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
        # spread over the range of timesteps, for which the frequencies were made
        sinusoids = timestep_embedding(
            1000 * (values.nan_to_num(low) - low) / (high - low), self.mlp[0].in_features
        )
        return torch.where(values.isnan()[:, None], self.learned_nothing, self.mlp(sinusoids))


class _TokensEmbedding(nn.Module):
    gives_tokens = True

    def __init__(self, tokens: Tokens, width: int):
        super().__init__()
        self.condition = tokens
        self.table = nn.Embedding(tokens.vocabulary + 1, width)  # the last row is "nothing"
        self.places = nn.Parameter(0.02 * torch.randn(tokens.length, width))
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
