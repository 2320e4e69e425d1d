"""The phantoms, under the name that is taught; they are made in :mod:`oasis_helpers.intake.phantoms`."""

from .intake.phantoms import (
    PhantomFactors,
    fresh_heads,
    make_heads,
    make_phantoms,
    phantom_cache,
    plant_lesion,
)

__all__ = ["PhantomFactors", "fresh_heads", "make_heads", "make_phantoms", "phantom_cache", "plant_lesion"]
