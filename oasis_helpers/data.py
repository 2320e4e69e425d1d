"""The slices: where they are, whether they are whole, and how a training loop gets them.

The layout is that of the OASIS course set: six folders ``keras_png_slices_{train,validate,
test}`` and ``keras_png_slices_seg_{…}`` with ``case_NNN_slice_K.nii.png`` and
``seg_NNN_slice_K.nii.png``, all 256×256 PNG of mode L. Data: Marcus et al. 2007, J. Cogn.
Neurosci. 19(9):1498–1507.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from tqdm.auto import tqdm

from .layout import (
    DATASET_FOLDER,
    PLANES,
    SPLITS,
    DataLocation,
    WrongMode,
    WrongSize,
    course_cases,
    image_name,
    mask_name,
    read_png,
    slices_in,
)
from .subjects import Subject, load_subjects

if TYPE_CHECKING:
    from .phantoms import PhantomFactors  # scipy and more, which loading slices does not need

MASK_VALUES = (0, 85, 170, 255)
TISSUES = ("background", "CSF", "grey matter", "white matter")


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


def slice_transform(image_size: int) -> transforms.Compose:
    """PIL slice → float tensor (1, image_size, image_size) in [−1, 1].

    Cuts the middle 208×208 pixels first: the scan fills 176×208 of the 256×256, the rest is
    padding on which a small network would spend a third of its work.
    """
    return transforms.Compose(
        [
            transforms.CenterCrop(208),
            transforms.Resize(image_size, antialias=True),
            transforms.ToTensor(),
            transforms.Normalize(0.5, 0.5),
        ]
    )


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
    shrink = slice_transform(image_size)
    slices = torch.empty((len(paths), 1, image_size, image_size), dtype=torch.uint8)
    for i, path in enumerate(tqdm(paths, desc="slices", unit="slice", disable=len(paths) < 2000)):
        slices[i] = ((shrink(_open_checked(path)) + 1) * 127.5).round().to(torch.uint8)
    return slices


def _classes(paths: list[Path], image_size: int) -> Tensor:
    shrink = transforms.Compose([transforms.CenterCrop(208), transforms.Resize(image_size, antialias=True)])
    masks = torch.empty((len(paths), image_size, image_size), dtype=torch.uint8)
    for i, path in enumerate(tqdm(paths, desc="masks", unit="slice", disable=len(paths) < 2000)):
        shares = shrink(F.one_hot(_read_mask(path), len(TISSUES)).permute(2, 0, 1).float())
        masks[i] = shares.argmax(0)
    return masks


def to_unit_range(slices: Tensor) -> Tensor:
    """uint8 pixels 0–255 → float32 in [−1, 1], the range that diffusion assumes for x_0."""
    return slices.float() / 127.5 - 1


# ---- where the data is ----------------------------------------------------------------------


def _locate(root: Path) -> DataLocation:
    """The data set in ``root``, or in one folder (or doubled folder) inside it."""
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist. Give the folder that holds {DATASET_FOLDER}_train.")
    if root.is_file():
        hint = "Unpack it and give the folder." if root.suffix == ".zip" else "Give a folder."
        raise NotADirectoryError(f"{root} is a file. {hint}")
    candidate = root.parent if root.name.startswith(f"{DATASET_FOLDER}_") else root
    for _ in range(3):
        if (candidate / f"{DATASET_FOLDER}_train").is_dir():
            is_phantom = (candidate / "phantoms.json").exists()
            return DataLocation(candidate, "phantoms" if is_phantom else "oasis")
        candidate = candidate / f"{DATASET_FOLDER}_data"
    raise FileNotFoundError(
        f"{root} holds no folder {DATASET_FOLDER}_train (nor does a {DATASET_FOLDER}_data in it). "
        "Point to the unpacked course archive, or leave OASIS_ROOT unset to use phantoms."
    )


def find_data(root: str | Path | None = None) -> DataLocation:
    """The data to use: ``root``, else ``$OASIS_ROOT``, else the phantoms (made on first use).

    ``root`` may be the folder with the six split folders, the extra top folder around it, or
    one of the split folders. Raises ``FileNotFoundError`` or ``NotADirectoryError`` if what
    was asked for is not there: phantoms never stand in silently for data you named.
    """
    chosen = root or os.environ.get("OASIS_ROOT")
    if chosen:
        return _locate(Path(chosen).expanduser())
    from .phantoms import make_phantoms, phantom_cache

    return make_phantoms(phantom_cache())


def load_factors(location: DataLocation) -> dict[int, PhantomFactors] | dict[int, Subject] | None:
    """What is known of each case of a data set, by case id; None if nobody wrote it down.

    Of phantoms the true causes (:class:`~oasis_helpers.phantoms.PhantomFactors`, from ``phantoms.csv``),
    of people age, sex and CDR (:class:`~oasis_helpers.subjects.Subject`, from ``subjects.csv``). Raises
    ``ValueError`` for a table that was changed by hand into something else.
    """
    if location.kind == "phantoms":
        from .phantoms import read_factors

        return read_factors(location.root) or None
    return load_subjects(location.root)


# ---- is it whole? ---------------------------------------------------------------------------


@dataclass
class DatasetReport:
    """What :func:`check_dataset` found. ``ok`` is True when nothing is wrong.

    ``counts``: split → (slices, cases). ``checksums``: "unmodified" when every whole case equals
    the course set's (or, for a converted set, what was converted); "re-encoded" when every
    case differs in its bytes and every slice looks right; "altered" when only some differ, with
    their ids in ``altered``; "incomplete" when no case is whole; "not OASIS" for phantoms.
    """

    root: Path
    kind: str
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    wrong_mode: list[str] = field(default_factory=list)
    wrong_size: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    checksums: str = "not OASIS"
    altered: list[int] = field(default_factory=list)

    @property
    def problems(self) -> dict[str, list[str]]:
        """Kind of problem → what is wrong and what to do, without the empty kinds."""
        kinds = {
            "missing": self.missing,
            "corrupt": self.corrupt,
            "wrong mode": self.wrong_mode,
            "wrong size": self.wrong_size,
            "split leakage": self.leaks,
            "odd pixels": self.odd,
        }
        return {kind: lines for kind, lines in kinds.items() if lines}

    @property
    def ok(self) -> bool:
        return not self.problems and self.checksums != "altered"

    def __str__(self) -> str:
        lines = [f"{'OASIS' if self.kind == 'oasis' else 'phantoms'}: {'ok' if self.ok else 'PROBLEMS'}"]
        lines += [f"  {s:<9} {n:>6,} slices {c:>4} cases" for s, (n, c) in self.counts.items()]
        for kind, found in self.problems.items():
            lines.append(f"  {kind}: {len(found)}")
            lines += [f"    {line}" for line in found[:5]]
            if len(found) > 5:
                lines.append(f"    … and {len(found) - 5} more")
        lines.append(f"  checksums: {self._verdict}")
        return "\n".join(lines)

    @property
    def _verdict(self) -> str:
        if self.checksums == "altered":
            return f"altered: cases {_first(self.altered)}"
        if self.kind != "oasis":
            return self.checksums
        words = {
            "unmodified": "complete and unmodified",
            "incomplete": "no case is whole, so nothing could be compared",
            "re-encoded": "complete, re-encoded (all bytes differ, all slices look right)",
        }[self.checksums]
        return (
            words
            if self.ok
            else words.replace("complete and", "what is there is").replace("complete,", "what is there is")
        )


def _first(cases: list[int]) -> str:
    return ", ".join(map(str, cases[:8])) + (f" … ({len(cases)} in all)" if len(cases) > 8 else "")


def check_dataset(root: str | Path) -> DatasetReport:
    """Read every file of a data set and report what is wrong with it.

    Looks for missing folders, slices and partners, PNGs that do not decode, a mode other than
    L, a size other than 256×256, pixels that no such slice has, and cases in two splits. Each
    case of a course set is also compared with the checksums shipped in ``oasis_png_cases.csv``,
    each case of a converted set with what was converted. Raises as :func:`find_data` if
    there is no data set at ``root``.
    """
    location = _locate(Path(root).expanduser())
    report = DatasetReport(location.root, location.kind)
    known = _known_cases(location)
    cases_of: dict[int, list[str]] = defaultdict(list)
    digests: dict[int, dict[str, list[str]]] = defaultdict(lambda: {"case": [], "seg": []})
    jobs = []
    for split in SPLITS:
        found = {}
        for prefix, masks in (("case", False), ("seg", True)):
            folder = location.folder(split, masks)
            if not folder.is_dir():
                report.missing.append(f"folder {folder.name}: unpack the archive again")
                found[prefix] = {}
            else:
                found[prefix] = slices_in(folder, prefix)
        images, masks = found["case"], found["seg"]
        per_case = Counter(case for case, _ in images)
        report.counts[split] = (len(images), len(per_case))
        for case in per_case:
            cases_of[case].append(split)
        seg_folder = f"{DATASET_FOLDER}_seg_{split}"
        folder = f"{DATASET_FOLDER}_{split}"
        if location.folder(split, masks=True).is_dir():
            report.missing += [
                f"{seg_folder}/{mask_name(*k)}: the mask of a slice that is there"
                for k in images
                if k not in masks
            ]
        if location.folder(split).is_dir():
            report.missing += [
                f"{folder}/{image_name(*k)}: the image of a mask that is there"
                for k in masks
                if k not in images
            ]
        expected = max(per_case.values(), default=0)
        if known:
            expected = max(expected, *(slices for slices, _ in known.values()))
        for case, number in per_case.items():
            have = {index for c, index in images if c == case}
            if number < expected or max(have) >= expected:
                gone = [
                    i for i in range(max(expected, max(have) + 1)) if i not in have and (case, i) not in masks
                ]
                report.missing += [f"{folder}/{image_name(case, i)}: a gap in the case" for i in gone]
        jobs += [(prefix, key, path) for prefix in found for key, path in found[prefix].items()]
    for case, splits in sorted(cases_of.items()):
        if len(splits) > 1:
            report.leaks.append(f"case {case:03d} is in {' and '.join(splits)}: keep it in one split")

    for prefix, (case, _), path in tqdm(jobs, desc="checking", unit="file", disable=len(jobs) < 5000):
        _check_file(path, report, prefix, like_course=known is not None)
        if known is not None:
            with path.open("rb") as file:
                digests[case][prefix].append(hashlib.file_digest(file, "sha256").hexdigest())
    if known is not None:
        _compare_checksums(digests, known, report)
    return report


def _check_file(path: Path, report: DatasetReport, prefix: str, like_course: bool) -> None:
    name = f"{path.parent.name}/{path.name}"
    try:
        pixels = np.asarray(read_png(path))
    except WrongMode as error:
        report.wrong_mode.append(f"{name}: {error}")
        return
    except WrongSize as error:
        report.wrong_size.append(f"{name}: {error}")
        return
    except OSError as error:
        report.corrupt.append(f"{name}: {str(error).replace(str(path), path.name)}; copy it again")
        return
    if prefix == "seg" and not np.isin(pixels, MASK_VALUES).all():
        report.odd.append(f"{name}: values other than {', '.join(map(str, MASK_VALUES))}; copy it again")
    if like_course and prefix == "case" and pixels.max() != 255:
        report.odd.append(f"{name}: its maximum is {pixels.max()}, should be 255; copy it again")
    border = pixels.copy()
    border[40:-40, 24:-24] = 0
    if like_course and border.any():
        report.odd.append(f"{name}: something outside the middle 176×208 pixels; copy it again")


def _known_cases(location: DataLocation) -> dict[int, tuple[int, tuple[str, ...]]] | None:
    """Number of slices and digests that each case should have; None if nobody knows them."""
    if location.kind == "phantoms":
        return None
    plan = location.root / "conversion.json"
    if not plan.exists() or json.loads(plan.read_text(encoding="utf-8"))["format"] == "course":
        return {
            case: (int(row["slices"]), (row["images_sha256"], row["masks_sha256"]))
            for case, row in course_cases().items()
        }
    from .convert import read_rows  # it needs nibabel, and few need it

    return {case: (row.images, (row.sha256,)) for case, row in read_rows(location.root).items()}


def _compare_checksums(
    digests: dict[int, dict[str, list[str]]],
    known: dict[int, tuple[int, tuple[str, ...]]],
    report: DatasetReport,
) -> None:
    def of(hashes: list[str]) -> str:
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def equal(case: int) -> bool:
        found, (_, wanted) = digests[case], known[case]
        if len(wanted) == 1:  # a converted set notes images and masks together
            return of(found["case"] + found["seg"]) == wanted[0]
        return (of(found["case"]), of(found["seg"])) == wanted

    if absent := sorted(set(known) - set(digests)):
        report.missing.append(f"cases {_first(absent)}: copy or convert them again")
    present = sorted(set(known) & set(digests))
    whole = [case for case in present if len(digests[case]["case"]) == known[case][0]]
    differing = [case for case in whole if not equal(case)]
    strangers = sorted(set(digests) - set(known))
    if differing == whole and not strangers and not report.odd and len(whole) > 1:
        report.checksums = "re-encoded"
    elif differing or strangers:
        report.checksums, report.altered = "altered", sorted(differing + strangers)
    else:
        report.checksums = "unmodified" if whole else "incomplete"
