"""Whatever form of OASIS a learner has, in; the course set's layout, out.

Five sources are recognised by their file names:

``course``
    The course zip ``keras_png_slices_data.zip`` or its unpacked folders, nested or not. PNGs
    are copied byte for byte.
``oasis1``
    OASIS-1 as published: the disc archives (``oasis_cross-sectional_disc1.tar.gz`` …, read as a
    stream, never unpacked), a folder of them, or the unpacked tree. From the T88 volume
    (Analyze 7.5, 176×208×176, 1 mm) come 32 axial planes.
``neurite``
    neurite-oasis (2D): one skull-stripped *coronal* slice a subject. Another plane and
    another contrast, so it becomes a data set of its own.
``kaggle``
    Kaggle's JPEGs of OASIS-1, 61 axial slices of each scan (:mod:`.kaggle`).

Geometry of ``oasis1``. The header's orientation is not trusted; axes are taken as Analyze 7.5
defines them for "transverse unflipped": the first runs left–right, the second from
posterior to anterior, the third from inferior to superior. A slice shows the first axis as
rows and the second as columns, so anterior is to the right, padded to 256×256 by 40 rows and 24
columns on each side. Plane indices count from 0. Slice 17 is plane 90, the one of OASIS's own
``tra_90`` picture, so slice k is plane 73 + k. Each slice is scaled so that its maximum is
255; masks (FAST: 0 background, 1 CSF, 2 grey, 3 white) are multiplied by 85.

Data: Marcus et al. 2007, J. Cogn. Neurosci. 19(9):1498–1507; neurite-oasis: Hoopes et al. 2021
(HyperMorph, IPMI). Analyze: Mayo Clinic, Analyze 7.5 file format.
"""

from __future__ import annotations

import io
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import joblib
import nibabel
import numpy as np
from tqdm.auto import tqdm

from ..layout import (
    PLANES,
    SPLITS,
    DataLocation,
    WrongMode,
    WrongSize,
    check_space,
    image_name,
    mask_name,
    pad,
    png_bytes,
    read_png,
)
from .archives import ArchiveDamaged, ArchiveRefused
from .cases import Case, Reading, Shelf, Unusable, split_of
from .orientation import misplaced
from .scans import ScanUnusable
from .sources import FORMATS, Part, Source, find_source, recognise
from .subjects import join_subjects, read_subjects
from .t88 import T88, gunzipped, read_t88
from .target import CaseRow, Target, claimed, finished_bytes

__all__ = ["FORMATS", "NEURITE", "T88", "ConversionReport", "convert", "recognise", "split_of"]

VERSION = 1  # raise when the same source would no longer give the same bytes
FIRST_PLANE = 90 - 17  # of the T88 volume, counted from 0: slice 17 is OASIS's tra_90
NEURITE = (160, 192)
_NEURITE_TISSUE = np.array([0, 2, 2, 3, 1], np.uint8)  # background, cortex, deep grey, white, CSF
_LARGEST_NIFTI = 2**22  # bytes unpacked; a neurite slice in float64 has 250 kB
# What is wrong with a header is said once, in the report.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)


@dataclass
class ConversionReport:
    """What :func:`convert` did. ``ok`` is True when nothing was left out.

    ``converted`` counts cases made now, ``kept`` those that were there already. ``left_out``
    names what could not be used, ``notes`` what you should know.
    """

    location: DataLocation
    source: str
    converted: int = 0
    kept: int = 0
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.left_out

    def __str__(self) -> str:
        lines = [f"{self.converted} cases converted, {self.kept} already there: {self.location}"]
        for title, found in (("left out", self.left_out), ("note", self.notes)):
            lines += [f"{title}: {line}" for line in found[:20]]
            if len(found) > 20:
                lines.append(f"{title}: … and {len(found) - 20} more like these")
        return "\n".join([*lines, f'To use it: export OASIS_ROOT="{self.location.root}"'])


def _of_another_kind(source: Path, format: str | None) -> str | None:
    """ "nilearn-oasis" or "volumes" if the source is that and none of FORMATS."""
    if format == "volumes":
        return format
    if str(source) == "nilearn-oasis" and not source.exists():
        return "nilearn-oasis"
    if format is not None or not source.exists():
        return None
    from .scans import find_scans, is_volume

    if source.is_file():
        return "volumes" if is_volume(source) else None
    try:
        find_source(source).recognise()
    except FileNotFoundError:
        return "volumes" if find_scans(source) else None
    return None


# ---- one case -------------------------------------------------------------------------------------


def _course_png(name: str, content: bytes) -> None:
    """Raise unless ``content`` is a slice or mask of the course set."""
    try:
        read_png(io.BytesIO(content))
    except WrongSize as error:
        raise Unusable(f"{name} is {error}") from None
    except WrongMode as error:
        raise Unusable(f"{name} has {error}") from None
    except OSError as error:
        raise Unusable(f"{name} is damaged ({str(error)[:80]}); copy it again") from None


_Slices = tuple[str, list[bytes], list[bytes]]  # split, images and masks as PNG, in order


def _from_course(case: Case) -> _Slices:
    splits = {split for _, _, split in case.parts}
    if len(splits) > 1:
        raise Unusable(f"it is in {' and '.join(sorted(splits))}; keep it in one split")
    (split,) = splits
    images, masks = {}, {}
    for role in sorted(case.parts):
        prefix, index, _ = role
        name = (image_name if prefix == "case" else mask_name)(case.case, index)
        (images if prefix == "case" else masks)[index] = content = case.read(role)
        _course_png(name, content)
    if not images:
        raise Unusable("it has masks and no image")
    if gaps := sorted(set(range(max(PLANES, len(images)))) - set(images)):
        raise Unusable(f"slices {', '.join(map(str, gaps[:8]))} are missing; copy the case again")
    if set(masks) != set(images):
        case.notes.append(f"case {case.case:03d} has {len(images)} images and {len(masks)} masks")
    if masks and sorted(masks) != list(range(len(masks))):
        raise Unusable("some of its masks are missing, and not the last ones; copy the case again")
    return split, [images[k] for k in sorted(images)], [masks[k] for k in sorted(masks)]


def scaled(plane: np.ndarray, name: str) -> np.ndarray:
    """A plane as bytes, its brightest voxel 255, below 0 black. Raises ``Unusable``, which says ``name``."""
    plane = np.clip(plane.astype(np.float64), 0, None)
    if not np.isfinite(plane).all():
        raise Unusable(f"{name} holds values that are no numbers; copy or export it again")
    if plane.max() == 0:
        raise Unusable(f"{name} is empty; copy or export it again")
    return np.round(plane * (255 / plane.max())).astype(np.uint8)


def _t88(case: Case, role: str) -> np.ndarray:
    def reader(key: tuple) -> Callable[[], bytes]:
        return lambda: case.read(key)

    return read_t88(role, {key[1]: reader(key) for key in case.parts if key[0] == role})


def _from_oasis1(case: Case) -> _Slices:
    volume, images, masks = _t88(case, "volume"), [], []
    wrong = misplaced(volume, np.s_[FIRST_PLANE : FIRST_PLANE + PLANES])
    head, neck = ((volume[:, :, part] > volume.max() / 10).mean() for part in (np.s_[-30:], np.s_[:30]))
    if not wrong and head > 1.5 * neck + 0.02:
        wrong = "upside down, for there is more head above than below"
    if wrong:
        case.notes.append(
            f"case {case.case:03d} seems to be stored {wrong}. Look at it, and at its left and right, which "
            "no picture tells."
        )
    labels = None
    if any(role == "mask" for role, _ in case.parts):
        labels = _t88(case, "mask")
        if labels.min() < 0 or labels.max() > 3 or (labels != np.round(labels)).any():
            raise Unusable(
                f"its mask holds values from {labels.min()} to {labels.max()}, should be 0, 1, 2, 3"
            )
    else:
        case.notes.append(f"case {case.case:03d} has no segmentation (fseg): images without masks")
    for k in range(PLANES):
        plane = scaled(volume[:, :, FIRST_PLANE + k], f"plane {FIRST_PLANE + k}")
        images.append(png_bytes(pad(plane)))
        if labels is not None:
            masks.append(png_bytes(pad(85 * labels[:, :, FIRST_PLANE + k].astype(np.uint8))))
    return split_of(case.case), images, masks


def _nifti(name: str, content: bytes) -> np.ndarray:
    try:
        image = nibabel.Nifti1Image.from_bytes(gunzipped(name, content, _LARGEST_NIFTI))
        shape = tuple(n for n in image.shape if n != 1)
        if shape != NEURITE:
            raise Unusable(f"{name} is {'×'.join(map(str, image.shape))}, should be 160×192")
        return image.get_fdata().reshape(NEURITE)
    except (Unusable, ScanUnusable):
        raise
    except Exception as error:  # nibabel raises many kinds for a file of noise
        raise Unusable(f"{name} cannot be read ({str(error)[:80]})") from None


def _from_neurite(case: Case) -> _Slices:
    if ("norm",) not in case.parts:
        raise Unusable("slice_norm.nii.gz is missing")
    image = scaled(_nifti("slice_norm.nii.gz", case.read(("norm",))), "slice_norm.nii.gz")
    masks = []
    if ("seg4",) in case.parts:
        labels = _nifti("slice_seg4.nii.gz", case.read(("seg4",)))
        if not np.isin(labels, range(5)).all():
            raise Unusable("slice_seg4.nii.gz holds other values than 0 to 4")
        masks.append(png_bytes(pad(85 * _NEURITE_TISSUE[labels.astype(np.uint8)])))
    else:
        case.notes.append(f"case {case.case:03d} has no slice_seg4.nii.gz: an image without mask")
    return split_of(case.case), [png_bytes(pad(image))], masks


_READERS = {"course": _from_course, "oasis1": _from_oasis1, "neurite": _from_neurite}


def _convert_case(target: Target, format: str, case: Case) -> tuple[Case, str | None]:
    """Write one case, or say why not."""
    try:
        if case.problems:
            raise Unusable(case.problems[0])
        split, images, masks = _READERS[format](case)
    except (Unusable, ScanUnusable, ArchiveDamaged, ArchiveRefused, OSError) as error:
        return case, f"case {case.case:03d}: {error}"
    target.add(case.case, split, images, masks)
    return case, None


# ---- the whole ------------------------------------------------------------------------------------


# Bytes written for each byte of the source, at most. A case of 32 slices has 1.3 MB, and in an OASIS-1 disc
# 37 MB packed and 110 MB unpacked; a neurite slice has 45 kB of 58.
_GROWTH = {"course": 1.0, "neurite": 1.0, "oasis1": 0.05}
_QUICK = 20 * 2**20  # bytes of a source that is converted in about a second


def convert(
    source: str | Path,
    out: str | Path,
    format: str | None = None,
    *,
    stripped: bool = False,
    subjects: str | Path | None = None,
    workers: int | None = None,
    force: bool = False,
    agree: bool = False,
    least_similarity: float | None = None,
) -> ConversionReport:
    """Bring OASIS into the layout of the course set, whatever form it has.

    ``source`` is the course zip or folder, one OASIS-1 disc archive, a folder of them, the
    unpacked tree, neurite-oasis (tar or folder), Kaggle's JPEGs (zip or folder; :mod:`.kaggle`), a T1
    volume or a folder of them (:mod:`.volumes`; what is less similar to the template than
    ``least_similarity`` is left out), or "nilearn-oasis" (:mod:`.vbm`; ``agree`` to its terms);
    ``format`` ("course", "oasis1", "neurite", "kaggle" or "volumes") overrides what its file names
    say. ``stripped`` takes OASIS-1's skull-stripped volume. ``subjects`` is OASIS's own table (CSV);
    age, sex and CDR of the cases go to ``subjects.csv``. ``workers`` is the number of threads
    (default: one per CPU).

    The split is the course's for the cases it has and :func:`split_of` for the rest; repeat
    sessions are left out. A case is written whole and then noted in ``conversion.csv``, so an
    interrupted call, repeated, makes only what is missing, and several discs can go
    into one ``out`` one after the other.

    Raises ``FileNotFoundError`` if there is nothing of OASIS in ``source``,
    ``FileExistsError`` rather than overwrite something (unless ``force``), ``OSError`` if the
    disk is too full, and ``ArchiveRefused`` (a ``ValueError``) for an archive that is not safe.
    """
    source, root = Path(source).expanduser(), Path(out).expanduser()
    if format is not None and format not in (*FORMATS, "volumes"):
        raise ValueError(f"format is {format!r}: choose one of {', '.join(FORMATS)}, volumes.")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}: give 1 or more.")
    own = _of_another_kind(source, format)
    if own != "volumes" and least_similarity is not None:
        raise ValueError(f"a least similarity is for volumes; {source} holds none that would be registered.")
    if own and stripped:
        raise ValueError(f"stripped is for OASIS-1's T88 volumes, and {source} is something else.")
    if own == "nilearn-oasis":
        from .vbm import convert_vbm

        if subjects:
            raise ValueError("nilearn brings its own table of subjects: leave --subjects out.")
        return convert_vbm(root, agree=agree, force=force)
    if own == "volumes":
        from .volumes import LEAST_SIMILARITY, convert_volumes

        least = LEAST_SIMILARITY if least_similarity is None else least_similarity
        report = convert_volumes(source, root, subjects=subjects, workers=workers, force=force, least=least)
        if source.is_dir():
            passed = find_source(source)
            report.left_out += passed.problems
            report.notes += [
                f"{p.path} is passed over: unpack it." for p in passed.parts if p.kind != "folder"
            ]
        return report
    people = read_subjects(Path(subjects).expanduser()) if subjects else None
    found = find_source(source)
    format = found.recognise([format] if format else FORMATS)
    if stripped and format != "oasis1":
        raise ValueError(f"stripped is for OASIS-1 volumes; {source} holds {format} files.")
    if format == "kaggle":
        from .kaggle import convert_kaggle

        return convert_kaggle(found, root, people, force=force)
    there = 0 if force else finished_bytes(root)
    check_space(root, max(0, int(found.size * _GROWTH[format]) - there), "the slices")
    plan = {"version": VERSION, "format": format, "stripped": stripped}
    with claimed(root, plan, source=source, force=force) as target:
        report = ConversionReport(DataLocation(root, "oasis"), str(source), kept=len(target.rows))
        report.left_out += found.problems
        workers = workers or joblib.cpu_count()
        _convert_parts(found, format, stripped, target, report, workers=workers, force=force)
        report.converted = len(target.rows) - report.kept
        if people is not None and target.rows:
            report.notes += join_subjects(root, people, target.rows, str(subjects))
        report.notes += _empty_splits(target.rows)
        if not target.rows:
            report.left_out.append(f"{source}: no case could be used")
    return report


def _is_safe(tar: Part, report: ConversionReport) -> bool:
    """Whether a tar does nothing that it is refused for, by looking it through."""
    try:
        for _ in tar.members():
            pass
    except ArchiveRefused as error:
        report.left_out.append(str(error))
        return False
    except (ArchiveDamaged, OSError):
        pass  # what comes whole is good
    return True


def _convert_parts(
    source: Source,
    format: str,
    stripped: bool,
    target: Target,
    report: ConversionReport,
    *,
    workers: int,
    force: bool,
) -> None:
    """Convert what is in the parts of a source: first files and zips, then one tar after the other."""
    indexed = [part for part in source.parts if part.kind in ("folder", "zip")]
    tars = [part for part in source.parts if part not in indexed]
    if force:  # what is there goes for the first new case, which must not go again
        tars = [part for part in tars if _is_safe(part, report)]
    kept, failed = set(target.rows), {}
    size, passed = max(source.size, 1), 0
    with (
        tqdm(total=100, desc="converting", unit="%", file=sys.stderr, disable=size < _QUICK) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):

        def advance(position: int) -> None:
            bar.update(round(100 * (passed + position) / size, 1) - bar.n)

        def make(case: Case) -> tuple[Case, str | None]:
            return _convert_case(target, format, case)

        def convert_all(cases: Iterator[Case]) -> None:
            before = set(target.rows)
            try:
                for case, problem in _in_threads(pool, workers + 2, make, cases):
                    report.notes += case.notes
                    if problem:
                        failed.setdefault(case.case, []).append(problem)
                    bar.set_postfix(cases=len(target.rows))
            except ArchiveRefused as error:  # as a whole, so what it gave before goes again
                report.left_out.append(str(error))
                target.withdraw(set(target.rows) - before)

        reading = Reading(
            format, stripped, kept, target.rows, Shelf(target.root), report.left_out, report.notes
        )
        convert_all(reading.indexed(indexed, bool(tars), advance))
        passed = sum(part.size for part in indexed)
        for part in tars:
            convert_all(reading.streamed(part, advance))
            passed += part.size
            advance(0)
        convert_all(reading.rest())
    for case, lines in sorted(failed.items()):
        if case in target.rows:
            report.notes += [f"{line}; another copy of the case was used" for line in lines]
        else:
            report.left_out += lines


def _empty_splits(rows: dict[int, CaseRow]) -> Iterator[str]:
    for split in SPLITS:
        if rows and not any(row.split == split for row in rows.values()):
            yield (
                f"there is no case for {split} yet, and the notebooks need all three splits. "
                "The course holds out ids from 402: convert the later discs into the same folder"
            )


def _in_threads(pool: ThreadPoolExecutor, at_once: int, call: Callable, cases: Iterator[Case]) -> Iterator:
    """Convert while the next cases are read; the results in order, few cases in memory at a time."""
    running: deque[Future] = deque()
    try:
        for case in cases:
            running.append(pool.submit(call, case))
            if len(running) >= at_once:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()
        wait(running)
