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

import csv
import hashlib
import io
import json
import logging
import os
import re
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import joblib
import nibabel
import numpy as np
from tqdm.auto import tqdm

from ..layout import (
    COLS,
    DATASET_FOLDER,
    PLANES,
    ROWS,
    SPLITS,
    DataLocation,
    WrongMode,
    WrongSize,
    check_space,
    course_cases,
    image_name,
    make_folders,
    mask_name,
    pad,
    png_bytes,
    read_png,
    remove_leftovers,
    write_file,
)
from .archives import ArchiveDamaged, ArchiveRefused, Member, kind_of, members
from .subjects import read_subjects, write_subjects

FORMATS = ("course", "oasis1", "neurite", "kaggle")
VERSION = 1  # raise when the same source would no longer give the same bytes
T88 = (ROWS, COLS, 176)
FIRST_PLANE = 90 - 17  # of the T88 volume, counted from 0: slice 17 is OASIS's tra_90
NEURITE = (160, 192)
_NEURITE_TISSUE = np.array([0, 2, 2, 3, 1], np.uint8)  # background, cortex, deep grey, white, CSF
# Bytes of one file. A PNG has about 20 kB, a T88 volume in float64 52 MB, a packed neurite slice 25 kB.
_LARGEST = {"course": 2**20, "oasis1": 52 * 2**20, "neurite": 2**20}
_LARGEST_NIFTI = 2**22  # bytes unpacked; a neurite slice in float64 has 250 kB
_PENDING = 24  # subjects of a stream that may wait for their last file

_NAMES = {
    "course": re.compile(
        rf"(?:^|/){DATASET_FOLDER}_(?:seg_)?(train|validate|test)/(case|seg)_(\d{{1,4}})_slice_(\d{{1,3}})(?:\.nii)?\.png$",
        re.IGNORECASE,
    ),
    "oasis1": re.compile(
        r"(?:^|/)OAS1_(\d{4})_MR(\d+)_mpr_n\d+_anon_111_t88_((?:masked_)?gfc(?:_fseg)?)\.(img|hdr)$"
    ),
    "neurite": re.compile(r"(?:^|/)OASIS_OAS1_(\d{4})_MR(\d+)/slice_(norm|seg4)\.nii\.gz$"),
    "kaggle": re.compile(
        r"(?:^|/)(?:OAS1_\d{4}_MR\d+_mpr-\d+_\d+|"
        r"[ _-]*(?:non|very[ _-]*mild|mild|moderate)[ _-]*dement(?:ed|ia) */)[^/]*\.jpe?g$",
        re.IGNORECASE,
    ),
}
# What is wrong with a header is said once, in the report.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
_EXAMPLES = {
    "course": "keras_png_slices_train/case_001_slice_0.nii.png",
    "oasis1": "OAS1_0001_MR1_mpr_n4_anon_111_t88_gfc.img",
    "neurite": "OASIS_OAS1_0001_MR1/slice_norm.nii.gz",
    "kaggle": "Mild Dementia/OAS1_0028_MR1_mpr-1_100.jpg",
}


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


class _Unusable(ValueError):
    """One case cannot be used; the others can."""


@dataclass
class _Case:
    """One subject of a source: its files by role, each read when it is needed."""

    case: int
    parts: dict[tuple, Callable[[], bytes]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CaseRow:
    """One line of ``conversion.csv``: a case that is whole."""

    case: int
    split: str
    images: int
    masks: int
    sha256: str  # of the newline-joined SHA-256 of its files, images before masks, in slice order


# ---- the files of a source ----------------------------------------------------------------------


def _archives_in(folder: Path) -> list[Path]:
    found = [p for p in folder.iterdir() if p.name.endswith((".tar.gz", ".tgz", ".tar", ".zip"))]
    return sorted(found, key=lambda p: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", p.name)])


def _folder_members(folder: Path, every: bool = False) -> Iterator[Member]:
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(place, name)
            relative = path.relative_to(folder.parent).as_posix()
            if path.is_file() and (every or any(p.search(relative) for p in _NAMES.values())):
                yield Member(relative, path.stat().st_size, path.read_bytes)


def _members_of(source: Path) -> Iterator[tuple[Path, Member]]:
    """Every file of a source, whatever its form, with the archive or folder it came from."""
    if source.is_file():
        yield from ((source, member) for member in members(source))
        return
    found = False
    for member in _folder_members(source):
        found = True
        yield source, member
    if not found:
        for archive in _archives_in(source):
            yield from ((archive, member) for member in members(archive))


def recognise(source: Path, formats: Sequence[str] = FORMATS) -> str:
    """Which of ``formats`` the source has, from the first file name that tells.

    Raises ``FileNotFoundError`` if there is none.
    """
    if not source.exists():
        raise FileNotFoundError(
            f"{source} does not exist. Give the zip, disc archive, tar or folder you have."
        )
    with closing(_members_of(source)) as found:
        for _, member in found:
            for name in formats:
                if _NAMES[name].search(member.name):
                    return name
    named = " or ".join(_EXAMPLES[name] for name in formats)
    raise FileNotFoundError(
        f"{source} holds no file named like {named}. Is it the right file, and is it whole?"
    )


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
        recognise(source)
    except (FileNotFoundError, ArchiveDamaged, ArchiveRefused, ValueError):
        return "volumes" if find_scans(source) else None
    return None


def _role(format: str, name: str, stripped: bool) -> tuple[int, tuple] | None:
    """Case id and role of a file, or None if it is not needed."""
    match = _NAMES[format].search(name)
    if match is None or name.rsplit("/", 1)[-1].startswith("._"):
        return None
    if format == "course":
        split, prefix, case, index = match.groups()
        return int(case), (prefix.lower(), int(index), split.lower())
    case, session = int(match[1]), int(match[2])
    if session != 1:  # a repeat scan of the same person
        return None
    if format == "neurite":
        return case, (match[3],)
    wanted = {"masked_gfc" if stripped else "gfc": "volume", "masked_gfc_fseg": "mask"}
    role = wanted.get(match[3])
    return (case, (role, match[4])) if role else None


def _add(found: _Case, role: tuple, member: Member, largest: int, *, at_once: bool) -> None:
    """Note a file of a case; its bytes are read ``at_once`` or when the case is converted."""
    if role in found.parts:
        found.problems.append(f"{member.name} is there twice; keep one of the two")
    if member.size > largest:
        found.problems.append(
            f"{member.name} has {member.size / 1e6:,.0f} MB; such files have at most {largest / 1e6:,.0f}"
        )
    elif at_once:
        content = member.read()
        found.parts[role] = lambda: content
    else:
        found.parts[role] = member.read


def _grouped(source: Path, format: str, stripped: bool, done: set[int], advance) -> Iterator[_Case]:
    """The subjects of a zip or folder: names first, bytes later."""
    cases: dict[int, _Case] = {}
    for _, member in _members_of(source):
        found = _role(format, member.name, stripped)
        if found and found[0] not in done:
            case = cases.setdefault(found[0], _Case(found[0]))
            _add(case, found[1], member, _LARGEST[format], at_once=False)
    for number, case in enumerate(sorted(cases.values(), key=lambda c: c.case), 1):
        yield case
        advance(number / len(cases))


def _streamed(
    archives: list[Path], format: str, stripped: bool, done: set[int], advance, broken: Callable[[str], None]
) -> Iterator[_Case]:
    """The subjects of tar archives, each as soon as its files have come by."""
    complete = {"oasis1": 4, "neurite": 2}[format]
    total = sum(a.stat().st_size for a in archives)
    passed = 0
    for archive in archives:
        pending: dict[int, _Case] = {}
        try:
            for member in members(archive):
                advance((passed + member.position) / total)
                found = _role(format, member.name, stripped)
                if not found or found[0] in done:
                    continue
                case = pending.setdefault(found[0], _Case(found[0]))
                _add(case, found[1], member, _LARGEST[format], at_once=True)
                if len(case.parts) == complete:
                    yield pending.pop(case.case)
                elif len(pending) > _PENDING:
                    yield pending.pop(next(iter(pending)))
        except ArchiveDamaged as error:
            # What came whole is good. The last subject may not be.
            broken(str(error))
            pending.clear()
        yield from pending.values()
        passed += archive.stat().st_size


# ---- one case -------------------------------------------------------------------------------------


def split_of(case: int) -> str:
    """The course's split, and for a case it lacks one drawn from its id: 85, 10 and 5 of 100.

    The draw is the SHA-256 of ``OAS1_NNNN``, so it depends on nothing but the id.
    """
    if known := course_cases().get(case):
        return known["split"]
    draw = int.from_bytes(hashlib.sha256(f"OAS1_{case:04d}".encode()).digest()[:4], "big") % 100
    return SPLITS[(draw >= 85) + (draw >= 95)]


def _course_png(name: str, content: bytes) -> None:
    """Raise unless ``content`` is a slice or mask of the course set."""
    try:
        read_png(io.BytesIO(content))
    except WrongSize as error:
        raise _Unusable(f"{name} is {error}") from None
    except WrongMode as error:
        raise _Unusable(f"{name} has {error}") from None
    except OSError as error:
        raise _Unusable(f"{name} is damaged ({str(error)[:80]}); copy it again") from None


def _from_course(case: _Case) -> tuple[str, dict[str, bytes], list[str]]:
    splits = {split for _, _, split in case.parts}
    if len(splits) > 1:
        raise _Unusable(f"it is in {' and '.join(sorted(splits))}; keep it in one split")
    (split,) = splits
    images, masks = {}, {}
    for (prefix, index, _), read in sorted(case.parts.items(), key=lambda item: item[0]):
        name = (image_name if prefix == "case" else mask_name)(case.case, index)
        (images if prefix == "case" else masks)[index] = content = read()
        _course_png(name, content)
    if not images:
        raise _Unusable("it has masks and no image")
    if gaps := sorted(set(range(max(PLANES, len(images)))) - set(images)):
        raise _Unusable(f"slices {', '.join(map(str, gaps[:8]))} are missing; copy the case again")
    notes = []
    if set(masks) != set(images):
        notes.append(f"case {case.case:03d} has {len(images)} images and {len(masks)} masks")
    files = {f"{DATASET_FOLDER}_{split}/{image_name(case.case, k)}": images[k] for k in sorted(images)}
    files |= {f"{DATASET_FOLDER}_seg_{split}/{mask_name(case.case, k)}": masks[k] for k in sorted(masks)}
    return split, files, notes


def _analyze(case: _Case, role: str) -> np.ndarray:
    """The T88 volume of one role, ``(176, 208, 176)``, its axes in the order of the file."""
    header, image = case.parts.get((role, "hdr")), case.parts.get((role, "img"))
    if header is None or image is None:
        gone, there = ("hdr", "img") if header is None else ("img", "hdr")
        raise _Unusable(f"the .{gone} beside the .{there} of the {role} is missing; unpack it again")
    try:
        parsed = nibabel.AnalyzeHeader.from_fileobj(io.BytesIO(header()), check=False)
        shape, dtype = parsed.get_data_shape(), parsed.get_data_dtype()
        offset = int(parsed.get_data_offset())
    except Exception as error:  # nibabel raises many kinds for a header of noise
        raise _Unusable(f"the header of the {role} cannot be read ({str(error)[:80]})") from None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if shape != T88:
        raise _Unusable(f"the {role} is {'×'.join(map(str, shape))}, should be {'×'.join(map(str, T88))}")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise _Unusable(f"the {role} has values of type {dtype}, should be whole or real numbers")
    content = image()
    needed = int(np.prod(T88)) * dtype.itemsize
    if offset < 0 or len(content) != offset + needed:
        raise _Unusable(
            f"the .img of the {role} has {len(content):,} bytes, its header says {offset + needed:,}"
        )
    volume = np.frombuffer(content, dtype, offset=offset).reshape(T88, order="F")
    return volume.astype(dtype.newbyteorder("="))


def _scaled(plane: np.ndarray, name: str) -> np.ndarray:
    plane = np.clip(plane.astype(np.float64), 0, None)
    if not np.isfinite(plane).all():
        raise _Unusable(f"{name} holds values that are no numbers")
    if plane.max() == 0:
        raise _Unusable(f"{name} is empty")
    return np.round(plane * (255 / plane.max())).astype(np.uint8)


def _from_oasis1(case: _Case) -> tuple[str, dict[str, bytes], list[str]]:
    volume, notes = _analyze(case, "volume"), []
    head, neck = ((volume[:, :, part] > volume.max() / 10).mean() for part in (np.s_[-30:], np.s_[:30]))
    if head > 1.5 * neck + 0.02:
        notes.append(
            f"case {case.case:03d} has more head above than below: is it stored upside down? Look at it."
        )
    labels = None
    if any(role == "mask" for role, _ in case.parts):
        labels = _analyze(case, "mask")
        if labels.min() < 0 or labels.max() > 3 or (labels != np.round(labels)).any():
            raise _Unusable(
                f"its mask holds values from {labels.min()} to {labels.max()}, should be 0, 1, 2, 3"
            )
    else:
        notes.append(f"case {case.case:03d} has no segmentation (fseg): images without masks")
    split, images, masks = split_of(case.case), {}, {}
    for k in range(PLANES):
        plane = _scaled(volume[:, :, FIRST_PLANE + k], f"plane {FIRST_PLANE + k}")
        images[f"{DATASET_FOLDER}_{split}/{image_name(case.case, k)}"] = png_bytes(pad(plane))
        if labels is not None:
            tissue = (85 * labels[:, :, FIRST_PLANE + k].astype(np.uint8)).astype(np.uint8)
            masks[f"{DATASET_FOLDER}_seg_{split}/{mask_name(case.case, k)}"] = png_bytes(pad(tissue))
    return split, images | masks, notes


def _nifti(name: str, content: bytes) -> np.ndarray:
    unpacker = zlib.decompressobj(wbits=31)
    try:
        raw = unpacker.decompress(content, _LARGEST_NIFTI)
        if unpacker.unconsumed_tail:
            raise _Unusable(f"{name} unpacks to more than {_LARGEST_NIFTI / 1e6:.0f} MB: a bomb")
        if not unpacker.eof:
            raise _Unusable(f"{name} ends early")
        image = nibabel.Nifti1Image.from_bytes(raw)
        shape = tuple(n for n in image.shape if n != 1)
        if shape != NEURITE:
            raise _Unusable(f"{name} is {'×'.join(map(str, image.shape))}, should be 160×192")
        return image.get_fdata().reshape(NEURITE)
    except _Unusable:
        raise
    except Exception as error:  # zlib and nibabel raise many kinds for a file of noise
        raise _Unusable(f"{name} cannot be read ({str(error)[:80]})") from None


def _from_neurite(case: _Case) -> tuple[str, dict[str, bytes], list[str]]:
    if ("norm",) not in case.parts:
        raise _Unusable("slice_norm.nii.gz is missing")
    split, notes = split_of(case.case), []
    image = _scaled(_nifti("slice_norm.nii.gz", case.parts["norm",]()), "slice_norm.nii.gz")
    files = {f"{DATASET_FOLDER}_{split}/{image_name(case.case, 0)}": png_bytes(pad(image))}
    if ("seg4",) in case.parts:
        labels = _nifti("slice_seg4.nii.gz", case.parts["seg4",]())
        if not np.isin(labels, range(5)).all():
            raise _Unusable("slice_seg4.nii.gz holds other values than 0 to 4")
        tissue = 85 * _NEURITE_TISSUE[labels.astype(np.uint8)]
        files[f"{DATASET_FOLDER}_seg_{split}/{mask_name(case.case, 0)}"] = png_bytes(pad(tissue))
    else:
        notes.append(f"case {case.case:03d} has no slice_seg4.nii.gz: an image without mask")
    return split, files, notes


_READERS = {"course": _from_course, "oasis1": _from_oasis1, "neurite": _from_neurite}


def _convert_case(root: Path, format: str, case: _Case) -> tuple[CaseRow | None, list[str], list[str]]:
    """Write one case, or say why not: its row, what was left out, and notes."""
    try:
        if case.problems:
            raise _Unusable(case.problems[0])
        split, files, notes = _READERS[format](case)
    except (_Unusable, ArchiveDamaged, ArchiveRefused, OSError) as error:
        return None, [f"case {case.case:03d}: {error}"], []
    for name, content in files.items():
        write_file(root / name, content)
    digests = "\n".join(hashlib.sha256(content).hexdigest() for content in files.values())
    images = sum("_seg_" not in name for name in files)
    digest = hashlib.sha256(digests.encode()).hexdigest()
    return CaseRow(case.case, split, images, len(files) - images, digest), [], notes


# ---- the whole ------------------------------------------------------------------------------------


def _files_of(root: Path, row: CaseRow) -> Iterator[Path]:
    for k in range(row.images):
        yield root / f"{DATASET_FOLDER}_{row.split}" / image_name(row.case, k)
    for k in range(row.masks):
        yield root / f"{DATASET_FOLDER}_seg_{row.split}" / mask_name(row.case, k)


def read_rows(root: Path) -> dict[int, CaseRow]:
    """The finished cases of a converted set by id, from its ``conversion.csv``."""
    path = root / "conversion.csv"
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        found = (
            CaseRow(int(r["case"]), r["split"], int(r["images"]), int(r["masks"]), r["sha256"])
            for r in csv.DictReader(file)
        )
        return {row.case: row for row in found}


def _write_rows(root: Path, rows: dict[int, CaseRow]) -> None:
    lines = [",".join(f.name for f in fields(CaseRow))]
    lines += [",".join(str(v) for v in asdict(rows[case]).values()) for case in sorted(rows)]
    write_file(root / "conversion.csv", ("\n".join(lines) + "\n").encode())


def _claim(source: Path, root: Path, plan: dict, force: bool) -> None:
    """Take ``root`` for this conversion, or refuse a folder that holds something else."""
    inside = source.is_dir() and root.resolve().is_relative_to(source.resolve())
    if inside:
        raise FileExistsError(f"{root} is inside {source}. Choose a folder outside what you convert.")
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"{root} is a file. Give a folder for the slices.")
    plan_file = root / "conversion.json"
    if plan_file.exists():
        found = json.loads(plan_file.read_text(encoding="utf-8"))
        if found != plan and not force:
            differing = [f"{k} {found.get(k)!r} ≠ {plan[k]!r}" for k in plan if found.get(k) != plan[k]]
            raise FileExistsError(
                f"{root} was converted otherwise ({', '.join(differing)}). Choose another folder, or --force."
            )
    elif root.exists() and any(root.iterdir()) and not force:
        raise FileExistsError(
            f"{root} is not empty. Choose a new folder, or --force to overwrite files of the same name."
        )
    if force:
        for row in read_rows(root).values():
            for path in _files_of(root, row):
                path.unlink(missing_ok=True)
        (root / "conversion.csv").unlink(missing_ok=True)
    make_folders(root)
    write_file(plan_file, (json.dumps(plan, indent=1) + "\n").encode())


# Bytes written for each byte of the source, at most. A case of 32 slices has 1.3 MB, and in an OASIS-1 disc
# 37 MB packed and 110 MB unpacked; a neurite slice has 45 kB of 58.
_GROWTH = {"course": 1.0, "neurite": 1.0, "oasis1": 0.05}
_QUICK = 20 * 2**20  # bytes of a source that is converted in about a second


def _size_of(source: Path) -> int:
    if source.is_file():
        return source.stat().st_size
    return sum(p.stat().st_size for p in source.rglob("*") if p.is_file())


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
        return convert_volumes(source, root, subjects=subjects, workers=workers, force=force, least=least)
    people = read_subjects(Path(subjects).expanduser()) if subjects else None
    format = recognise(source, [format] if format else FORMATS)
    if stripped and format != "oasis1":
        raise ValueError(f"stripped is for OASIS-1 volumes; {source} holds {format} files.")
    if format == "kaggle":
        from .kaggle import convert_kaggle

        return convert_kaggle(source, root, people, force=force)
    size = _size_of(source)
    check_space(root, int(size * _GROWTH[format]), "the slices")
    _claim(source, root, {"version": VERSION, "format": format, "stripped": stripped}, force)
    remove_leftovers(root)

    rows = {c: row for c, row in read_rows(root).items() if all(p.exists() for p in _files_of(root, row))}
    report = ConversionReport(DataLocation(root, "oasis"), str(source), kept=len(rows))
    with tqdm(total=100, desc="converting", unit="%", file=sys.stderr, disable=size < _QUICK) as bar:

        def advance(share: float) -> None:
            bar.update(round(100 * share, 1) - bar.n)

        cases = _cases_of(source, format, stripped, set(rows), advance, report.left_out.append)
        for row, left_out, notes in _in_threads(cases, workers or joblib.cpu_count(), root, format):
            report.left_out += left_out
            report.notes += notes
            if row:
                rows[row.case] = row
                report.converted += 1
                _write_rows(root, rows)
            bar.set_postfix(cases=len(rows))
        advance(1.0)
    _write_rows(root, rows)
    if people is not None:
        write_subjects(root, {c: people[c] for c in sorted(rows) if c in people})
        if unknown := sorted(set(rows) - set(people)):
            report.notes.append(f"{len(unknown)} cases are not in {subjects}, the first is {unknown[0]}")
    report.notes += _empty_splits(rows)
    if not rows:
        report.left_out.append(f"{source}: no case could be used")
    return report


def _empty_splits(rows: dict[int, CaseRow]) -> Iterator[str]:
    for split in SPLITS:
        if rows and not any(row.split == split for row in rows.values()):
            yield (
                f"there is no case for {split} yet, and the notebooks need all three splits. "
                "The course holds out ids from 402: convert the later discs into the same folder"
            )


def _cases_of(
    source: Path, format: str, stripped: bool, done: set[int], advance, broken: Callable[[str], None]
) -> Iterator[_Case]:
    """The subjects of a source: of tars as they come by, of a zip or folder by their names."""
    archives = [source] if source.is_file() else _archives_in(source)
    has_tree = source.is_dir() and next(_folder_members(source), None) is not None
    if not archives or has_tree or kind_of(archives[0]) == "zip":
        return _grouped(source, format, stripped, done, advance)
    if format == "course":
        raise ValueError(f"{source} holds PNGs in a tar. Unpack it and give the folder.")
    return _streamed(archives, format, stripped, done, advance, broken)


def _in_threads(cases: Iterator[_Case], workers: int, root: Path, format: str):
    """Convert while the next cases are read; the results in order, few cases in memory at a time."""
    running: deque[Future] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for case in cases:
                running.append(pool.submit(_convert_case, root, format, case))
                if len(running) > workers + 1:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
