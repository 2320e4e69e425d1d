"""Any T1-weighted volume in; 32 axial planes of each subject in the course set's layout, out.

Geometry. Each volume is registered to the ICBM 152 template (:mod:`.registration`) and its planes are cut
where those of a phantom are: pixel (i, j) of slice k shows the MNI point c + (p − c) / 0.972, where p = (i
− 87.5, j − 119.5, 1 + k) mm and c = (0, −16, 17) mm. So rows run from left to right, columns from back to
front, slices from below to above, 1 mm apart in an atlas head (the Talairach atlas is smaller than MNI
space by 0.972). Around these 176×208 pixels are zeros up to 256×256, and each slice is scaled so that its
maximum is 255. The volume is interpolated by cubic splines, a segmentation by its nearest voxel.

One scan a subject is taken: the first that can be used. ``volumes.csv`` says of each case whose it is, from
which file, how similar it is to the template, and where the axes run that the volume was stored with.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path

import joblib
import numpy as np
from scipy import ndimage
from tqdm.auto import tqdm

from ..layout import (
    COLS,
    PLANES,
    ROWS,
    SPLITS,
    DataLocation,
    check_space,
    pad,
    png_bytes,
    write_file,
)
from .cases import Unusable, split_of
from .convert import ConversionReport, scaled
from .phantoms import _CENTRE, _FIRST_Z, _T88_SCALE
from .registration import Fit, need_simpleitk, register
from .scans import Scan, ScanUnusable, Volume, find_scans, read_volume
from .sources import form_of
from .subjects import join_subjects, read_subjects
from .target import CaseRow, claimed, finished_bytes

VERSION = 1  # raise when the same source would no longer give the same bytes
LEAST_SIMILARITY = 0.6
# Of drawn heads a brain without skull that is mirrored front to back still reaches 0.7, what lies well 0.95.
_SURE, _CLEARLY = 0.85, 0.1
CASE_BYTES = 2_500_000  # of 32 slices with their masks, at most
_FIRST_OWN = 50_001  # case ids of subjects who are not of OASIS
_SHARES = {"train": 0.85, "validate": 0.10, "test": 0.05}


def _mni_of_pixels() -> np.ndarray:
    """From (row, column, slice) to MNI mm, (4, 4)."""
    first = np.array([-(ROWS - 1) / 2, _CENTRE[1] - (COLS - 1) / 2, _FIRST_Z])
    matrix = np.diag([1 / _T88_SCALE] * 3 + [1.0])
    matrix[:3, 3] = _CENTRE + (first - _CENTRE) / _T88_SCALE
    return matrix


def course_planes(values: np.ndarray, voxel_of_mni: np.ndarray, order: int) -> np.ndarray:
    """The 32 planes of a volume, (176, 208, 32), zero outside; ``voxel_of_mni`` (4, 4): where it lies."""
    matrix = voxel_of_mni @ _mni_of_pixels()
    corners = np.array(np.meshgrid(*((0, n - 1) for n in (ROWS, COLS, PLANES)), indexing="ij")).reshape(3, -1)
    reached = matrix[:3, :3] @ corners + matrix[:3, 3:]
    # splines are fitted to what is wanted only, and a margin in which its edge fades
    low = np.clip(np.floor(reached.min(axis=1)).astype(int) - 12, 0, np.array(values.shape) - 1)
    high = np.clip(np.ceil(reached.max(axis=1)).astype(int) + 13, low + 1, values.shape)
    part = values[tuple(slice(a, b) for a, b in zip(low, high))]
    return ndimage.affine_transform(
        part, matrix[:3, :3], matrix[:3, 3] - low, output_shape=(ROWS, COLS, PLANES), order=order, cval=0.0
    )


# ---- one volume ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    """The slices of one subject as PNG, how they came about, and what went wrong on the way."""

    scan: Scan | None
    fit: Fit | None
    images: list[bytes]
    masks: list[bytes]
    left_out: list[str]
    notes: list[str]


def _fitted(volume: Volume, least: float) -> tuple[Fit, str | None]:
    fit = register(volume.values, volume.affine, trusted=volume.trusted)
    if fit.similarity >= _SURE or not volume.trusted:
        return fit, None
    other = register(volume.values, volume.affine, trusted=False)
    enough = least if fit.similarity < least else fit.similarity + _CLEARLY
    if other.similarity < enough:
        return (fit if fit.similarity >= least else max(fit, other, key=lambda f: f.similarity)), None
    return other, (
        f"its header is wrong about its axes: they run to {other.axes} by what the volume shows, or to the "
        "mirror image of that: which side is left no picture tells"
    )


def _masks_of(scan: Scan, volume: Volume, fit: Fit) -> list[bytes]:
    path, classes = scan.segmentation
    found = read_volume(path)
    if found.values.shape != volume.values.shape or not np.allclose(found.affine, volume.affine, atol=1e-2):
        raise ScanUnusable("it is on another grid than the volume")
    if not np.isin(found.values, range(4)).all():
        raise ScanUnusable("it holds other values than 0, 1, 2, 3")
    planes = course_planes(np.array(classes, np.uint8)[found.values.astype(int)], fit.matrix, order=0)
    return [png_bytes(pad(85 * planes[:, :, k])) for k in range(PLANES)]


def _make(scans: list[Scan], least: float) -> _Made:
    """The slices of a subject from the first of ``scans`` that can be used."""
    left_out, notes = [], []
    for scan in scans:
        try:
            volume = read_volume(scan.path)
            fit, note = _fitted(volume, least)
            if fit.similarity < least:
                raise ScanUnusable(
                    f"its similarity with the template is {fit.similarity:.2f}, below {least:g}: is it a T1 "
                    "volume of a whole head? If so, take it with a lower --least-similarity"
                )
            planes = np.clip(course_planes(volume.values, fit.matrix, order=3), 0, volume.values.max())
            images = [png_bytes(pad(scaled(planes[:, :, k], f"slice {k}"))) for k in range(PLANES)]
        except (ScanUnusable, Unusable, OSError, MemoryError) as error:
            left_out.append(f"{scan.path}: {error or 'not enough memory'}")
            continue
        masks = []
        if note:
            notes.append(f"{scan.path}: {note}")
        if scan.segmentation:
            try:
                masks = _masks_of(scan, volume, fit)
            except (ScanUnusable, OSError) as error:
                left_out.append(f"{scan.segmentation[0]}: {error}; {scan.subject} has images without masks")
        return _Made(scan, fit, images, masks, left_out, notes)
    return _Made(None, None, [], [], left_out, notes)


# ---- who is who -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class VolumeRow:
    """One line of ``volumes.csv``: where a case comes from, and how well it lies."""

    case: int
    subject: str
    file: str
    similarity: float
    axes: str


def read_volume_rows(root: Path) -> dict[str, VolumeRow]:
    """The cases of a set made from volumes by subject, from its ``volumes.csv``; empty if there is none.

    Raises ``ValueError``, which names the file, if somebody changed it into something else.
    """
    path = root / "volumes.csv"
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {
                r["subject"]: VolumeRow(
                    int(r["case"]), r["subject"], r["file"], float(r["similarity"]), r["axes"]
                )
                for r in csv.DictReader(file)
            }
    except (KeyError, TypeError, ValueError, csv.Error):
        raise ValueError(f"{path} is damaged: convert the volumes again into a new folder.") from None


def _write_volume_rows(root: Path, rows: dict[str, VolumeRow]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, [f.name for f in fields(VolumeRow)], lineterminator="\n")
    table.writeheader()
    table.writerows(asdict(row) for row in sorted(rows.values(), key=lambda r: r.case))
    write_file(root / "volumes.csv", text.getvalue().encode())


def _case_of(subject: str, known: dict[str, VolumeRow]) -> int:
    """The id of a subject: the one it has, OASIS's own number (OASIS-2: 20000 more), or the next free one."""
    if subject in known:
        return known[subject].case
    if match := re.fullmatch(r"OAS([12])_?(\d{4})|OAS(3\d{4})", subject):
        return int(match[3]) if match[3] else int(match[2]) + (20_000 if match[1] == "2" else 0)
    return max([_FIRST_OWN - 1, *(row.case for row in known.values())]) + 1


def _next_split(rows: dict[int, CaseRow]) -> str:
    """The split that lacks a case most: one for each first, then 85, 10 and 5 of 100 (Webster's method)."""
    counts = Counter(row.split for row in rows.values())
    if empty := [split for split in SPLITS if not counts[split]]:
        return empty[0]
    return max(SPLITS, key=lambda split: _SHARES[split] / (2 * counts[split] + 1))


# ---- the whole ------------------------------------------------------------------------------------


def _prepared(jobs: list[list[Scan]], least: float, workers: int) -> Iterator[_Made]:
    yield from joblib.Parallel(workers, return_as="generator", pre_dispatch="n_jobs")(
        joblib.delayed(_make)(scans, least) for scans in jobs
    )


def convert_volumes(
    source: Path,
    root: Path,
    *,
    subjects: str | Path | None = None,
    workers: int | None = None,
    force: bool = False,
    least: float = LEAST_SIMILARITY,
) -> ConversionReport:
    """Bring the T1 volumes of a file or folder into the course's layout; see :func:`.convert.convert`.

    A volume whose similarity with the template (correlation, at most 1) is below ``least`` is left out and
    named. Raises ``ValueError`` if SimpleITK is not installed, ``FileNotFoundError`` if there is no volume
    in ``source``, and ``FileExistsError`` rather than overwrite something (unless ``force``).
    """
    need_simpleitk()
    people = read_subjects(Path(subjects).expanduser()) if subjects else None
    scans = find_scans(source)
    if not scans:
        raise FileNotFoundError(
            f"{source} holds no volume: no .nii, .nii.gz, or .hdr with .img, of a T1 scan. Unpack archives."
        )
    by_subject = {name: list(found) for name, found in groupby(scans, key=lambda s: s.subject)}
    there = 0 if force else finished_bytes(root)
    check_space(root, max(0, CASE_BYTES * len(by_subject) - there), "the slices")
    with claimed(root, {"version": VERSION, "format": "volumes"}, source=source, force=force) as target:
        known, rows = {} if force else read_volume_rows(root), target.rows
        report = ConversionReport(DataLocation(root, "oasis"), str(source), kept=len(rows))
        wanted = {s: f for s, f in by_subject.items() if s not in known or known[s].case not in rows}
        workers = workers or min(joblib.cpu_count(), 3)  # each needs half a gigabyte
        workers = min(workers, max(len(wanted), 1))
        made = _prepared(list(wanted.values()), least, workers)
        with tqdm(total=len(wanted), desc="registering", unit="subject", file=sys.stderr) as bar:
            for subject, found in zip(wanted, made):
                bar.update()
                report.left_out += found.left_out
                report.notes += found.notes
                if found.scan is None:
                    continue
                case = _case_of(subject, known)
                if case in target.noted:
                    split = target.noted[case].split
                else:  # OASIS-1 has the course's splits
                    split = split_of(case) if case < 10_000 else _next_split(rows)
                file = found.scan.path.relative_to(source if source.is_dir() else source.parent).as_posix()
                known[subject] = VolumeRow(
                    case, subject, file, round(found.fit.similarity, 4), found.fit.axes
                )
                target.add(case, split, found.images, found.masks)
                _write_volume_rows(root, known)
                report.converted += 1
                if len(by_subject[subject]) > 1:
                    report.notes.append(f"{subject} has {len(by_subject[subject])} scans: {file} is taken")
        if people is not None and rows:
            report.notes += join_subjects(root, people, rows, str(subjects))
        if any(form_of(scan.path.as_posix()) == "3D" for scan in scans):
            report.notes.append(
                "this is neurite-oasis's 3D set: its heads are registered as any other volume"
            )
        report.notes += _summary(root, rows, {row.case: row for row in known.values()})
        if not rows:
            report.left_out.append(f"{source}: no volume could be used")
    return report


def _summary(root: Path, rows: dict[int, CaseRow], made: dict[int, VolumeRow]) -> Iterator[str]:
    if not rows:
        return
    worst = min((made[c] for c in rows if c in made), key=lambda r: r.similarity)
    yield (
        f"similarity with the template: {root / 'volumes.csv'} has each; the lowest is "
        f"{worst.similarity:.2f} (case {worst.case}, {worst.file})"
    )
    hint = (
        "A segmentation beside a volume becomes its masks: NAME_seg, NAME_pveseg, NAME_fseg (FSL) or "
        "NAME_dseg (BIDS)"
    )
    yield from what_lacks(rows, hint)


def what_lacks(rows: dict[int, CaseRow], masks: str) -> Iterator[str]:
    """A line if cases have no masks, with a word on where to get ``masks``, and one for each empty split."""
    if bare := [case for case, row in sorted(rows.items()) if not row.masks]:
        without = f"{len(bare)} cases have no masks (the first is {bare[0]})"
        yield f"{without}: what needs tissues will say so. {masks}"
    for split in SPLITS:
        if not any(row.split == split for row in rows.values()):
            yield f"there is no case for {split} yet, and the notebooks need all three: add subjects"
