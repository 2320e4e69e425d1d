"""Write weights once more in half precision, as they ship.

``python benchmarks/half.py WEIGHTS OUT``: half the size; the card says so. A model of latents is trained on
those of the file that ships, so this comes before its training.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from oasis_helpers.training import read_tensors, save


def halve(weights: Path, out: Path, card: dict[str, Any] | None = None) -> None:
    """Write ``weights`` to ``out`` with its numbers in float16, and ``card`` with what its card says."""
    tensors, header = read_tensors(weights)
    if header.run:
        raise ValueError(f"{weights} is a checkpoint: end its run (--resume), which writes the weights.")
    card = header.card | (card or {})
    save(out, tensors, header.kind, header.settings, training=header.training, card=card, half=True)


if __name__ == "__main__":
    halve(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{sys.argv[2]}: {Path(sys.argv[2]).stat().st_size / 1e6:.1f} MB")
