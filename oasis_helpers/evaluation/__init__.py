"""Judging samples: a network that finds the tissues, distances in its features, anatomy, copies, a report."""

from .anatomy import DEEP, PIXEL, anatomy, anatomy_distances
from .copies import Memorisation, memorisation, nearest_images
from .distances import KernelDistance, bootstrap, fid, kid, kid_of, ms_ssim, precision_recall
from .report import (
    Evaluation,
    Real,
    Split,
    check_real,
    check_sample,
    evaluate,
    load_real,
    load_split,
    notes,
    resize_for_segmenter,
)
from .segmenter import (
    LEAST,
    SEGMENTER,
    Segmentation,
    Segmenter,
    check_images,
    dice,
    embed,
    load_segmenter,
    save_segmenter,
    segment,
    train_segmenter,
)

__all__ = [
    "DEEP", "LEAST", "PIXEL", "SEGMENTER", "Evaluation", "KernelDistance", "Memorisation", "Real",
    "Segmentation", "Segmenter", "Split", "anatomy", "anatomy_distances", "bootstrap", "check_images",
    "check_real", "check_sample", "dice", "embed", "evaluate", "fid", "kid", "kid_of", "load_real",
    "load_segmenter", "load_split", "memorisation", "ms_ssim", "nearest_images", "notes", "precision_recall",
    "resize_for_segmenter", "save_segmenter", "segment", "train_segmenter",
]  # fmt: skip
