"""Names and folders of the OASIS course set, for whoever writes or reads one.

Apart from :mod:`.data`, because the processes that make phantoms need no torch: it would cost
each of them seconds and half a gigabyte.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DATASET_FOLDER = "keras_png_slices"
SPLITS = ("train", "validate", "test")
SIDE = 256
_NAME = re.compile(r"^(case|seg)_(\d+)_slice_(\d+)(?:\.nii)?\.png$", re.IGNORECASE)


def image_name(case: int, index: int) -> str:
    """File name of an image, as the course set writes it."""
    return f"case_{case:03d}_slice_{index}.nii.png"


def mask_name(case: int, index: int) -> str:
    """File name of a mask, as the course set writes it."""
    return f"seg_{case:03d}_slice_{index}.nii.png"


def slices_in(folder: Path, prefix: str) -> dict[tuple[int, int], Path]:
    """Every file of one kind in ``folder`` by (case, slice), in numeric order."""
    if not folder.exists():
        raise FileNotFoundError(
            f"{folder} does not exist. Give one split folder, such as …/{DATASET_FOLDER}_train, "
            "or run `python -m oasis_helpers phantoms OUT` to make a set."
        )
    if not folder.is_dir():
        hint = " Unpack the archive first." if folder.suffix == ".zip" else ""
        raise NotADirectoryError(f"{folder} is a file, not a folder of slices.{hint}")
    found = {}
    for path in folder.iterdir():
        match = _NAME.match(path.name)
        if match and match[1].lower() == prefix:
            found[int(match[2]), int(match[3])] = path
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class DataLocation:
    """A data set on disk: ``root`` holds the six folders; ``kind`` is "oasis" or "phantoms"."""

    root: Path
    kind: str

    def folder(self, split: str, masks: bool = False) -> Path:
        """The folder of one split's images, or of its masks."""
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}: choose one of {', '.join(SPLITS)}.")
        return self.root / f"{DATASET_FOLDER}{'_seg' if masks else ''}_{split}"

    @property
    def train(self) -> Path:
        return self.folder("train")

    @property
    def validate(self) -> Path:
        return self.folder("validate")

    @property
    def test(self) -> Path:
        return self.folder("test")

    def __str__(self) -> str:
        cases = sum(
            len({case for case, _ in slices_in(self.folder(split), "case")})
            for split in SPLITS
            if self.folder(split).is_dir()
        )
        return f"{'OASIS' if self.kind == 'oasis' else 'phantoms'}, {cases} cases"
