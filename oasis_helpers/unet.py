"""The U-Net that looks at a noisy slice and a timestep, and says what the noise is.

Sources: U-Net, Ronneberger et al. 2015 (arXiv 1505.04597); its use for diffusion with time
embedding and attention, Ho et al. 2020 (arXiv 2006.11239, appendix B); scale-and-shift time
conditioning, Dhariwal & Nichol 2021 (arXiv 2105.05233); sinusoidal embedding, Vaswani et al.
2017 (arXiv 1706.03762, section 3.5); space-to-depth, Shi et al. 2016 (arXiv 1609.05158).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from .conditions import Condition


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sines and cosines of t at ``dim / 2`` geometrically spaced frequencies, (B, dim) float32.

    ``t``: (B,) timesteps; ``dim``: even. Vaswani et al. 2017, section 3.5, with all sines
    first. Raises ``ValueError`` for an odd ``dim``.
    """
    if dim % 2:
        raise ValueError(f"dim is {dim}: the embedding has as many sines as cosines, so give an even number.")
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


def _zero(layer: nn.Module) -> nn.Module:
    """The layer with all its weights at zero: its block then starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


# All blocks are called alike, block(x, emb, context), and take of it what they need: emb (B, emb_dim) is
# the embedding of the timestep and of conditions that are one vector, context (B, L, emb_dim) holds tokens.


class ResBlock(nn.Module):
    """Two 3×3 convolutions around a time-dependent scale and shift, plus a shortcut.

    ``forward(x, emb)``: (B, in_channels, H, W) and (B, emb_dim) → (B, out_channels, H, W).
    """

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int):
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_dim, 2 * out_channels)
        self.norm2 = _norm(out_channels)
        # not started at zero, as many do: so shallow a network gains nothing, and learns more slowly at first
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        )

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(h))


def _attention(q: Tensor, k: Tensor, v: Tensor, head_channels: int) -> Tensor:
    """Every row of q, (B, N, C), asks k and v, (B, M, C), in heads of ``head_channels`` → (B, C, N)."""
    q, k, v = (rows.unflatten(2, (-1, head_channels)).transpose(1, 2) for rows in (q, k, v))
    if q.device.type == "cpu":  # whose bf16 kernel takes several times as long backwards as the fp32 one
        with torch.autocast("cpu", enabled=False):
            attended = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    else:
        attended = F.scaled_dot_product_attention(q, k, v)
    return attended.transpose(2, 3).flatten(1, 2)


class AttentionBlock(nn.Module):
    """Self-attention over all pixels of a feature map, plus a shortcut: (B, C, H, W) → same.

    Heads have ``head_channels`` channels each (or all C if that does not divide C). Vaswani et
    al. 2017, eq. 1, with every pixel a token; the output projection starts at zero.
    """

    def __init__(self, channels: int, head_channels: int = 32):
        super().__init__()
        self.head_channels = head_channels if channels % head_channels == 0 else channels
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        attended = _attention(q, k, v, self.head_channels)
        return x + self.out(attended.reshape(x.shape))


class CrossAttentionBlock(nn.Module):
    """Every pixel asks the tokens of a condition, plus a shortcut: (B, C, H, W), (B, L, D) → (B, C, H, W).

    Vaswani et al. 2017, eq. 1, with the pixels as queries and the tokens as keys and values, as in latent
    diffusion, Rombach et al. 2022 (arXiv 2112.10752), section 3.3; the output projection starts at zero.
    """

    def __init__(self, channels: int, context_dim: int, head_channels: int = 32):
        super().__init__()
        self.head_channels = head_channels if channels % head_channels == 0 else channels
        self.norm, self.norm_context = _norm(channels), nn.LayerNorm(context_dim)
        self.q = nn.Conv2d(channels, channels, 1)
        self.kv = nn.Linear(context_dim, 2 * channels)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, emb: Tensor | None, context: Tensor) -> Tensor:
        q = self.q(self.norm(x)).flatten(2).transpose(1, 2)
        k, v = self.kv(self.norm_context(context)).chunk(2, dim=2)
        attended = _attention(q, k, v, self.head_channels)
        return x + self.out(attended.reshape(x.shape))


class Downsample(nn.Module):
    """Half the height and width with a strided 3×3 convolution: (B, C, H, W) → (B, C, H/2, W/2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the height and width: nearest neighbour, then a 3×3 convolution.

    A transposed convolution would leave a checkerboard (Odena et al. 2016).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Stage(nn.Module):
    """A residual block, behind it attention where the level has it, and cross-attention to tokens."""

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int, attention: bool, tokens: bool):
        super().__init__()
        self.res = ResBlock(in_channels, out_channels, emb_dim)
        self.attention = AttentionBlock(out_channels) if attention else None
        self.cross = CrossAttentionBlock(out_channels, emb_dim) if attention and tokens else None

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        for block in (self.res, self.attention, self.cross):
            x = x if block is None else block(x, emb, context)
        return x


class UNet(nn.Module):
    """Down to a few pixels with many channels, back up, with skip connections across.

    Settings
        ``in_channels``: of the image, 1 for MRI; ``out_channels``: None for as many, or another
        number for another task, such as a score a class. ``base_channels``: at the top level.
        ``channel_mult``: one factor per level, so its length is the depth.
        ``num_res_blocks``: per level on the way down (one more on the way up).
        ``attention_levels``: indices into ``channel_mult`` that get self-attention.
        ``patch_size``: 1, or p to fold p×p pixels into channels before the first
        convolution (space-to-depth) and out again at the end: p² times less work.
        ``conditions``: by name, what the network is told besides the timestep, as in
        :mod:`~oasis_helpers.conditions`; a vector is added to the timestep's embedding, tokens are
        asked by cross-attention where there is self-attention.

    ``forward(x, t, y=None)``: x (B, in_channels, H, W) in about [−1, 1], t (B,) integer
    timesteps, y the values of the conditions by name → (B, out_channels, H, W). A condition that is not in
    y is "nothing", which the network has learned too. Height and width must divide by
    ``patch_size · 2^(levels − 1)``. The last convolution starts at zero: a fresh network
    outputs zeros. Raises ``ValueError`` for a size that does not divide, a wrong number of
    channels, and conditions that it does not know.
    """

    def __init__(
        self,
        in_channels: int = 1,
        base_channels: int = 64,
        channel_mult: tuple[int, ...] = (1, 2, 2),
        num_res_blocks: int = 1,
        attention_levels: tuple[int, ...] = (2,),
        patch_size: int = 2,
        conditions: Mapping[str, Condition] | None = None,
        out_channels: int | None = None,
    ):
        super().__init__()
        levels = len(channel_mult)
        if unknown := [level for level in attention_levels if not 0 <= level < levels]:
            raise ValueError(
                f"attention_levels has {unknown[0]}: channel_mult gives levels 0 … {levels - 1}."
            )
        self.in_channels, self.patch_size, self.base_channels = in_channels, patch_size, base_channels
        self.divisor = patch_size * 2 ** (levels - 1)
        emb_dim = 4 * base_channels
        self.time_mlp = nn.Sequential(
            nn.Linear(base_channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim)
        )
        self.conditions = nn.ModuleDict(
            {name: c.embedding(emb_dim) for name, c in (conditions or {}).items()}
        )
        tokens = any(embedding.gives_tokens for embedding in self.conditions.values())
        self._build([base_channels * m for m in channel_mult], num_res_blocks, set(attention_levels), tokens)
        unfolded = (out_channels or in_channels) * patch_size**2
        self.norm = _norm(base_channels * channel_mult[0])
        self.head = _zero(nn.Conv2d(base_channels * channel_mult[0], unfolded, 3, padding=1))

    def _build(
        self, widths: list[int], num_res_blocks: int, attention_levels: set[int], tokens: bool
    ) -> None:
        """The blocks of the way down, the middle and the way up."""
        width, emb_dim = self.base_channels, 4 * self.base_channels
        self.stem = nn.Conv2d(self.in_channels * self.patch_size**2, width, 3, padding=1)
        self.down = nn.ModuleList()
        skips = [width]  # channels of every feature map kept for the way up
        for level, out in enumerate(widths):
            for _ in range(num_res_blocks):
                self.down.append(_Stage(width, out, emb_dim, level in attention_levels, tokens))
                width = out
                skips.append(width)
            if level < len(widths) - 1:
                self.down.append(Downsample(width))
                skips.append(width)
        self.middle = nn.ModuleList(
            [_Stage(width, width, emb_dim, attention, tokens) for attention in (True, False)]
        )
        self.up = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(num_res_blocks + 1):
                self.up.append(_Stage(width + skips.pop(), out, emb_dim, level in attention_levels, tokens))
                width = out
            if level > 0:
                self.up.append(Upsample(width))

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: this network takes (B, {self.in_channels}, H, W)."
            )
        if x.shape[2] % self.divisor or x.shape[3] % self.divisor:
            raise ValueError(
                f"the image is {x.shape[2]}×{x.shape[3]}: height and width must divide by {self.divisor} "
                "(patch_size · 2^(levels − 1)). Resize it or use fewer levels."
            )

    def embed(self, t: Tensor, y: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """What all blocks are told: an embedding (B, emb_dim), and tokens (B, L, emb_dim) or None."""
        emb, tokens, y = self.time_mlp(timestep_embedding(t, self.base_channels)), [], y or {}
        if unknown := sorted(set(y) - set(self.conditions)):
            known = f"has the conditions {', '.join(self.conditions)}" if len(self.conditions) else "has none"
            raise ValueError(f"got the condition {unknown[0]!r}, but this network {known}.")
        for name, embedding in self.conditions.items():
            values = y.get(name, embedding.condition.nothing(len(t)))
            if len(values) != len(t):
                raise ValueError(
                    f"{name} has {len(values)} values for a batch of {len(t)}: give one per image."
                )
            if values.device.type == "cpu":  # a look at a GPU's values would wait for all that runs there
                embedding.condition.check(name, values)
            found = embedding(values.to(t.device))
            if embedding.gives_tokens:
                tokens.append(found)
            else:
                emb = emb + found
        return emb, torch.cat(tokens, 1) if tokens else None

    def encode(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """The way down: bottleneck (B, C, h, w), and the skips for the way up."""
        self._check(x)
        h = self.stem(F.pixel_unshuffle(x, self.patch_size))
        skips = [h]
        for block in self.down:
            h = block(h, emb, context)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb, context)
        return h, skips

    def forward(self, x: Tensor, t: Tensor, y: Mapping[str, Tensor] | None = None) -> Tensor:
        emb, context = self.embed(t, y)
        h, skips = self.encode(x, emb, context)
        for block in self.up:
            h = block(h if isinstance(block, Upsample) else torch.cat([h, skips.pop()], 1), emb, context)
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), self.patch_size)


def count_parameters(module: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@torch.no_grad()
def trace_shapes(model: UNet, image_size: int) -> list[tuple[str, str, tuple[int, ...], int]]:
    """One row per block of a forward pass on one square image of zeros.

    Rows are (where, block, output shape (C, H, W), trainable parameters).
    """
    rows, hooks = [], []
    blocks = [("in", model.stem)]
    blocks += [("down", b) for b in model.down] + [("middle", b) for b in model.middle]
    blocks += [("up", b) for b in model.up] + [("out", model.head)]
    for where, block in blocks:
        kind = type(block).__name__
        if isinstance(block, _Stage):
            kind = "ResBlock" + ("" if block.attention is None else " + attention")
            kind += "" if block.cross is None else " + cross-attention"

        def note(module, args, output, where=where, kind=kind):
            rows.append((where, kind, tuple(output.shape[1:]), count_parameters(module)))

        hooks.append(block.register_forward_hook(note))
    try:
        device = model.stem.weight.device
        x = torch.zeros(1, model.in_channels, image_size, image_size, device=device)
        model(x, torch.zeros(1, dtype=torch.long, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return rows
