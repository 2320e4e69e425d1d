"""Reading before drawing: the transformer learns what a phrase says before the U-Net asks it.

The error of a noisy image changes by very little when a skull is thick and not thin, so that from this error
alone the transformer learns that *something* is thin, and not what. Stable Diffusion takes a transformer that
has read before (CLIP; Rombach et al. 2022, arXiv 2112.10752; Radford et al. 2021, arXiv 2103.00020). Here it
reads the phrases of the grammar for a minute, and the truths that they were made of must be found in its
vectors by attention, as the places of the U-Net will.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..prompts import phrases, tokens
from ..seeds import generator

BATCH, RATE, WARMUP = 16, 5e-4, 100


class _Teller(nn.Module):
    """Vectors of words (B, L, D) → truths (B, N): each asks the words."""

    def __init__(self, width: int, truths: int):
        super().__init__()
        self.questions = nn.Parameter(torch.randn(truths, width))
        heads = width // 32 if width % 32 == 0 else 1
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.out = nn.Linear(width, 1)

    def forward(self, words: Tensor) -> Tensor:
        asked = self.questions.expand(len(words), -1, -1)
        return self.out(self.attention(asked, words, words, need_weights=False)[0])[..., 0]


def teach_reading(
    reader: nn.Module, known: Tensor, steps: int, seed: int = 0
) -> Callable[[Sequence[str]], Tensor]:
    """Train what embeds :class:`~oasis_helpers.conditions.Tokens` to read, and return how to ask it.

    ``known``: truths of slices as :func:`~oasis_helpers.prompts.truths`, (N, 6), NaN where nothing is known.
    Each step makes 16 phrases, of whose words each truth is asked by attention; the loss is the mean square
    of the errors in units of each truth's deviation. What a phrase does not say can only be guessed. Draws
    depend on ``seed`` alone. Returns a function of phrases, which gives the truths that it reads, (B, 6).
    """
    drawn = generator(seed)
    mean = known.nanmean(0)
    spread = (known - mean).square().nanmean(0).sqrt()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teller = _Teller(reader.table.embedding_dim, known.shape[1])

    def told(texts: Sequence[str]) -> Tensor:
        return teller(reader(tokens(texts)))

    optimizer = torch.optim.AdamW([*reader.parameters(), *teller.parameters()], lr=RATE)
    for step in tqdm(range(steps), desc="reading", disable=steps < 500):
        optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / WARMUP, 1 - step / steps)
        some = known[torch.randint(len(known), (BATCH,), generator=drawn)]
        wanted = ((some - mean) / spread).nan_to_num(0, 0, 0).float()
        loss = F.mse_loss(told(phrases(some, drawn)), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def tell(texts: Sequence[str]) -> Tensor:
        return mean + spread * told(texts)

    return tell
