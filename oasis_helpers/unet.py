"""The U-Net that looks at a noisy slice and a timestep, and says what the noise is.

Sources: U-Net, Ronneberger et al. 2015 (arXiv 1505.04597); its use for diffusion with time
embedding and attention, Ho et al. 2020 (arXiv 2006.11239, appendix B); scale-and-shift time
conditioning, Dhariwal & Nichol 2021 (arXiv 2105.05233); sinusoidal embedding, Vaswani et al.
2017 (arXiv 1706.03762, section 3.5); space-to-depth, Shi et al. 2016 (arXiv 1609.05158).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(h))


class AttentionBlock(nn.Module):
    """Self-attention over all pixels of a feature map, plus a shortcut: (B, C, H, W) → same.

    Heads have ``head_channels`` channels each (or all C if that does not divide C). Vaswani et
    al. 2017, eq. 1, with every pixel a token; the output projection starts at zero.
    """

    def __init__(self, channels: int, head_channels: int = 32):
        super().__init__()
        self.heads = channels // head_channels if channels % head_channels == 0 else 1
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.transpose(3, 4).unbind(1)
        if x.device.type == "cpu":  # whose bf16 kernel takes several times as long backwards as the fp32 one
            with torch.autocast("cpu", enabled=False):
                attended = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
        else:
            attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(attended.transpose(2, 3).reshape(b, c, h, w))


class Downsample(nn.Module):
    """Half the height and width with a strided 3×3 convolution: (B, C, H, W) → (B, C, H/2, W/2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the height and width: nearest neighbour, then a 3×3 convolution.

    A transposed convolution would leave a checkerboard (Odena et al. 2016).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Stage(nn.Module):
    """A residual block, with attention behind it where the level asks for it."""

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int, attention: bool):
        super().__init__()
        self.res = ResBlock(in_channels, out_channels, emb_dim)
        self.attention = AttentionBlock(out_channels) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.attention(self.res(x, emb))


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
        ``num_classes``: None, or the number of labels ``y`` can take.

    ``forward(x, t, y=None)``: x (B, in_channels, H, W) in about [−1, 1], t (B,) integer
    timesteps, y (B,) class ids → (B, out_channels, H, W). Height and width must divide by
    ``patch_size · 2^(levels − 1)``. The last convolution starts at zero: a fresh network
    outputs zeros. Raises ``ValueError`` for a size that does not divide, a wrong number of
    channels, and labels that are missing or not wanted.
    """

    def __init__(
        self,
        in_channels: int = 1,
        base_channels: int = 64,
        channel_mult: tuple[int, ...] = (1, 2, 2),
        num_res_blocks: int = 1,
        attention_levels: tuple[int, ...] = (2,),
        patch_size: int = 2,
        num_classes: int | None = None,
        out_channels: int | None = None,
    ):
        super().__init__()
        levels = len(channel_mult)
        if unknown := [level for level in attention_levels if not 0 <= level < levels]:
            raise ValueError(
                f"attention_levels has {unknown[0]}: channel_mult gives levels 0 … {levels - 1}."
            )
        self.in_channels, self.patch_size, self.num_classes = in_channels, patch_size, num_classes
        self.divisor = patch_size * 2 ** (levels - 1)
        self.base_channels = base_channels
        emb_dim = 4 * base_channels
        widths = [base_channels * m for m in channel_mult]
        folded = in_channels * patch_size**2

        self.time_mlp = nn.Sequential(
            nn.Linear(base_channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim)
        )
        self.class_emb = nn.Embedding(num_classes, emb_dim) if num_classes else None
        self.stem = nn.Conv2d(folded, base_channels, 3, padding=1)

        self.down = nn.ModuleList()
        skips = [base_channels]  # channels of every feature map kept for the way up
        width = base_channels
        for level, out in enumerate(widths):
            for _ in range(num_res_blocks):
                self.down.append(_Stage(width, out, emb_dim, level in attention_levels))
                width = out
                skips.append(width)
            if level < levels - 1:
                self.down.append(Downsample(width))
                skips.append(width)

        self.middle = nn.ModuleList(
            [_Stage(width, width, emb_dim, attention=True), _Stage(width, width, emb_dim, attention=False)]
        )

        self.up = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(num_res_blocks + 1):
                self.up.append(_Stage(width + skips.pop(), out, emb_dim, level in attention_levels))
                width = out
            if level > 0:
                self.up.append(Upsample(width))

        self.norm = _norm(width)
        unfolded = (out_channels or in_channels) * patch_size**2
        self.head = _zero(nn.Conv2d(width, unfolded, 3, padding=1))

    def _check(self, x: Tensor, y: Tensor | None) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: this network takes (B, {self.in_channels}, H, W)."
            )
        if x.shape[2] % self.divisor or x.shape[3] % self.divisor:
            raise ValueError(
                f"the image is {x.shape[2]}×{x.shape[3]}: height and width must divide by {self.divisor} "
                "(patch_size · 2^(levels − 1)). Resize it or use fewer levels."
            )
        if (y is None) != (self.class_emb is None):
            found = "no labels y" if y is None else "labels y"
            wants = f"num_classes={self.num_classes}"
            raise ValueError(f"got {found}, but the network was built with {wants}.")

    def encode(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The way down: bottleneck (B, C, h, w), embedding (B, emb_dim), and the skips for the way up."""
        self._check(x, y)
        emb = self.time_mlp(timestep_embedding(t, self.base_channels))
        if y is not None:
            emb = emb + self.class_emb(y)
        h = self.stem(F.pixel_unshuffle(x, self.patch_size))
        skips = [h]
        for module in self.down:
            h = module(h, emb) if isinstance(module, _Stage) else module(h)
            skips.append(h)
        for module in self.middle:
            h = module(h, emb)
        return h, emb, skips

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        h, emb, skips = self.encode(x, t, y)
        for module in self.up:
            h = module(torch.cat([h, skips.pop()], dim=1), emb) if isinstance(module, _Stage) else module(h)
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
            kind = "ResBlock" + ("" if isinstance(block.attention, nn.Identity) else " + attention")

        def note(module, args, output, where=where, kind=kind):
            rows.append((where, kind, tuple(output.shape[1:]), count_parameters(module)))

        hooks.append(block.register_forward_hook(note))
    try:
        device = model.stem.weight.device
        y = None if model.class_emb is None else torch.zeros(1, dtype=torch.long, device=device)
        x = torch.zeros(1, model.in_channels, image_size, image_size, device=device)
        model(x, torch.zeros(1, dtype=torch.long, device=device), y)
    finally:
        for hook in hooks:
            hook.remove()
    return rows
