"""Is a data set whole? Every file of it is read, and what is wrong is reported by name."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..layout import (
    DATASET_FOLDER,
    MASK_VALUES,
    SPLITS,
    DataLocation,
    WrongMode,
    WrongSize,
    course_cases,
    image_name,
    locate,
    mask_name,
    names_in,
    read_png,
)
from .subjects import load_subjects


@dataclass
class DatasetReport:
    """What :func:`check_dataset` found. ``ok`` is True when nothing is wrong.

    ``form``: what the set was made from, in words. ``counts``: split → (slices, cases). ``checksums``:
    "unmodified" when every whole case equals the course set's (or, for a converted set, what was
    converted); "re-encoded" when every case differs in its bytes and every slice looks right; "altered"
    when only some differ, with their ids in ``altered``; "incomplete" when no case is whole; "not OASIS"
    for phantoms.
    """

    root: Path
    kind: str
    form: str
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    wrong_mode: list[str] = field(default_factory=list)
    wrong_size: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
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
            "one slice twice": self.twice,
            "odd pixels": self.odd,
            "damaged table": self.tables,
        }
        return {kind: lines for kind, lines in kinds.items() if lines}

    @property
    def ok(self) -> bool:
        return not self.problems and self.checksums != "altered"

    def __str__(self) -> str:
        lines = [f"{self.form}: {'ok' if self.ok else 'PROBLEMS'}"]
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

    Looks for missing folders, slices and partners, two files for one slice, PNGs that do not decode, a mode
    other than L, a size other than 256×256, pixels that no such slice has, cases in two splits, and a table
    (``phantoms.csv`` or ``subjects.csv``) that cannot be read. Each case of a course set is also compared
    with the checksums shipped in ``oasis_png_cases.csv``, each case of a converted set with what was
    converted. Raises as :func:`~oasis_helpers.data.find_data` if there is no data set at ``root``.
    """
    location = locate(Path(root).expanduser())
    made_from = _made_from(location)
    form = "phantoms" if location.kind == "phantoms" else _FORMS.get(made_from, f"OASIS, {made_from}")
    report = DatasetReport(location.root, location.kind, form)
    known, without_masks = _known_cases(location), _without_masks(location)
    splits_of: dict[int, list[str]] = defaultdict(list)
    digests: dict[int, dict[str, list[str]]] = defaultdict(lambda: {"case": [], "seg": []})
    jobs = []
    for split in SPLITS:
        found = _files_of(location, split, report)
        cases = Counter(case for case, _ in found["case"])
        report.counts[split] = (len(found["case"]), len(cases))
        for case in cases:
            splits_of[case].append(split)
        report.missing += _without_partner(location, split, found, without_masks)
        report.missing += _gaps(split, found, cases, known)
        jobs += [(prefix, key, path) for prefix in found for key, path in found[prefix].items()]
    for case, splits in sorted(splits_of.items()):
        if len(splits) > 1:
            report.leaks.append(f"case {case:03d} is in {' and '.join(splits)}: keep it in one split")

    for prefix, (case, _), path in tqdm(jobs, desc="checking", unit="file", disable=len(jobs) < 5000):
        _check_file(path, report, prefix, like_course=known is not None)
        if known is not None:
            with path.open("rb") as file:
                digests[case][prefix].append(hashlib.file_digest(file, "sha256").hexdigest())
    if known is not None:
        _compare_checksums(digests, known, report)
    report.tables += _damage_of_table(location)
    return report


def _damage_of_table(location: DataLocation) -> list[str]:
    try:
        if location.kind == "phantoms":
            from .phantoms import read_factors  # scipy takes a second to import

            read_factors(location.root)
        else:
            load_subjects(location.root)
    except (OSError, ValueError) as error:
        return [str(error)]
    return []


_Files = dict[str, dict[tuple[int, int], Path]]  # "case" and "seg" → (case, slice) → file


def _files_of(location: DataLocation, split: str, report: DatasetReport) -> _Files:
    """The images and masks of a split; a folder that is not there is noted."""
    found = {}
    for prefix, masks in (("case", False), ("seg", True)):
        folder = location.folder(split, masks)
        if not folder.is_dir():
            report.missing.append(f"folder {folder.name}: unpack the archive again")
        names = names_in(folder, prefix) if folder.is_dir() else {}
        for first, *others in names.values():
            report.twice += [
                f"{folder.name}/{p.name} beside {first.name}: keep one of the two" for p in others
            ]
        found[prefix] = {key: paths[0] for key, paths in names.items()}
    return found


def _without_partner(
    location: DataLocation, split: str, found: _Files, without_masks: set[int]
) -> Iterator[str]:
    """A line for each image without its mask, if its case has any, and each mask without image."""
    for prefix, other, name, words in (
        ("seg", "case", mask_name, "the mask of a slice that is there"),
        ("case", "seg", image_name, "the image of a mask that is there"),
    ):
        folder = location.folder(split, masks=prefix == "seg")
        if folder.is_dir():
            alone = (k for k in found[other] if k not in found[prefix])
            unplanned = (k for k in alone if prefix == "case" or k[0] not in without_masks)
            yield from (f"{folder.name}/{name(*k)}: {words}" for k in unplanned)


def _gaps(split: str, found: _Files, cases: Counter[int], known: dict | None) -> Iterator[str]:
    """A line for each slice that a case lacks, by what the other cases of its set have."""
    expected = max(cases.values(), default=0)
    if known:
        expected = max(expected, *(slices for slices, _ in known.values()))
    for case in cases:
        have = {index for c, index in found["case"] if c == case}
        for index in range(max(expected, max(have) + 1)):
            if index not in have and (case, index) not in found["seg"]:  # with a mask it is named already
                yield f"{DATASET_FOLDER}_{split}/{image_name(case, index)}: a gap in the case"


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


_FORMS = {
    "course": "OASIS, the course's archive",
    "oasis1": "OASIS, discs of OASIS-1",
    "neurite": "OASIS, neurite-oasis 2D",
    "nilearn-oasis": "OASIS, grey matter by nilearn",
    "volumes": "T1 volumes",
    "kaggle": "OASIS, Kaggle's JPEGs",
}


def _made_from(location: DataLocation) -> str:
    """The format that a conversion noted; "course" where none was needed."""
    plan = location.root / "conversion.json"
    if not plan.exists():
        return "course"
    try:
        found = json.loads(plan.read_text(encoding="utf-8"))["format"]
        if not isinstance(found, str):  # also of a later version
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{plan} is damaged: convert again into a new folder.") from None
    return found


def _known_cases(location: DataLocation) -> dict[int, tuple[int, tuple[str, ...]]] | None:
    """Number of slices and digests that each case should have; None if nobody knows them."""
    if location.kind == "phantoms":
        return None
    if _made_from(location) == "course":
        return {
            case: (int(row["slices"]), (row["images_sha256"], row["masks_sha256"]))
            for case, row in course_cases().items()
        }
    from .target import read_rows  # few need it

    return {case: (row.images, (row.sha256,)) for case, row in read_rows(location.root).items()}


def _without_masks(location: DataLocation) -> set[int]:
    """The cases that a conversion found no segmentation of."""
    if not (location.root / "conversion.csv").exists():
        return set()
    from .target import read_rows  # few need it

    return {case for case, row in read_rows(location.root).items() if row.masks == 0}


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
