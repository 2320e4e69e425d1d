"""The conversion, under the name that notebook 1 uses; it is in :mod:`oasis_helpers.intake.convert`."""

from .intake.convert import convert

__all__ = ["convert"]
