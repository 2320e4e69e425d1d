"""Kaggle's JPEGs of OASIS-1 ("imagesoasis") in; slices in the course set's layout, out.

Files are ``Data/<class>/OAS1_0308_MR1_mpr-1_105.jpg``: subject, session, repeat scan, slice (100 to 160).
A session has three or four repeat scans, so the slices of one person stand there several times over. The
split goes by the subject, with the course's splits, and one scan of each is taken: the first session's first
that is whole; the others are not looked at. The class is the clinical dementia rating: ``Non Demented`` 0,
``Very mild Dementia`` 0.5, ``Mild Dementia`` 1, ``Moderate Dementia`` 2. (The young, whom nobody rated, seem
to stand under ``Non Demented``, too; OASIS's own table tells them apart.) There are no masks.

Geometry, as far as it can be told without a pixel or the author's script. A JPEG of 496×248 is a picture
that matplotlib drew in a figure of its usual size, 640 wide, of which a plot has 0.775; its 2:1 is an array
of 128×256. A raw scan of OASIS-1 has 256×256 voxels of 1 mm and 128 of 1.25 mm from side to side (Marcus et
al. 2007). So a JPEG shows 160 mm from its upper to its lower edge and 256 mm from left to right, and the head
looks longer than it is; here a pixel is 1 mm both ways. Of the 61 slices, taken to be 1 mm apart, the middle
32 are used: slice K is JPEG 114 + K. They lie where the person lay in the scanner and not in an atlas, so
slice K of two people need not show the same height. The head is moved to the middle of the 176×208 pixels,
what reaches beyond is cut, and nothing is turned. Taken on trust: that the front of the head is to the right,
and that numbers grow upwards.
"""

from __future__ import annotations

import io
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from tqdm.auto import tqdm

from ..layout import COLS, PLANES, ROWS, DataLocation, check_space, image_name, pad, png_bytes, read_png
from .archives import ArchiveDamaged, ArchiveRefused, Member
from .cases import Unusable, split_of
from .convert import ConversionReport, scaled
from .sources import Source, form_of, walk
from .subjects import Subject, load_subjects, write_subjects
from .target import claimed, finished_bytes
from .volumes import CASE_BYTES, what_lacks

VERSION = 1  # raise when the same source would no longer give the same bytes
CLASSES = {"Non Demented": 0.0, "Very mild Dementia": 0.5, "Mild Dementia": 1.0, "Moderate Dementia": 2.0}
FIRST = 114  # the JPEG of slice 0
_PLOT = (496, 248)  # width and height of a JPEG
_FIELD = (160, 256)  # mm that it shows: from side to side, and along the head
_LARGEST = 2**20  # bytes of a JPEG; they have about 15 kB

_NAME = re.compile(
    r"(?P<scan>OAS1_(?P<case>\d{4})_MR(?P<session>\d+)_mpr-(?P<repeat>\d+))_(?P<slice>\d+)"
    r"(?P<copy>(?: ?\(\d+\)| - copy.*)?)\.jpe?g",
    re.IGNORECASE,
)
_CDR = {"non": 0.0, "verymild": 0.5, "mild": 1.0, "moderate": 2.0}


# ---- the files of a source ----------------------------------------------------------------------


@dataclass
class _Person:
    """The JPEGs of one subject: slice → file for each (session, repeat), and the classes they lie in."""

    scans: dict[tuple[int, int], dict[int, Member]] = field(default_factory=lambda: defaultdict(dict))
    folders: dict[float, str] = field(default_factory=dict)


@dataclass
class _Found:
    people: dict[int, _Person] = field(default_factory=lambda: defaultdict(_Person))
    copies: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)  # whose names do not say what they show
    others: list[str] = field(default_factory=list)


def _every_file(found: Source, problems: list[str]) -> Iterator[Member]:
    """The files of a folder and of the zips in it, whatever their names; broken zips go to ``problems``."""
    for part in found.parts:
        if part.kind == "folder":
            for file in walk(part.path):
                name = file.relative_to(part.path.parent).as_posix()
                if form_of(name) == "archive":
                    continue
                try:
                    yield Member(name, file.stat().st_size, file.read_bytes)
                except FileNotFoundError:
                    line = f"{file} is a link to something that is not there."
                    problems += [line] if line not in problems else []
        elif part.kind == "zip":
            try:
                yield from part.members()
            except (ArchiveDamaged, ArchiveRefused, OSError) as error:
                problems.append(str(error))
        else:
            problems.append(f"{part.path} is a tar and was not looked into: if it holds JPEGs, unpack it.")


def _class_of(name: str) -> tuple[float, str] | None:
    """The rating that a folder of a path stands for, and the folder's name; None if none is a class."""
    for folder in reversed(name.split("/")[:-1]):
        letters = re.sub("[^a-z]", "", folder.lower())
        if match := re.fullmatch("(non|verymild|mild|moderate)dement(?:ed|ia)", letters):
            return _CDR[match[1]], folder
    return None


def _sorted_out(files: Iterable[Member]) -> _Found:
    found, named = _Found(), []
    for member in files:
        name = member.name.rsplit("/", 1)[-1]
        if match := _NAME.fullmatch(name):
            named.append((bool(match["copy"]), match, member))
        elif re.search(r"\.(?:jpe?g|png|gif|bmp|tiff?)$", name, re.IGNORECASE):
            found.pictures.append(member.name)
        else:
            found.others.append(member.name)
    named.sort(key=lambda entry: entry[0])  # a copy stands in where the first lacks
    for _, match, member in named:
        person = found.people[int(match["case"])]
        if of := _class_of(member.name):
            person.folders[of[0]] = of[1]
        slices = person.scans[int(match["session"]), int(match["repeat"])]
        if int(match["slice"]) in slices:
            found.copies.append(member.name)
        else:
            slices[int(match["slice"])] = member
    return found


# ---- one scan -------------------------------------------------------------------------------------


def _plane(member: Member) -> np.ndarray:
    """What a JPEG shows, grey (160, 256), a pixel a millimetre."""
    name = member.name.rsplit("/", 1)[-1]
    if member.size > _LARGEST:
        raise Unusable(f"{name} has {member.size / 1e6:,.0f} MB, such files have at most 1")
    content = member.read()
    try:
        with JpegImageFile(io.BytesIO(content)) as image:  # as read_png: no other decoder
            size, mode = image.size, image.mode
            pixels = np.asarray(image) if size == _PLOT else None
    except Exception as error:  # Pillow raises many kinds for a file of noise
        raise Unusable(f"{name} is damaged ({str(error)[:80]}); copy it again") from None
    if pixels is None:
        raise Unusable(f"{name} is {size[0]}×{size[1]}, should be 496×248: give the files as downloaded")
    if mode == "RGB":
        if np.ptp(pixels[::4, ::4], axis=2).mean() > 8:  # some pixels tell
            raise Unusable(f"{name} is in colour, should be grey")
        pixels = pixels[:, :, 1]
    elif mode != "L":
        raise Unusable(f"{name} has mode {mode}, should be RGB or L")
    return np.asarray(Image.fromarray(pixels).resize(_FIELD[::-1], Image.Resampling.BICUBIC))


def _centred(planes: np.ndarray) -> np.ndarray:
    """The 176×208 mm around the middle of the head, the same for all of its planes (K, 160, 256)."""
    mean = planes.mean(axis=0)
    head = np.nonzero(mean > mean.max() / 5)  # above the noise of the air
    if not head[0].size:
        raise Unusable("its pictures are black")
    top, left = (
        round((i.min() + i.max() + 1) / 2 + n / 2) for i, n in zip(head, (ROWS, COLS))
    )  # n more for the zeros around, n/2 less for the half of what is cut out
    around = np.pad(planes, ((0, 0), (ROWS, ROWS), (COLS, COLS)))
    return around[:, top : top + ROWS, left : left + COLS]


def _images(slices: dict[int, Member]) -> list[bytes]:
    """The 32 slices of a scan as PNG, or :class:`Unusable` with what is wrong with it."""
    wanted = range(FIRST, FIRST + PLANES)
    if gone := [number for number in wanted if number not in slices]:
        more = f" and {len(gone) - 1} more of slices {FIRST} to {FIRST + PLANES - 1}" if len(gone) > 1 else ""
        raise Unusable(f"slice {gone[0]}{more} {'are' if more else 'is'} missing; copy the scan again")
    planes = _centred(np.stack([_plane(slices[number]) for number in wanted]))
    return [png_bytes(pad(scaled(plane, f"slice {k}"))) for k, plane in enumerate(planes)]


def _first_whole(case: int, person: _Person, left_out: list[str]) -> list[bytes]:
    """The slices of a subject's first scan that can be used, none if there is none."""
    for (session, repeat), slices in sorted(person.scans.items()):
        try:
            return _images(slices)
        except (Unusable, ArchiveDamaged, OSError) as error:
            left_out.append(f"OAS1_{case:04d}_MR{session}_mpr-{repeat}: {error}")
    return []


# ---- the whole ------------------------------------------------------------------------------------


def convert_kaggle(
    source: Source, root: Path, people: dict[int, Subject] | None = None, *, force: bool = False
) -> ConversionReport:
    """Bring Kaggle's JPEGs of OASIS-1 into the course's layout; see :func:`.convert.convert`.

    The rating that each class stands for goes to ``subjects.csv``; ``people``, OASIS's own table, has
    more and comes first. Raises ``ValueError`` if no file name tells whose slice it is, and
    ``FileExistsError`` rather than overwrite something (unless ``force``).
    """
    problems = list(source.problems)
    found = _sorted_out(_every_file(source, problems))
    if not found.people:
        if problems:
            raise ValueError(problems[0])
        pictures = f"{len(found.pictures):,} pictures like {found.pictures[0]}"
        raise ValueError(
            f"{source.path} holds {pictures}, and no name says whose head it is, so no split can keep a "
            "person's slices on one side (Kaggle's Alzheimer MRI Preprocessed is such a set). Use a form "
            "that names subjects: Kaggle's imagesoasis, or nilearn-oasis, which is fetched for you."
        )
    there = 0 if force else finished_bytes(root)
    check_space(root, max(0, CASE_BYTES * len(found.people) - there), "the slices")
    plan = {"version": VERSION, "format": "kaggle"}
    with claimed(root, plan, source=source.path, force=force) as target:
        report = ConversionReport(DataLocation(root, "oasis"), str(source.path), kept=len(target.rows))
        report.left_out += problems
        known = {} if force else load_subjects(root) or {}
        every = tqdm(sorted(found.people.items()), desc="converting", unit="subject", file=sys.stderr)
        for case, person in every:
            if len(person.folders) > 1:
                named = " and ".join(person.folders[cdr] for cdr in sorted(person.folders))
                report.left_out.append(f"case {case:03d} is in {named}; keep it in one class")
                continue
            if people is not None and case in people:
                known[case] = people[case]
            elif person.folders:
                known[case] = Subject(None, None, next(iter(person.folders)))
            if case in target.rows:
                continue
            if images := _first_whole(case, person, report.left_out):
                target.add(case, split_of(case), images, [])
                report.converted += 1
        if known := {case: of for case, of in known.items() if case in target.rows}:
            write_subjects(root, known)
        if found.pictures:
            report.left_out.append(
                f"{len(found.pictures):,} pictures whose names tell no subject and slice, the first is "
                f"{found.pictures[0]}"
            )
        report.notes += _notes(found, people, target.rows)
        if not target.rows:
            report.left_out.append(f"{source.path}: no scan could be used")
    return report


def _notes(found: _Found, people: dict[int, Subject] | None, rows: dict) -> Iterator[str]:
    if several := sum(len(person.scans) > 1 for person in found.people.values()):
        yield f"{several} subjects have several scans: the first session's first whole one is taken"
    if found.copies:
        yield f"{len(found.copies):,} files are there again and passed over, the first is {found.copies[0]}"
    if found.others:
        yield f"{len(found.others):,} files are no pictures and passed over, the first is {found.others[0]}"
    there = {cdr for person in found.people.values() for cdr in person.folders}
    for name, cdr in CLASSES.items():
        if there and cdr not in there:
            yield f"there is no folder {name}: nobody here has CDR {cdr:g}"
    if bare := [case for case, person in sorted(found.people.items()) if not person.folders]:
        yield f"{len(bare)} cases are in no class's folder (the first is {bare[0]}): their CDR is not known"
    for case, person in sorted(found.people.items()):
        rated = people[case].cdr if people is not None and case in people else None
        if rated is not None and person.folders and rated not in person.folders:
            (folder,) = list(person.folders.values())[:1]
            yield f"case {case:03d} is in {folder}, the table says CDR {rated:g}: the table is taken"
    if people is not None and (unknown := sorted(set(found.people) - set(people))):
        yield f"{len(unknown)} cases are not in the table, the first is {unknown[0]}: the class is known"
    if rows:
        yield "that the front of the head is to the right and slices run upwards is taken on trust: look"
        yield from what_lacks(rows, "Kaggle's JPEGs bring none")


# ---- a set in this form from phantoms ---------------------------------------------------------------


def write_like_kaggle(
    folder: Path,
    location: DataLocation,
    classes: dict[int, str],
    *,
    scans: int = 3,
    planes: range = range(PLANES),
) -> None:
    """Write training cases of a set as Kaggle's JPEGs: each case into the folder of its class.

    Repeat scans differ as those of one person who lay still but for a millimetre: by shift and noise. A
    case has the JPEGs of ``planes`` alone. Data to test and teach with; ``classes``: folder names by case.
    """
    top, left = ((256 - n) // 2 for n in _FIELD)
    for case, name in classes.items():
        rng = np.random.default_rng(case)
        (folder / name).mkdir(parents=True, exist_ok=True)
        shifts = rng.integers(-1, 2, (scans, 2))
        for k in planes:
            stored = np.asarray(read_png(location.train / image_name(case, k)), np.float64)
            shown = stored[top : 256 - top, left : 256 - left]
            for scan, shift in enumerate(shifts, 1):
                moved = np.roll(shown, shift, axis=(0, 1))
                noisy = np.hypot(moved + rng.normal(0, 4, moved.shape), rng.normal(0, 4, moved.shape))
                grey = Image.fromarray((noisy * 255 / noisy.max()).astype(np.uint8))
                drawn = grey.resize((256, 128)).resize(_PLOT).convert("RGB")  # voxels, then the plot
                drawn.save(folder / name / f"OAS1_{case:04d}_MR1_mpr-{scan}_{FIRST + k}.jpg", quality=95)
