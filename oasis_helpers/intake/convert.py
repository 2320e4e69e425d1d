"""Whatever form of OASIS a learner has, in; the course set's layout, out.

Four sources are recognised by their file names:

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

import hashlib
import io
import logging
import sys
import tempfile
import threading
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
    course_cases,
    image_name,
    mask_name,
    pad,
    png_bytes,
    read_png,
)
from .archives import ArchiveDamaged, ArchiveRefused, Member
from .scans import ScanUnusable
from .sources import FORMATS, NAMES, Part, Source, find_source, form_of, passed_over, recognise
from .subjects import join_subjects, read_subjects
from .t88 import LARGEST, T88, gunzipped, misplaced, read_t88
from .target import CaseRow, Target, claimed, finished_bytes

__all__ = ["FORMATS", "NEURITE", "T88", "ConversionReport", "convert", "recognise", "split_of"]

VERSION = 1  # raise when the same source would no longer give the same bytes
FIRST_PLANE = 90 - 17  # of the T88 volume, counted from 0: slice 17 is OASIS's tra_90
NEURITE = (160, 192)
_NEURITE_TISSUE = np.array([0, 2, 2, 3, 1], np.uint8)  # background, cortex, deep grey, white, CSF
# Bytes of one file. A PNG has about 20 kB, a packed neurite slice 25 kB.
_LARGEST = {"course": 2**20, "oasis1": LARGEST, "neurite": 2**20}
_LARGEST_NIFTI = 2**22  # bytes unpacked; a neurite slice in float64 has 250 kB
_PENDING = 24  # subjects of a tar whose first files wait in memory for the last; those of more wait on disk
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


class _Unusable(ValueError):
    """One case cannot be used; the others can."""


@dataclass
class _Case:
    """One subject of a source: by role the copies of each file, with their names, read when needed."""

    case: int
    parts: dict[tuple, list[tuple[str, Callable[[], bytes]]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, role: tuple, member: Member, largest: int, read: Callable[[], bytes]) -> None:
        """Note a file, if it is not too large."""
        if member.size > largest:
            size, most = member.size / 1e6, largest / 1e6
            self.problems.append(f"{member.name} has {size:,.0f} MB; such files have at most {most:,.0f}")
        else:
            self.parts.setdefault(role, []).append((member.name, read))

    def read(self, role: tuple) -> bytes:
        """A file's bytes: of several copies those that can be read must agree."""
        found, broken = {}, None
        for name, read in self.parts[role]:
            try:
                content = read()
                if name.lower().endswith(".gz") and role[-1] in ("hdr", "img", "nii"):
                    content = gunzipped(name, content, LARGEST)
                found.setdefault(content, name)
            except (ArchiveDamaged, ScanUnusable, OSError) as error:
                broken = error
        if len(found) > 1:
            one, other = list(found.values())[:2]
            raise _Unusable(f"{one} is there twice; keep one of the two (they differ, the other is {other})")
        if not found:
            raise broken
        if broken:
            self.notes.append(f"case {self.case:03d}: {broken}; another copy of it is used")
        return next(iter(found))

    def is_whole(self, format: str) -> bool:
        """Whether nothing else of it can be in a tar that comes later."""
        if format == "neurite":
            return {("norm",), ("seg4",)} <= self.parts.keys()
        has = self.parts.keys()
        return format == "course" or all(
            (role, "nii") in has or {(role, "hdr"), (role, "img")} <= has for role in ("volume", "mask")
        )


# ---- the files of a source ----------------------------------------------------------------------


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


def _role(format: str, name: str, stripped: bool) -> tuple[int, tuple] | None:
    """Case id and role of a file, or None if it is not needed."""
    match = NAMES[format].search(name)
    if match is None:
        return None
    if format == "course":
        split, prefix, case, index = match.groups()
        return int(case), (prefix.lower(), int(index), (split or split_of(int(case))).lower())
    case, session = int(match[1]), int(match[2])
    if session != 1:  # a repeat scan of the same person
        return None
    if format == "neurite":
        return case, (match[3].lower(),)
    wanted = {"masked_gfc" if stripped else "gfc": "volume", "masked_gfc_fseg": "mask"}
    role = wanted.get(match[3].lower())
    return (case, (role, match[4].lower())) if role else None


class _Shelf:
    """Bytes that wait in a file without a name, which is gone when the process is."""

    def __init__(self, folder: Path):
        self._folder, self._file, self._lock = folder, None, threading.Lock()

    def put(self, content: bytes) -> Callable[[], bytes]:
        """Where to get ``content`` back."""
        with self._lock:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - as long as this
            start = self._file.seek(0, io.SEEK_END)
            self._file.write(content)

        def get() -> bytes:
            with self._lock:
                self._file.seek(start)
                return self._file.read(len(content))

        return get


@dataclass
class _Reading:
    """The subjects of a source, as its parts are read, and what there is to say about the parts.

    ``rows`` are the cases that are whole and need no reading, more and more of them; ``kept`` those of them
    that an earlier conversion made.
    """

    format: str
    stripped: bool
    kept: set[int]
    rows: dict[int, CaseRow]
    shelf: _Shelf
    left_out: list[str]
    notes: list[str]
    waiting: dict[int, _Case] = field(default_factory=dict)  # of files and zips, for what tars may have

    def _look(self, part: Part) -> Iterator[tuple[int, tuple, Member]]:
        """The members of a part that are needed, with case and role; then what else it had is told."""
        forms: dict[str, str] = {}
        for member in part.members():
            found = _role(self.format, member.name, self.stripped)
            if found:
                forms.setdefault(self.format, member.name)
                yield *found, member
            elif form := form_of(member.name):
                forms.setdefault(form, member.name)
        for line, is_loss in passed_over(part, forms, self.format):
            (self.left_out if is_loss else self.notes).append(line)
        if "phantoms" in forms:
            raise ArchiveRefused(f"{part.path} is passed over.")

    def indexed(self, parts: list[Part], more_follow: bool) -> Iterator[_Case]:
        """The subjects of files and zips: names first, bytes later."""
        for part in parts:
            try:
                found = list(self._look(part))
            except (ArchiveDamaged, ArchiveRefused, OSError) as error:
                self.left_out.append(str(error))
                continue
            for case, role, member in found:
                if case not in self.rows:
                    known = self.waiting.setdefault(case, _Case(case))
                    known.add(role, member, _LARGEST[self.format], member.read)
        twice = [c for c, case in self.waiting.items() if any(len(p) > 1 for p in case.parts.values())]
        if twice:
            self.notes.append(
                f"{len(twice)} cases are there more than once, the first is {min(twice)}: each is taken "
                "once, if the copies agree."
            )
        for case in sorted(self.waiting):
            if not more_follow or self.waiting[case].is_whole(self.format):
                yield self.waiting.pop(case)

    def streamed(self, part: Part, advance: Callable[[int], None]) -> Iterator[_Case]:
        """The subjects of a tar, each as soon as its files have come by."""
        pending: dict[int, _Case] = {}
        given, again, before = set(), [], set()
        try:
            for case, role, member in self._look(part):
                advance(member.position)
                if self.format == "course":  # all images first, then all masks
                    self.left_out.append(f"{part.path} holds PNGs in a tar. Unpack it and give the folder.")
                    return
                if case in self.rows and case not in given:
                    before.update({case} - self.kept)
                    continue
                if case in given:
                    again.append(member.name)
                    continue
                if case not in pending:
                    earlier = self.waiting.get(case, _Case(case)).parts
                    pending[case] = _Case(case, {r: list(copies) for r, copies in earlier.items()})
                keep = self.shelf.put if len(pending) > _PENDING else _in_memory
                if member.size <= _LARGEST[self.format]:
                    pending[case].add(role, member, _LARGEST[self.format], keep(member.read()))
                else:
                    pending[case].add(role, member, _LARGEST[self.format], member.read)
                if pending[case].is_whole(self.format):
                    given.add(case)
                    self.waiting.pop(case, None)
                    yield pending.pop(case)
        except (ArchiveDamaged, OSError) as error:
            # What came whole is good. The last subject may not be.
            self.left_out.append(str(error))
            pending.clear()
        for found, what in ((sorted(before), "cases"), (again, "files")):
            if found:
                self.notes.append(
                    f"{part.path} holds {len(found)} {what} once more, the first is {found[0]}: what came "
                    "before them was taken."
                )
        for case in pending:
            self.waiting.pop(case, None)
        yield from pending.values()

    def rest(self) -> Iterator[_Case]:
        """The subjects of files and zips of which no tar had more."""
        yield from (case for _, case in sorted(self.waiting.items()) if case.case not in self.rows)


def _in_memory(content: bytes) -> Callable[[], bytes]:
    return lambda: content


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


_Slices = tuple[str, list[bytes], list[bytes]]  # split, images and masks as PNG, in order


def _from_course(case: _Case) -> _Slices:
    splits = {split for _, _, split in case.parts}
    if len(splits) > 1:
        raise _Unusable(f"it is in {' and '.join(sorted(splits))}; keep it in one split")
    (split,) = splits
    images, masks = {}, {}
    for role in sorted(case.parts):
        prefix, index, _ = role
        name = (image_name if prefix == "case" else mask_name)(case.case, index)
        (images if prefix == "case" else masks)[index] = content = case.read(role)
        _course_png(name, content)
    if not images:
        raise _Unusable("it has masks and no image")
    if gaps := sorted(set(range(max(PLANES, len(images)))) - set(images)):
        raise _Unusable(f"slices {', '.join(map(str, gaps[:8]))} are missing; copy the case again")
    if set(masks) != set(images):
        case.notes.append(f"case {case.case:03d} has {len(images)} images and {len(masks)} masks")
    if masks and sorted(masks) != list(range(len(masks))):
        raise _Unusable("some of its masks are missing, and not the last ones; copy the case again")
    return split, [images[k] for k in sorted(images)], [masks[k] for k in sorted(masks)]


def _scaled(plane: np.ndarray, name: str) -> np.ndarray:
    plane = np.clip(plane.astype(np.float64), 0, None)
    if not np.isfinite(plane).all():
        raise _Unusable(f"{name} holds values that are no numbers")
    if plane.max() == 0:
        raise _Unusable(f"{name} is empty")
    return np.round(plane * (255 / plane.max())).astype(np.uint8)


def _t88(case: _Case, role: str) -> np.ndarray:
    def reader(key: tuple) -> Callable[[], bytes]:
        return lambda: case.read(key)

    return read_t88(role, {key[1]: reader(key) for key in case.parts if key[0] == role})


def _from_oasis1(case: _Case) -> _Slices:
    volume, images, masks = _t88(case, "volume"), [], []
    wrong = misplaced(volume, FIRST_PLANE)
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
            raise _Unusable(
                f"its mask holds values from {labels.min()} to {labels.max()}, should be 0, 1, 2, 3"
            )
    else:
        case.notes.append(f"case {case.case:03d} has no segmentation (fseg): images without masks")
    for k in range(PLANES):
        plane = _scaled(volume[:, :, FIRST_PLANE + k], f"plane {FIRST_PLANE + k}")
        images.append(png_bytes(pad(plane)))
        if labels is not None:
            masks.append(png_bytes(pad(85 * labels[:, :, FIRST_PLANE + k].astype(np.uint8))))
    return split_of(case.case), images, masks


def _nifti(name: str, content: bytes) -> np.ndarray:
    try:
        image = nibabel.Nifti1Image.from_bytes(gunzipped(name, content, _LARGEST_NIFTI))
        shape = tuple(n for n in image.shape if n != 1)
        if shape != NEURITE:
            raise _Unusable(f"{name} is {'×'.join(map(str, image.shape))}, should be 160×192")
        return image.get_fdata().reshape(NEURITE)
    except (_Unusable, ScanUnusable):
        raise
    except Exception as error:  # nibabel raises many kinds for a file of noise
        raise _Unusable(f"{name} cannot be read ({str(error)[:80]})") from None


def _from_neurite(case: _Case) -> _Slices:
    if ("norm",) not in case.parts:
        raise _Unusable("slice_norm.nii.gz is missing")
    image = _scaled(_nifti("slice_norm.nii.gz", case.read(("norm",))), "slice_norm.nii.gz")
    masks = []
    if ("seg4",) in case.parts:
        labels = _nifti("slice_seg4.nii.gz", case.read(("seg4",)))
        if not np.isin(labels, range(5)).all():
            raise _Unusable("slice_seg4.nii.gz holds other values than 0 to 4")
        masks.append(png_bytes(pad(85 * _NEURITE_TISSUE[labels.astype(np.uint8)])))
    else:
        case.notes.append(f"case {case.case:03d} has no slice_seg4.nii.gz: an image without mask")
    return split_of(case.case), [png_bytes(pad(image))], masks


_READERS = {"course": _from_course, "oasis1": _from_oasis1, "neurite": _from_neurite}


def _convert_case(target: Target, format: str, case: _Case) -> tuple[_Case, str | None]:
    """Write one case, or say why not."""
    try:
        if case.problems:
            raise _Unusable(case.problems[0])
        split, images, masks = _READERS[format](case)
    except (_Unusable, ScanUnusable, ArchiveDamaged, ArchiveRefused, OSError) as error:
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
    unpacked tree, neurite-oasis (tar or folder), a T1 volume or a folder of them
    (:mod:`.volumes`; what is less similar to the template than ``least_similarity`` is left out), or
    "nilearn-oasis" (:mod:`.vbm`; ``agree`` to its terms); ``format`` ("course", "oasis1",
    "neurite" or "volumes") overrides what its file names say. ``stripped`` takes OASIS-1's skull-stripped
    volume. ``subjects`` is OASIS's own table (CSV); age, sex and CDR of the cases go
    to ``subjects.csv``. ``workers`` is the number of threads (default: one per CPU).

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

        def make(case: _Case) -> tuple[_Case, str | None]:
            return _convert_case(target, format, case)

        def convert_all(cases: Iterator[_Case]) -> None:
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

        reading = _Reading(
            format, stripped, kept, target.rows, _Shelf(target.root), report.left_out, report.notes
        )
        convert_all(reading.indexed(indexed, bool(tars)))
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


def _in_threads(pool: ThreadPoolExecutor, at_once: int, call: Callable, cases: Iterator[_Case]) -> Iterator:
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
