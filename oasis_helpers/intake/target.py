"""The folder that a conversion writes: whose it is, which cases are whole in it, and new ones one by one.

``conversion.json`` says what the set was converted from and how, ``conversion.csv`` has one line for each
case that is whole. One conversion at a time writes a folder (a lock, ``.conversion.lock``). Nothing in it
changes before the first case is ready to be written: what ``--force`` replaces is there until then.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from filelock import FileLock, Timeout

from ..layout import (
    DATASET_FOLDER,
    image_name,
    is_clutter,
    make_folders,
    mask_name,
    remove_leftovers,
    write_file,
)

PLAN, ROWS, LOCK = "conversion.json", "conversion.csv", ".conversion.lock"
_OF_A_CONVERSION = (ROWS, "volumes.csv", "subjects.csv")


@dataclass(frozen=True)
class CaseRow:
    """One line of ``conversion.csv``: a case that is whole."""

    case: int
    split: str
    images: int
    masks: int
    sha256: str  # of the newline-joined SHA-256 of its files, images before masks, in slice order


def read_rows(root: Path) -> dict[int, CaseRow]:
    """The finished cases of a converted set by id; empty if it has no ``conversion.csv``.

    Raises ``ValueError``, which names the file, if somebody changed it into something else.
    """
    path = root / ROWS
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            found = [
                CaseRow(int(r["case"]), r["split"], int(r["images"]), int(r["masks"]), r["sha256"])
                for r in csv.DictReader(file)
            ]
    except (KeyError, TypeError, ValueError, csv.Error):
        raise ValueError(f"{path} is damaged: delete it, and convert again into the same folder.") from None
    return {row.case: row for row in found}


def files_of(root: Path, row: CaseRow) -> Iterator[Path]:
    """The files of a case: its images, then its masks."""
    for k in range(row.images):
        yield root / f"{DATASET_FOLDER}_{row.split}" / image_name(row.case, k)
    for k in range(row.masks):
        yield root / f"{DATASET_FOLDER}_seg_{row.split}" / mask_name(row.case, k)


def _is_written(path: Path) -> bool:
    """Whether a file is there and has a byte: power that fails can leave it empty."""
    return path.is_file() and path.stat().st_size > 0


def finished_bytes(root: Path) -> int:
    """What the files of the finished cases of a converted set take."""
    paths = (path for row in read_rows(root).values() for path in files_of(root, row))
    return sum(path.stat().st_size for path in paths if path.exists())


class Target:
    """The folder of one conversion; only :func:`claimed` makes one.

    ``noted`` are the cases that an earlier conversion of the same kind finished, by id; ``rows`` those of
    them whose files are all there, and what was added since. Threads may add cases side by side.
    """

    def __init__(self, root: Path, plan: dict, force: bool):
        self.root, self._plan, self._force = root, plan, force
        self._begun, self._lock = False, threading.Lock()
        self.noted = {} if force else read_rows(root)
        self.rows = {c: r for c, r in self.noted.items() if all(map(_is_written, files_of(root, r)))}

    def begin(self) -> None:
        """Once, before anything is written: remove what it replaces and what was left half written."""
        with self._lock:
            if not self._begun:
                self._begin()

    def _begin(self) -> None:
        if self._force and (self.root / PLAN).exists():
            with suppress(ValueError):  # a damaged list; files of the same names are replaced all the same
                self._remove(read_rows(self.root).values())
            for name in _OF_A_CONVERSION:
                (self.root / name).unlink(missing_ok=True)
        remove_leftovers(self.root)
        write_file(self.root / PLAN, (json.dumps(self._plan, indent=1) + "\n").encode())
        make_folders(self.root)
        self._begun = True

    def _remove(self, rows: Iterable[CaseRow]) -> None:
        for row in rows:
            for path in files_of(self.root, row):
                path.unlink(missing_ok=True)

    def _write_rows(self) -> None:
        lines = [",".join(f.name for f in fields(CaseRow))]
        lines += [",".join(str(v) for v in asdict(self.rows[case]).values()) for case in sorted(self.rows)]
        write_file(self.root / ROWS, ("\n".join(lines) + "\n").encode())

    def add(self, case: int, split: str, images: list[bytes], masks: list[bytes]) -> CaseRow:
        """Write the slices of one case (PNG, in order), and note it once they are all there."""
        self.begin()
        files = [*images, *masks]
        digests = "\n".join(hashlib.sha256(content).hexdigest() for content in files)
        row = CaseRow(case, split, len(images), len(masks), hashlib.sha256(digests.encode()).hexdigest())
        for path, content in zip(files_of(self.root, row), files):
            write_file(path, content)
        with self._lock:
            self.rows[case] = row
            self._write_rows()
        return row

    def withdraw(self, cases: Iterable[int]) -> None:
        """Remove cases again that should not have been used."""
        if gone := [self.rows.pop(case) for case in cases]:
            self._write_rows()
            self._remove(gone)


def _check(source: Path | None, root: Path, plan: dict, force: bool) -> None:
    """Refuse a folder that holds something else."""
    try:
        root.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a link to itself, too long a name
        raise OSError(f"{root} cannot be a folder ({error.strerror}). Choose another folder.") from None
    if source is not None and source.is_dir() and root.resolve().is_relative_to(source.resolve()):
        raise FileExistsError(f"{root} is inside {source}. Choose a folder outside what you convert.")
    if not root.exists():
        return
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file. Give a folder for the slices.")
    if (root / "phantoms.json").exists():
        raise FileExistsError(
            f"{root} holds phantoms (it has a phantoms.json), and slices of people do not belong among them. "
            "Choose another folder."
        )
    try:
        found = json.loads((root / PLAN).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError
    except FileNotFoundError:
        # the lock, and the plan of another conversion that begins now
        own = re.compile(rf"{re.escape(LOCK)}|\.{re.escape(PLAN)}\..*\.part")
        if not force and any(not is_clutter(p.name) and not own.fullmatch(p.name) for p in root.iterdir()):
            raise FileExistsError(
                f"{root} is not empty. Choose a new folder, or --force to overwrite files of the same name."
            ) from None
        return
    except ValueError:
        if not force:
            raise ValueError(f"{root / PLAN} is damaged. Choose another folder, or --force.") from None
        return
    if found != plan and not force:
        differing = [f"{k} {found.get(k)!r} ≠ {plan[k]!r}" for k in plan if found.get(k) != plan[k]]
        raise FileExistsError(
            f"{root} was converted otherwise ({', '.join(differing)}). Choose another folder, or --force."
        )


@contextmanager
def claimed(root: Path, plan: dict, *, source: Path | None = None, force: bool = False) -> Iterator[Target]:
    """``root`` for one conversion, which ``plan`` describes, as long as it lasts.

    Raises ``FileExistsError`` if the folder holds something else (an earlier conversion of another plan or
    files of the user's only unless ``force``; phantoms, or ``source`` around it, always), and
    ``BlockingIOError`` if another conversion is writing it.
    """
    _check(source, root, plan, force)  # before anything is made
    lock = FileLock(root / LOCK)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(
            f"{root} is being written by another conversion. Wait until it has ended, or choose another "
            "folder."
        ) from None
    except OSError as error:
        raise OSError(
            f"{root} cannot be written to ({error.strerror or error}). Choose another folder."
        ) from None
    try:
        _check(source, root, plan, force)  # again: somebody may have been faster
        yield Target(root, plan, force)
    finally:
        lock.release()
