"""The subjects, under the name that notebook 1 uses; they are in :mod:`oasis_helpers.intake.subjects`."""

from .intake.subjects import Subject, load_subjects

__all__ = ["Subject", "load_subjects"]
