"""The subjects of a source: which files each has, put together from all its parts.

Files that lie open and zips are listed first, their bytes are read when a case is converted. A tar is read
as a stream, and a subject is given as soon as its files have come by. Of several copies of a file those that
can be read must agree; a part that is broken, or does what no data set needs, costs no other.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..layout import SPLITS, course_cases
from .archives import ArchiveDamaged, ArchiveRefused, Member
from .scans import ScanUnusable
from .sources import NAMES, Part, form_of, passed_over
from .t88 import LARGEST as LARGEST_T88
from .t88 import gunzipped

# Bytes of one file. A PNG has about 20 kB, a packed neurite slice 25 kB.
LARGEST = {"course": 2**20, "oasis1": LARGEST_T88, "neurite": 2**20}
PENDING = 24  # subjects of a tar whose first files wait in memory for the last; those of more wait on disk


class Unusable(ValueError):
    """One case cannot be used; the others can."""


def split_of(case: int) -> str:
    """The course's split, and for a case it lacks one drawn from its id: 85, 10 and 5 of 100.

    The draw is the SHA-256 of ``OAS1_NNNN``, so it depends on nothing but the id.
    """
    if known := course_cases().get(case):
        return known["split"]
    draw = int.from_bytes(hashlib.sha256(f"OAS1_{case:04d}".encode()).digest()[:4], "big") % 100
    return SPLITS[(draw >= 85) + (draw >= 95)]


@dataclass
class Case:
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
                    content = gunzipped(name, content, LARGEST_T88)
                found.setdefault(content, name)
            except (ArchiveDamaged, ScanUnusable, OSError) as error:
                broken = error
        if len(found) > 1:
            one, other = list(found.values())[:2]
            raise Unusable(f"{one} is there twice; keep one of the two (they differ, the other is {other})")
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


def role_of(format: str, name: str, stripped: bool) -> tuple[int, tuple] | None:
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


class Shelf:
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
class Reading:
    """The subjects of a source, as its parts are read, and what there is to say about the parts.

    ``rows`` are the cases that are whole and need no reading, more and more of them; ``kept`` those of them
    that an earlier conversion made.
    """

    format: str
    stripped: bool
    kept: set[int]
    rows: Mapping[int, object]
    shelf: Shelf
    left_out: list[str]
    notes: list[str]
    waiting: dict[int, Case] = field(default_factory=dict)  # of files and zips, for what tars may have

    def _look(self, part: Part) -> Iterator[tuple[int, tuple, Member]]:
        """The members of a part that are needed, with case and role; then what else it had is told."""
        forms: dict[str, str] = {}
        for member in part.members():
            found = role_of(self.format, member.name, self.stripped)
            if found:
                forms.setdefault(self.format, member.name)
                yield *found, member
            elif form := form_of(member.name):
                forms.setdefault(form, member.name)
        for line, is_loss in passed_over(part, forms, self.format):
            (self.left_out if is_loss else self.notes).append(line)
        if "phantoms" in forms:
            raise ArchiveRefused(f"{part.path} is passed over.")

    def indexed(self, parts: list[Part], more_follow: bool, advance: Callable[[int], None]) -> Iterator[Case]:
        """The subjects of files and zips: names first, bytes later."""
        for part in parts:
            try:
                found = list(self._look(part))
            except (ArchiveDamaged, ArchiveRefused, OSError) as error:
                self.left_out.append(str(error))
                continue
            for case, role, member in found:
                if case not in self.rows:
                    known = self.waiting.setdefault(case, Case(case))
                    known.add(role, member, LARGEST[self.format], member.read)
        twice = [c for c, case in self.waiting.items() if any(len(p) > 1 for p in case.parts.values())]
        if twice:
            self.notes.append(
                f"{len(twice)} cases are there more than once, the first is {min(twice)}: each is taken "
                "once, if the copies agree."
            )
        size, found = sum(part.size for part in parts), sorted(self.waiting)
        for number, case in enumerate(found, 1):
            if not more_follow or self.waiting[case].is_whole(self.format):
                yield self.waiting.pop(case)
            advance(size * number // len(found))

    def streamed(self, part: Part, advance: Callable[[int], None]) -> Iterator[Case]:
        """The subjects of a tar, each as soon as its files have come by."""
        pending: dict[int, Case] = {}
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
                    earlier = self.waiting.get(case, Case(case)).parts
                    pending[case] = Case(case, {r: list(copies) for r, copies in earlier.items()})
                keep = self.shelf.put if len(pending) > PENDING else _in_memory
                if member.size <= LARGEST[self.format]:
                    pending[case].add(role, member, LARGEST[self.format], keep(member.read()))
                else:
                    pending[case].add(role, member, LARGEST[self.format], member.read)
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

    def rest(self) -> Iterator[Case]:
        """The subjects of files and zips of which no tar had more."""
        yield from (case for _, case in sorted(self.waiting.items()) if case.case not in self.rows)


def _in_memory(content: bytes) -> Callable[[], bytes]:
    return lambda: content
