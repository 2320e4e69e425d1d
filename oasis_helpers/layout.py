"""Names, folders and files of the OASIS course set, for whoever writes or reads one.

Apart from :mod:`.data`, because those who write or check one need no torch: it would cost each
process seconds and half a gigabyte.
"""

from __future__ import annotations

import csv
import io
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

DATASET_FOLDER = "keras_png_slices"
SPLITS = ("train", "validate", "test")
SIDE = 256
PLANES = 32  # slices of a case, inferior to superior, 1 mm apart
ROWS, COLS = 176, 208  # the T88 plane inside the padding: left–right and posterior–anterior
MASK_VALUES = (0, 85, 170, 255)
TISSUES = ("background", "CSF", "grey matter", "white matter")
_NAME = re.compile(r"^(case|seg)_(\d+)_slice_(\d+)(?:\.nii)?\.png$", re.IGNORECASE)


def image_name(case: int, index: int) -> str:
    """File name of an image, as the course set writes it."""
    return f"case_{case:03d}_slice_{index}.nii.png"


def mask_name(case: int, index: int) -> str:
    """File name of a mask, as the course set writes it."""
    return f"seg_{case:03d}_slice_{index}.nii.png"


_CLUTTER = re.compile(
    r"(?:^|/)(?:\._[^/]*|__MACOSX|Icon[\r\n]+|Thumbs\.db|ehthumbs(?:_vista)?\.db|desktop\.ini|\$RECYCLE\.BIN"
    r"|System Volume Information|@eaDir|lost\+found|thumbcache_[^/]*\.db|\.directory|\.hidden|\.localized"
    r"|\.DS_Store|\.AppleDouble|\.AppleDB|\.LSOverride|\.apdisk|\.VolumeIcon\.icns|\.com\.apple\.[^/]*"
    r"|\.Spotlight-V100|\.TemporaryItems|\.DocumentRevisions-V100|\.fseventsd|\.thumbnails|\.thumb[^/]*|\.cache"
    r"|\.Trash[^/]*|\.nfs\w+|\.fuse_hidden\w+|\.sync[^/]*|\.dropbox[^/]*|\.picasa[^/]*|Picasa\.ini"
    r"|\.comments|\.xvpics|\.~lock\.[^/]*#|~\$[^/]*)(?:/|$)",
    re.IGNORECASE,
)


def is_clutter(name: str) -> bool:
    """Whether a file (its path with ``/``) is one that systems and file managers leave everywhere."""
    return bool(_CLUTTER.search(name))


def slices_in(folder: Path, prefix: str) -> dict[tuple[int, int], Path]:
    """Every file of one kind in ``folder`` by (case, slice), in numeric order.

    Of several names for one slice the course set's own is taken, else the first.
    """
    return {key: paths[0] for key, paths in names_in(folder, prefix).items()}


def names_in(folder: Path, prefix: str) -> dict[tuple[int, int], list[Path]]:
    """As :func:`slices_in`, with all files for each slice: there should be one."""
    if not folder.exists():
        raise FileNotFoundError(
            f"{folder} does not exist. Give one split folder, such as …/{DATASET_FOLDER}_train, "
            "or run `python -m oasis_helpers phantoms OUT` to make a set."
        )
    if not folder.is_dir():
        hint = " Unpack the archive first." if folder.suffix == ".zip" else ""
        raise NotADirectoryError(f"{folder} is a file, not a folder of slices.{hint}")
    found: dict[tuple[int, int], list[Path]] = {}
    for path in folder.iterdir():
        match = _NAME.match(path.name)
        if match and match[1].lower() == prefix:
            found.setdefault((int(match[2]), int(match[3])), []).append(path)
    own = {"case": image_name, "seg": mask_name}[prefix]
    return {key: sorted(found[key], key=lambda p: (p.name != own(*key), p.name)) for key in sorted(found)}


@cache
def course_cases() -> dict[int, dict[str, str]]:
    """The 354 cases of the course set: split, number of slices and checksums by case id."""
    with (Path(__file__).parent / "oasis_png_cases.csv").open(newline="", encoding="utf-8") as file:
        return {int(row["case"]): row for row in csv.DictReader(file)}


def pad(plane: np.ndarray) -> np.ndarray:
    """A plane in the middle of a 256×256 square of zeros (a T88 plane: 40 rows and 24 columns around)."""
    square = np.zeros((SIDE, SIDE), np.uint8)
    top, left = ((SIDE - n) // 2 for n in plane.shape)
    square[top : top + plane.shape[0], left : left + plane.shape[1]] = plane
    return square


def png_bytes(pixels: np.ndarray) -> bytes:
    """A greyscale PNG. The lowest compression is twice as fast as the usual one and 17 % larger."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


class WrongMode(ValueError):
    """A PNG whose pixels are not 8-bit greyscale."""


class WrongSize(ValueError):
    """A PNG that is not 256×256."""


def read_png(file: Path | BinaryIO) -> Image.Image:
    """A slice or mask of the course set, decoded: mode L, 256×256.

    Raises ``OSError`` for what is no sound PNG, :class:`WrongMode` and :class:`WrongSize`, whose
    messages begin with what was found and leave it to the caller to name the file.
    """
    # Only the PNG decoder, for another format's may start a program; and not by Image.open, which warns of
    # large pictures before their size is refused here. Opening reads no pixel.
    try:
        opened = PngImageFile(file)
    except SyntaxError:
        raise OSError("no PNG") from None
    except ValueError as error:
        raise OSError(str(error)) from None
    try:
        with opened as image:
            if image.size != (SIDE, SIDE):
                raise WrongSize(f"{image.width}×{image.height}, should be {SIDE}×{SIDE}")
            if image.mode != "L":
                raise WrongMode(f"mode {image.mode}, should be L (8-bit greyscale)")
            image.load()
            return image
    except (WrongSize, WrongMode):
        raise
    except (OSError, SyntaxError, ValueError, zlib.error) as error:
        raise OSError(str(error)) from None


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a new file beside ``path`` and give it that name: what has the name is whole.

    The file is created under a random name, so nobody can have laid a link there, and is on disk
    before it gets its name. If anything fails it is removed, and what ``path`` was before stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    with temporary.open("xb"):
        pass
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` by :func:`replace_file`."""
    replace_file(path, lambda temporary: temporary.write_bytes(content))


def remove_leftovers(root: Path) -> None:
    """Delete what :func:`replace_file` left behind where it was killed."""
    for left_over in (*root.glob(".*.part"), *root.glob("*/.*.part")):
        left_over.unlink(missing_ok=True)


def make_folders(root: Path) -> None:
    """The six folders of a data set."""
    for split in SPLITS:
        for name in (f"{DATASET_FOLDER}_{split}", f"{DATASET_FOLDER}_seg_{split}"):
            (root / name).mkdir(parents=True, exist_ok=True)


def check_space(root: Path, needed: int, what: str) -> None:
    """Raise ``OSError`` unless ``needed`` bytes are free where ``root`` is or will be."""
    existing = next(p for p in (root, *root.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{what} need {needed / 1e6:,.0f} MB and {root} has {free / 1e6:,.0f} MB free. "
            "Free some space or choose another disk."
        )


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

    def needs_whole_cases(self) -> None:
        """Raise ``ValueError`` if the cases have one slice each, as in neurite-oasis."""
        keys = slices_in(self.train, "case")
        if len(keys) == len({case for case, _ in keys}):
            raise ValueError(
                f"{self.root} has one slice a case, and this notebook compares the slices of a head. Use the "
                "course set, OASIS-1 or phantoms (OASIS_ROOT unset) here, or go on with notebook 2, 3 or 4."
            )

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


_CONVERT = (
    "if it is OASIS in another form, bring it into this layout: python -m oasis_helpers convert {} OUT, then "
    "point to OUT."
)


def locate(root: Path) -> DataLocation:
    """The data set in ``root``, in the extra folder (or doubled folder) inside it, or around a split folder.

    Raises ``FileNotFoundError`` or ``NotADirectoryError`` if there is none, ``ValueError`` if phantoms and
    people are mixed.
    """
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist. Give the folder that holds {DATASET_FOLDER}_train.")
    if root.is_file():
        packed = root.suffix.lower() in (".zip", ".gz", ".tgz", ".tar")
        what = "Unpack it and give the folder" if packed else "Give a folder"
        raise NotADirectoryError(f"{root} is a file. {what}; {_CONVERT.format(root)}")
    candidate = root.parent if root.name.startswith(f"{DATASET_FOLDER}_") else root
    for _ in range(3):
        if (candidate / f"{DATASET_FOLDER}_train").is_dir():
            is_phantom = (candidate / "phantoms.json").exists()
            if is_phantom and (candidate / "conversion.json").exists():
                raise ValueError(
                    f"{candidate} holds phantoms and converted slices of people (phantoms.json and "
                    "conversion.json): keep them in two folders."
                )
            return DataLocation(candidate, "phantoms" if is_phantom else "oasis")
        candidate = candidate / f"{DATASET_FOLDER}_data"
    raise FileNotFoundError(
        f"{root} holds no folder {DATASET_FOLDER}_train (nor does a {DATASET_FOLDER}_data in it). "
        "Point to the unpacked course archive, or leave OASIS_ROOT unset to use phantoms; "
        + _CONVERT.format(root)
    )
