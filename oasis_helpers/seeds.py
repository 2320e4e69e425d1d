"""Seeds that are seeds: whatever is random is drawn from a generator made of a seed and, in a run, a counter.

torch's generator on the CPU (a Mersenne Twister) keeps 32 bits of its seed, so a seed and a counter must be
mixed into that many.
"""

from __future__ import annotations

import torch

SEEDS = 2**31  # seeds run from 0 to this less one, and so do counters
# An odd number near SEEDS over the golden ratio: its multiples lie as evenly as can be, so that the
# counters of seeds 0 to 1,000 are more than 900,000 apart.
_STRIDE = 1_327_217_885
STREAMS = {"step": 0, "epoch": 1}


def check_seed(seed: int) -> int:
    """``seed`` if it is one, else ``ValueError``."""
    if not isinstance(seed, int) or not 0 <= seed < SEEDS:
        raise ValueError(f"seed is {seed}: give a whole number from 0 to {SEEDS - 1:,}.")
    return seed


def generator(seed: int, counter: int | None = None, stream: str = "step") -> torch.Generator:
    """The generator of ``seed``, or of one step or epoch (``stream``) of a run with that seed.

    Always on the CPU: the same numbers whatever the device. Steps and epochs never meet. Raises
    ``ValueError`` for a seed or counter outside 0 … 2³¹ − 1.
    """
    check_seed(seed)
    if counter is None:
        return torch.Generator().manual_seed(seed)
    if not 0 <= counter < SEEDS:
        raise ValueError(f"{stream} {counter} is not from 0 to {SEEDS - 1:,}.")
    # seed · stride is a permutation of all seeds, since the stride is odd
    return torch.Generator().manual_seed((seed * _STRIDE + counter) % SEEDS + STREAMS[stream] * SEEDS)
