"""What lies in a source: the files a conversion can use, by their names, and the archives they may be in.

A source is an archive, or a folder with files and archives in any mixture and depth. :func:`find_source`
lists its *parts*: the files that lie open are one, each archive is another. A part that is broken costs
no other; what is passed over is named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from ..layout import DATASET_FOLDER, is_clutter
from .archives import ArchiveDamaged, ArchiveRefused, Member, is_archive_name, kind_of, members

FORMATS = ("course", "oasis1", "neurite", "kaggle")
NAMES = {
    "course": re.compile(
        rf"(?:^|/)(?:{DATASET_FOLDER}_(?:seg_)?(train|validate|test)/)?(case|seg)_(\d{{1,4}})_slice_(\d{{1,3}})(?:\.nii)?\.png$",
        re.IGNORECASE,
    ),
    "oasis1": re.compile(
        r"(?:^|/)OAS1_(\d{4})_MR(\d+)_mpr_n\d+_anon_111_t88_((?:masked_)?gfc(?:_fseg)?)\.(img|hdr|nii)(?:\.gz)?$",
        re.IGNORECASE,
    ),
    "neurite": re.compile(r"(?:^|/)OASIS_OAS1_(\d{4})_MR(\d+)/slice_(norm|seg4)\.nii\.gz$", re.IGNORECASE),
    "kaggle": re.compile(
        r"(?:^|/)(?:OAS1_\d{4}_MR\d+_mpr-\d+_\d+|"
        r"[ _-]*(?:non|very[ _-]*mild|mild|moderate)[ _-]*dement(?:ed|ia) */)[^/]*\.jpe?g$",
        re.IGNORECASE,
    ),
}
EXAMPLES = {
    "course": "keras_png_slices_train/case_001_slice_0.nii.png",
    "oasis1": "OAS1_0001_MR1_mpr_n4_anon_111_t88_gfc.img",
    "neurite": "OASIS_OAS1_0001_MR1/slice_norm.nii.gz",
    "kaggle": "Mild Dementia/OAS1_0028_MR1_mpr-1_100.jpg",
}
_OTHER_FORMS = {
    "phantoms": re.compile(r"(?:^|/)phantoms\.json$"),
    "3D": re.compile(
        r"(?:^|/)OASIS_OAS1_\d{4}_MR\d+/(?:aligned_)?(?:norm|orig|seg\d+)\.nii(?:\.gz)?$", re.IGNORECASE
    ),
    "raw": re.compile(r"OAS1_\d{4}_MR\d+.*\.(?:nii|hdr|img)(?:\.gz)?$", re.IGNORECASE),
    "volume": re.compile(r"\.(?:nii|hdr|img)(?:\.gz)?$", re.IGNORECASE),
    "DICOM": re.compile(r"(?:\.(?:dcm|dicom|ima)|(?:^|/)DICOMDIR)$", re.IGNORECASE),
}
_BROKEN = (ArchiveDamaged, ArchiveRefused, ValueError, OSError)


def form_of(name: str) -> str | None:
    """One of FORMATS, "archive", "phantoms", "3D", "raw", "volume" or "DICOM", by a file's name; or None."""
    for form, pattern in NAMES.items():
        if pattern.search(name):
            return form
    if is_archive_name(name):
        return "archive"
    return next((form for form, pattern in _OTHER_FORMS.items() if pattern.search(name)), None)


@dataclass
class Part:
    """One archive ("zip", "tar", "tar.gz"), or the files that lie open in a folder ("folder")."""

    path: Path
    kind: str
    size: int = 0  # bytes
    files: list[Member] = field(default_factory=list)  # of a folder

    def members(self) -> Iterator[Member]:
        """Its files; of an archive in its own order."""
        yield from self.files if self.kind == "folder" else members(self.path)


@dataclass
class Source:
    """The parts of a source, and a line for each file that should have been one and cannot be used."""

    path: Path
    parts: list[Part]
    problems: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def recognise(self, formats: Sequence[str] = FORMATS) -> str:
        """Which of ``formats`` it has, from the first file name that tells.

        Raises ``FileNotFoundError`` if there is none, or for a single archive what is wrong with it.
        """
        said = list(self.problems)
        for part in self.parts:
            forms: dict[str, str] = {}
            try:
                with closing(part.members()) as found:
                    for member in found:
                        if (form := form_of(member.name)) in formats:
                            return form
                        if form:
                            forms.setdefault(form, member.name)
            except _BROKEN as error:
                if self.path.is_file():
                    raise
                said.append(str(error))
            said += [line for line, _ in passed_over(part, forms, None)]
        named = " or ".join(EXAMPLES[name] for name in formats)
        what = f"{self.path} holds no file named like {named}."
        raise FileNotFoundError(f"{what} {' '.join(said[:2]) or 'Is it the right file, and is it whole?'}")


def walk(folder: Path, on_error: Callable[[OSError], object] | None = None) -> Iterator[Path]:
    """The files below a folder in order; links are followed, each folder is seen once, clutter is not."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=on_error):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not is_clutter(f))
        yield from (Path(place, name) for name in sorted(names) if not is_clutter(name))


def find_source(path: Path) -> Source:
    """The parts of an archive or folder.

    Raises ``FileNotFoundError`` if it is not there, and for a single file that is no archive ``ValueError``
    or ``ArchiveDamaged``.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Give the zip, disc archive, tar or folder you have.")
    if path.is_file():
        return Source(path, [Part(path, kind_of(path), path.stat().st_size)])
    problems: list[str] = []
    loose, archives = Part(path, "folder"), []
    for file in walk(path, lambda e: problems.append(f"{e.filename} cannot be read ({e.strerror}).")):
        name = file.relative_to(path.parent).as_posix()
        form = form_of(name)
        if form is None and file.suffix.lower() not in ("", ".gz"):
            continue
        try:
            size = file.stat().st_size
            if form is None or form == "archive":
                archives.append(Part(file, kind_of(file), size))
            else:
                loose.files.append(Member(name, size, file.read_bytes))
        except FileNotFoundError:
            problems.append(f"{file} is a link to something that is not there.")
        except _BROKEN as error:
            if form == "archive" or not isinstance(error, ValueError):
                problems.append(str(error))
    for about in [m for m in loose.files if form_of(m.name) == "phantoms"]:
        folder = about.name.rsplit("/", 1)[0] + "/"
        problems.append(f"{path.parent / folder} holds phantoms, no people: they need no conversion.")
        loose.files = [m for m in loose.files if not m.name.startswith(folder)]
    loose.size = sum(m.size for m in loose.files if form_of(m.name) in FORMATS)
    archives.sort(key=_numbers_as_numbers)
    return Source(path, [loose, *archives] if loose.files else archives, problems)


def _numbers_as_numbers(part: Part) -> list:
    return [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", part.path.as_posix())]


def recognise(path: Path, formats: Sequence[str] = FORMATS) -> str:
    """Which of ``formats`` a source has; see :meth:`Source.recognise`."""
    return find_source(path).recognise(formats)


def passed_over(part: Part, forms: dict[str, str], format: str | None) -> Iterator[tuple[str, bool]]:
    """What of a part is no use to ``format``, a line each, and whether that may be a loss.

    ``forms`` has an example of each form that was seen in it.
    """
    packed = "" if part.kind == "folder" else "unpack it and "
    for form, name in forms.items():
        if form == "archive":
            yield f"{part.path} holds {name}: unpack it once and give the folder.", format not in forms
        elif form == "phantoms":
            yield f"{part.path} holds phantoms ({name}), no people: they need no conversion.", True
        elif format and form in FORMATS and form != format:
            yield (
                f"{part.path} also holds {form} files, as {name}: convert them into a folder of their own "
                f"(--format {form}).",
                True,
            )
        elif form == "volume" or (form in ("raw", "3D") and not set(FORMATS) & forms.keys()):
            what = "neurite-oasis's 3D set" if form == "3D" else "volumes"
            how = f"{packed}convert the folder into another one with --format volumes"
            yield f"{part.path} holds {what}, as {name}: {how}.", format not in forms
        elif form == "DICOM":
            yield (
                f"{part.path} holds DICOM, as {name}: make NIfTI of it by dcm2niix, and convert that.",
                format not in forms,
            )
    if format and not forms:
        yield f"{part.path} holds nothing of OASIS.", False
