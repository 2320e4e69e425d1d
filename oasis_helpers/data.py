"""The slices: where they are, and how a training loop gets them.

The layout is that of the OASIS course set: six folders ``keras_png_slices_{train,validate,
test}`` and ``keras_png_slices_seg_{…}`` with ``case_NNN_slice_K.nii.png`` and
``seg_NNN_slice_K.nii.png``, all 256×256 PNG of mode L. Data: Marcus et al. 2007, J. Cogn.
Neurosci. 19(9):1498–1507.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .intake.check import DatasetReport, check_dataset
from .intake.subjects import Subject, load_subjects
from .layout import (
    DATASET_FOLDER,
    MASK_VALUES,
    PLANES,
    TISSUES,
    DataLocation,
    WrongMode,
    WrongSize,
    image_name,
    locate,
    mask_name,
    read_png,
    slices_in,
)

if TYPE_CHECKING:
    from .intake.phantoms import PhantomFactors  # scipy and more, which loading slices does not need

__all__ = [
    "MASK_VALUES",
    "TISSUES",
    "DataLocation",
    "DatasetReport",
    "OASISDataset",
    "Slices",
    "check_dataset",
    "find_data",
    "load_factors",
    "load_masks",
    "load_slices",
    "read_slices",
    "slice_transform",
    "to_unit_range",
]


def _open_checked(path: Path) -> Image.Image:
    """The PNG at ``path``, decoded, if it is what the course set holds; else one clear line."""
    try:
        return read_png(path)
    except WrongMode as error:
        raise ValueError(
            f"{path} has {error}. Convert it with PIL's image.convert('L'), or copy the original again."
        ) from None
    except WrongSize as error:
        raise ValueError(
            f"{path} is {error}. Use the original file: resizing belongs in the transform."
        ) from None
    except OSError as error:
        raise OSError(
            f"{path} cannot be read as a PNG ({error}). It is damaged or incomplete: copy or make it again."
        ) from None


class OASISDataset(Dataset):
    """The slices of one split folder, in numeric order of case and slice.

    ``ds[i]`` is the image, or (image, mask) with ``label_path``, the folder of the masks.
    Without ``transform`` the image is a PIL image (mode L, 256×256); otherwise what the
    transform makes of it. A mask is a long tensor (256, 256) of class ids 0–3 (background,
    CSF, grey, white). ``case_ids`` and ``slice_ids`` are lists of integers, one entry a slice.

    Raises ``FileNotFoundError`` for a missing or empty folder and for an image without its
    mask or a mask without its image, ``OSError`` for a damaged PNG and ``ValueError`` for a
    wrong mode, size or mask value, each naming the file and the remedy.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable | None = None,
        label_path: str | Path | None = None,
    ):
        self.root = Path(root).expanduser()
        self.transform = transform
        self.label_path = None if label_path is None else Path(label_path).expanduser()
        images = _images_in(self.root)
        self.paths = list(images.values())
        self.case_ids = [case for case, _ in images]
        self.slice_ids = [index for _, index in images]
        self.mask_paths = None
        if self.label_path is not None:
            self.mask_paths = _masks_of(images, self.label_path)
            masks = slices_in(self.label_path, "seg")
            if without := [key for key in masks if key not in images]:
                raise FileNotFoundError(
                    f"{masks[without[0]]} has no image: {self.root / image_name(*without[0])} is missing"
                    f"{_and_more(without)}. Copy it, or remove the mask."
                )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        image = _open_checked(self.paths[index])
        if self.transform is not None:
            image = self.transform(image)
        if self.mask_paths is None:
            return image
        return image, _read_mask(self.mask_paths[index])


def _read_mask(path: Path) -> Tensor:
    """Class ids 0–3 of a mask, long (256, 256)."""
    values = np.asarray(_open_checked(path))
    if not np.isin(values, MASK_VALUES).all():
        odd = int(values[~np.isin(values, MASK_VALUES)][0])
        raise ValueError(
            f"{path} has a pixel of value {odd}; masks have {', '.join(map(str, MASK_VALUES))}. "
            "It was resampled or compressed: copy the original."
        )
    return torch.from_numpy(values // 85).long()


def _images_in(folder: Path) -> dict[tuple[int, int], Path]:
    """The images of a split folder by (case, slice), in numeric order; there is at least one."""
    images = slices_in(folder, "case")
    if not images:
        raise FileNotFoundError(
            f"{folder} holds no slices: no file is named like {image_name(1, 0)}. "
            f"Give a split folder such as …/{DATASET_FOLDER}_train."
        )
    return images


def _masks_of(images: dict[tuple[int, int], Path], folder: Path) -> list[Path]:
    """The mask of each image, in the same order."""
    masks = slices_in(folder, "seg")
    if without := [key for key in images if key not in masks]:
        raise FileNotFoundError(
            f"{images[without[0]]} has no mask: {folder / mask_name(*without[0])} is missing"
            f"{_and_more(without)}. Copy it, or do without the masks."
        )
    return [masks[key] for key in images]


def _and_more(items: list) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""


# ---- transforms and loading -----------------------------------------------------------------


MIDDLE = 208  # the scan fills 176×208 of the 256×256; the rest is padding, a third of a small network's work


def slice_transform(image_size: int) -> Callable[[Image.Image], Tensor]:
    """PIL slice → its middle 208×208 pixels as a float tensor (1, image_size, image_size) in [−1, 1]."""
    return partial(_transformed, image_size=image_size)


def _transformed(picture: Image.Image, image_size: int) -> Tensor:
    return to_unit_range(torch.from_numpy(_cut_and_scaled(picture, image_size))[None])


def _cut_and_scaled(picture: Image.Image, image_size: int) -> np.ndarray:
    left, top = ((side - MIDDLE) // 2 for side in picture.size)
    middle = picture.crop((left, top, left + MIDDLE, top + MIDDLE))
    return np.array(middle.resize((image_size, image_size), Image.Resampling.BILINEAR))


@dataclass(frozen=True)
class Slices:
    """The slices of one split with what belongs to each, row by row.

    ``images`` uint8 (N, 1, H, W), 0–255; ``case`` and ``plane`` long (N,), the subject's id and the
    slice's number in it; ``masks`` uint8 class ids 0–3 (N, H, W), or None if they were not asked for.
    """

    images: Tensor
    case: Tensor
    plane: Tensor
    masks: Tensor | None = None


def read_slices(
    folder: str | Path, image_size: int, *, cases: int | None = None, masks: bool = False
) -> Slices:
    """The slices of a split folder in memory, with case and plane, and with ``masks`` their masks.

    The rows are those of :func:`load_slices` and :func:`load_masks`. Raises as they do.
    """
    folder = Path(folder).expanduser()
    wanted = _wanted(folder, cases)
    case, plane = torch.tensor(list(wanted)).T
    found = _classes(_masks_of(wanted, _mask_folder(folder)), image_size) if masks else None
    return Slices(_greys(list(wanted.values()), image_size), case, plane, found)


def load_slices(root: str | Path, image_size: int, cases: int | None = None) -> Tensor:
    """Every slice of a split folder in memory, uint8 (N, 1, image_size, image_size).

    Decoded and resized once, so that training reads memory and no PNG; at 64×64 the whole
    OASIS training split is 40 MB. ``cases`` keeps the first so many cases; of a set with one
    slice a case (neurite-oasis) it keeps 32 times as many, to give as many slices. See
    :func:`to_unit_range` for the way to [−1, 1]. Raises as :class:`OASISDataset`, and ``ValueError``
    if ``cases`` is less than 1.
    """
    return _greys(list(_wanted(Path(root).expanduser(), cases).values()), image_size)


def load_masks(label_path: str | Path, image_size: int, cases: int | None = None) -> Tensor:
    """The masks of a ``…_seg_…`` folder in memory, uint8 class ids (N, image_size, image_size).

    Row by row the masks of what :func:`load_slices` reads from the folder of the images beside it, cut
    and scaled alike; a pixel gets the class that covers most of it. Raises ``FileNotFoundError``
    if one of those images has no mask.
    """
    label_path = Path(label_path).expanduser()
    wanted = _wanted(_image_folder(label_path), cases)
    return _classes(_masks_of(wanted, label_path), image_size)


def _mask_folder(images: Path) -> Path:
    return images.with_name(images.name.replace(DATASET_FOLDER, f"{DATASET_FOLDER}_seg", 1))


def _image_folder(masks: Path) -> Path:
    if "_seg_" not in masks.name:
        raise ValueError(f"{masks} is no folder of masks: give one such as …/{DATASET_FOLDER}_seg_train.")
    return masks.with_name(masks.name.replace("_seg_", "_", 1))


def _wanted(folder: Path, cases: int | None) -> dict[tuple[int, int], Path]:
    """The images of the first ``cases`` cases by (case, slice): a split, for images and masks alike."""
    images = _images_in(folder)
    if cases is None:
        return images
    if cases < 1:
        raise ValueError(f"cases is {cases}: give 1 or more.")
    every = sorted({case for case, _ in images})
    kept = set(every[: cases * PLANES if len(every) == len(images) else cases])
    return {key: path for key, path in images.items() if key[0] in kept}


def _greys(paths: list[Path], image_size: int) -> Tensor:
    # in numpy: for a slice torch wakes all threads, and where several processes read they wait for each other
    slices = np.empty((len(paths), 1, image_size, image_size), np.uint8)
    for i, path in enumerate(tqdm(paths, desc="slices", unit="slice", disable=len(paths) < 2000)):
        slices[i, 0] = _cut_and_scaled(_open_checked(path), image_size)
    return torch.from_numpy(slices)


def _classes(paths: list[Path], image_size: int) -> Tensor:
    masks = torch.empty((len(paths), image_size, image_size), dtype=torch.uint8)
    for i, path in enumerate(tqdm(paths, desc="masks", unit="slice", disable=len(paths) < 2000)):
        of_class = F.one_hot(_read_mask(path), len(TISSUES)).permute(2, 0, 1).float()
        top, left = ((side - MIDDLE) // 2 for side in of_class.shape[1:])
        middle = of_class[None, :, top : top + MIDDLE, left : left + MIDDLE]
        masks[i] = F.interpolate(middle, image_size, mode="bilinear", antialias=True)[0].argmax(0)
    return masks


def to_unit_range(slices: Tensor) -> Tensor:
    """uint8 pixels 0–255 → float32 in [−1, 1], the range that diffusion assumes for x_0."""
    return slices.float() / 127.5 - 1


# ---- where the data is ----------------------------------------------------------------------


def find_data(root: str | Path | None = None, *, whole_cases: bool = False) -> DataLocation:
    """The data to use: ``root``, else ``$OASIS_ROOT``, else the phantoms (made on first use).

    ``root`` may be the folder with the six split folders, the extra top folder around it, or
    one of the split folders. Raises ``FileNotFoundError`` or ``NotADirectoryError`` if what
    was asked for is not there: phantoms never stand in silently for data you named; and with
    ``whole_cases`` ``ValueError`` if there is but one slice of each case.
    """
    chosen = root or os.environ.get("OASIS_ROOT")
    if chosen:
        location = locate(Path(chosen).expanduser())
        if whole_cases:
            location.needs_whole_cases()
        return location
    from .intake.phantoms import make_phantoms, phantom_cache

    return make_phantoms(phantom_cache())


def load_factors(location: DataLocation) -> dict[int, PhantomFactors] | dict[int, Subject] | None:
    """What is known of each case of a data set, by case id; None if nobody wrote it down.

    Of phantoms the true causes (:class:`~.intake.phantoms.PhantomFactors`, from ``phantoms.csv``), of
    people age, sex and CDR (:class:`~.intake.subjects.Subject`, from ``subjects.csv``). Raises
    ``ValueError`` for a table that was changed by hand into something else.
    """
    if location.kind == "phantoms":
        from .intake.phantoms import read_factors

        return read_factors(location.root) or None
    return load_subjects(location.root)
