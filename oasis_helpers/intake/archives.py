"""Read archives of strangers without trusting them.

Nothing is ever unpacked to the path an archive names: members are handed out as bytes, one by
one, and whoever takes them decides where they go. An archive that tries something (a path that
climbs out, a link, a device, a bomb) is refused as a whole, with :class:`ArchiveRefused`; one that
is cut or garbled raises :class:`ArchiveDamaged`.

What the attacks look like: Python's documentation of ``zipfile`` ("Decompression pitfalls") and of
``tarfile`` (PEP 706); overlapping zip bombs: Fifield 2019, A better zip bomb (WOOT).
"""

from __future__ import annotations

import copy
import gzip
import io
import itertools
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..layout import is_clutter

MOST_MEMBERS = 100_000  # the course zip has 22,662; a disc some thousands
LARGEST_MEMBER = 256 * 2**20  # bytes unpacked; an OASIS volume has 13 MB
LARGEST_TOTAL = 256 * 2**30  # bytes unpacked; a disc has about 4 GB, all twelve 50 GB
HIGHEST_RATIO = 100  # unpacked to packed; volumes reach 4, PNGs 1
_RATIO_FROM = 16 * 2**20  # bytes; below this a high ratio does no harm
_LARGEST_DIRECTORY = 32 * 2**20  # bytes of a zip's table of contents
_ARCHIVE_NAME = re.compile(  # also a volume of one, and what browsers call half a download
    r"\.(?:zip|tar|tgz|tbz2?|bz2|t?xz|tzst|zst|7z|rar|z\d\d|crdownload|opdownload|download|part(?:ial)?)"
    r"(?![a-z0-9])[^/]*$",
    re.IGNORECASE,
)
_NONE = "OASIS's archives have no such thing: do not use this one."
_END, _END_64, _LOCATOR_64, _ENTRY = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2"  # records of a zip


class ArchiveRefused(ValueError):
    """The archive does something that no data set needs to do."""


class ArchiveDamaged(ValueError):
    """The archive is cut short or its bytes are wrong."""


@dataclass(frozen=True)
class Member:
    """One file of an archive or folder: its name with ``/``, its size in bytes, and its bytes on demand.

    ``position`` is how far the packed archive has been read. From a tar, ``read`` works until
    the next member is asked for, since a stream cannot go back.
    """

    name: str
    size: int
    read: Callable[[], bytes]
    position: int = 0


# What others pack with, by the first bytes, and what unpacks it.
_OTHER_PACKERS = {
    b"7z\xbc\xaf\x27\x1c": ("7z", "7-Zip (7z x NAME)"),
    b"Rar!\x1a\x07": ("RAR", "unrar or 7-Zip (unrar x NAME, 7z x NAME)"),
    b"BZh": ("bzip2", "tar (tar -xjf NAME) or 7-Zip"),
    b"\xfd7zXZ\0": ("xz", "tar (tar -xJf NAME) or 7-Zip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "tar (tar --zstd -xf NAME) or 7-Zip"),
    b"\x1f\x9d": ("compress", "tar (tar -xZf NAME) or 7-Zip"),
    b"PK\x07\x08": ("a zip in several volumes", "7-Zip (7z x NAME)"),
}
_WEB = re.compile(rb"\s*<(?:!doctype html|html|head|body|script|meta|!--)", re.IGNORECASE)


def _begins_like_a_tar(start: bytes) -> bool:
    """Whether this is the header of a tar, with the mark "ustar" or (before 1988) without: its sum tells."""
    try:
        tarfile.TarInfo.frombuf(start[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return start[257:262] == b"ustar"
    return True


def _no_archive(path: Path, start: bytes) -> Exception:
    """What to say of a file that is no archive, by its first bytes."""
    if not start.strip(b"\0"):
        return ArchiveDamaged(f"{path} is empty: download it again.")
    for mark, (what, program) in _OTHER_PACKERS.items():
        if start.startswith(mark):
            how = program.replace("NAME", path.name)
            return ValueError(f"{path} is packed by {what}: unpack it with {how} and give the folder.")
    start = start.removeprefix(b"\xef\xbb\xbf")
    if _WEB.match(start):
        return ValueError(f"{path} is a web page, not an archive: log in and download it again.")
    text = start.decode("utf-8", "replace")[:60]
    if all(c.isprintable() or c in "\r\n\t" for c in text) and "\ufffd" not in text:
        begins = " ".join(text.split())[:50]
        return ValueError(
            f"{path} is a text ({begins!r} …), not a zip, a tar or a tar.gz: log in and download it again."
        )
    return ValueError(f"{path} is not a zip, a tar or a tar.gz. Give the archive as it was downloaded.")


def kind_of(path: Path) -> str:
    """ "zip", "tar.gz" or "tar", by the first bytes.

    Raises ``ValueError`` if it is none of them, with what it is as far as that can be told.
    """
    with path.open("rb") as file:
        start = file.read(tarfile.BLOCKSIZE)
        if start[:4] == _END:  # its table of contents comes first
            raise ArchiveDamaged(f"{path} is an empty zip: download it again.")
        if start[:4] == b"PK\x03\x04":
            return "zip"
        if start[:2] == b"\x1f\x8b":
            file.seek(0)
            with suppress(OSError, EOFError, zlib.error), gzip.GzipFile(fileobj=file) as inside:
                if _WEB.match(inside.read(tarfile.BLOCKSIZE)):
                    raise _no_archive(path, b"<html")
            return "tar.gz"
    if _begins_like_a_tar(start):
        return "tar"
    raise _no_archive(path, start)


def members(path: Path) -> Iterator[Member]:
    """The files of an archive, in its own order. Folders are passed over."""
    return _zip_members(path) if kind_of(path) == "zip" else _tar_members(path)


def _check_name(path: Path, name: str) -> None:
    parts = name.replace("\\", "/").split("/")
    shown = ascii(name[:80])
    if not parts[0] or re.match(r"[A-Za-z]:", name):
        raise ArchiveRefused(f"{path.name} holds the absolute path {shown}. {_NONE}")
    if ".." in parts:
        raise ArchiveRefused(f"{path.name} holds {shown}, which climbs out of its folder. {_NONE}")
    if re.search(r"[\x00-\x1f\x7f]", name):
        raise ArchiveRefused(f"{path.name} holds a name with control characters, {shown}. {_NONE}")


@contextmanager
def _damaged(message: Callable[[Exception], str]) -> Iterator[None]:
    """Whatever a garbled archive raises, as one error that says where."""
    try:
        yield
    except (ArchiveRefused, ArchiveDamaged, MemoryError):
        raise
    except Exception as error:  # zipfile, tarfile and zlib raise many kinds for bytes of noise
        raise ArchiveDamaged(message(error)) from None


def is_archive_name(name: str) -> bool:
    """Whether a file is named as an archive of any packer, a copy or half a download of one."""
    return bool(_ARCHIVE_NAME.search(name))


def _check_size(path: Path, name: str, size: int) -> None:
    if size < 0:
        raise ArchiveDamaged(f"{path.name} says that {name[:80]!a} has {size} bytes: download it again.")
    if size > LARGEST_MEMBER:
        raise ArchiveRefused(
            f"{path.name} holds {name[:80]!a} of {size / 1e6:,.0f} MB; no file of OASIS exceeds "
            f"{LARGEST_MEMBER / 1e6:,.0f} MB."
        )


# ---- zip --------------------------------------------------------------------------------------


class _Guarded(io.BufferedReader):
    """A zip while :mod:`zipfile` opens it, from which no huge table of contents can be read.

    Three records may say where the table is and how long; readers differ in which they believe.
    So what counts is what zipfile takes, whatever made it.
    """

    opening = True

    def read(self, size: int | None = -1, /) -> bytes:
        if self.opening and size is not None and size > _LARGEST_DIRECTORY:
            raise ArchiveRefused(
                f"{Path(self.name).name} has a table of contents of {size / 1e6:,.0f} MB. {_NONE}"
            )
        found = super().read(size)
        if self.opening and found.count(_ENTRY) > MOST_MEMBERS:
            raise ArchiveRefused(f"{Path(self.name).name} holds more than {MOST_MEMBERS:,} files.")
        return found

    def __del__(self) -> None:
        self.close()  # members are read long after the function that opened it has ended


def _announced(path: Path) -> int:
    """How many files the end of a zip says there are; its two end records must not contradict each other.

    A field of the old record is −1 where the ZIP64 record has the value (APPNOTE 4.3.14–4.3.16, 4.4.1.4).
    """
    with path.open("rb") as file:
        file.seek(0, io.SEEK_END)
        file.seek(max(0, file.tell() - 65_633))  # the end records, and the longest comment after them
        tail = file.read()
    # as zipfile looks for it
    at = len(tail) - 22 if tail[-22:-18] == _END and tail[-2:] == b"\0\0" else tail.rfind(_END)
    if at < 0 or len(tail) < at + 22:
        raise ArchiveDamaged(f"{path.name} has no table of contents at its end: download it again.")
    short = struct.unpack("<HII", tail[at + 10 : at + 20])  # files, bytes of the table, where it begins
    if at < 76 or tail[at - 20 : at - 16] != _LOCATOR_64 or tail[at - 76 : at - 72] != _END_64:
        return short[0]
    full = struct.unpack("<QQQ", tail[at - 44 : at - 20])
    if any(a not in (b, unset) for a, b, unset in zip(short, full, (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF))):
        raise ArchiveRefused(f"{path.name} has two tables of contents that contradict each other. {_NONE}")
    return full[0]


def _zip_members(path: Path) -> Iterator[Member]:
    announced = _announced(path)
    with _damaged(lambda error: f"{path.name} cannot be opened ({error}): download it again."):
        file = _Guarded(io.FileIO(path))
        archive = zipfile.ZipFile(file)
        file.opening = False
    entries = archive.infolist()
    if len(entries) != announced:
        raise ArchiveRefused(f"{path.name} announces {announced:,} files and lists {len(entries):,}. {_NONE}")
    total = 0
    for entry in entries:
        if is_clutter(entry.filename):
            continue
        _check_name(path, entry.filename)
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            what = "link" if kind == stat.S_IFLNK else "device or pipe"
            raise ArchiveRefused(f"{path.name} holds the {what} {entry.filename[:80]!a}.")
        if is_archive_name(entry.filename):
            continue  # never read
        if entry.flag_bits & 1:
            raise ArchiveRefused(f"{path.name} is encrypted: unpack it yourself and give the folder.")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # zipfile unpacks the others whole, whatever size they announce
            raise ArchiveRefused(
                f"{path.name} holds {entry.filename[:80]!a} packed by method {entry.compress_type}; only "
                "stored and deflated files are read: unpack it yourself and give the folder."
            )
        _check_size(path, entry.filename, entry.file_size)
        total += entry.file_size
        if entry.file_size > _RATIO_FROM and entry.file_size > HIGHEST_RATIO * max(entry.compress_size, 1):
            raise ArchiveRefused(
                f"{path.name} holds {entry.filename[:80]!a}, which unpacks to "
                f"{entry.file_size // max(entry.compress_size, 1):,} times its size: a bomb."
            )
    if total > LARGEST_TOTAL or total > max(_RATIO_FROM, HIGHEST_RATIO * path.stat().st_size):
        raise ArchiveRefused(
            f"{path.name} of {path.stat().st_size / 1e6:,.1f} MB unpacks to {total / 1e6:,.0f} MB: a bomb."
        )

    def reader(entry: zipfile.ZipInfo) -> Callable[[], bytes]:
        def read() -> bytes:
            name = f"{entry.filename[-60:]!a}"
            with _damaged(lambda error: f"{name} cannot be unpacked ({error})"), _open(archive, entry) as f:
                content = f.read(entry.file_size)  # no more, whatever its packed bytes would give
                if len(content) != entry.file_size:
                    raise EOFError(f"{len(content):,} bytes instead of {entry.file_size:,}")
                return content

        return read

    for entry in entries:
        if not entry.is_dir() and not is_clutter(entry.filename):
            yield Member(entry.filename.replace("\\", "/"), entry.file_size, reader(entry))


def _open(archive: zipfile.ZipFile, entry: zipfile.ZipInfo):
    """A member, whichever slash its own header has; some programs write the other one into the directory."""
    name = entry.orig_filename
    for other in dict.fromkeys((name, name.replace("\\", "/"), name.replace("/", "\\"))):
        like = copy.copy(entry)
        like.orig_filename = other
        try:
            return archive.open(like)
        except zipfile.BadZipFile as error:
            if "differ" not in str(error):
                raise
            found = error
    raise found


# ---- tar --------------------------------------------------------------------------------------


class _Allowance:
    """A stream that gives no more bytes than were announced.

    :mod:`tarfile` reads some headers whole, whatever size they claim. So the reader of the
    archive says after each member how much may come until the next one.
    """

    def __init__(self, stream, packed, name: str):
        self._stream, self._packed, self.name = stream, packed, name
        self.total = 0
        self.left = 2**20

    def allow(self, size: int) -> None:
        self.left = size + 2**20  # and a header with a long name

    @property
    def position(self) -> int:
        return self._packed.tell()

    def read(self, size: int) -> bytes:
        found = self._stream.read(size)
        self.total += len(found)
        self.left -= len(found)
        if self.left < 0:
            raise ArchiveRefused(f"{self.name} holds a header of more than a megabyte: a bomb.")
        if self.total > LARGEST_TOTAL or (
            self.total > _RATIO_FROM and self.total > HIGHEST_RATIO * max(self.position, 1)
        ):
            raise ArchiveRefused(
                f"{self.name} unpacks to {self.total / 1e6:,.0f} MB and more from its first "
                f"{self.position / 1e6:,.1f} MB: a bomb."
            )
        return found


def _tar_members(path: Path) -> Iterator[Member]:
    with path.open("rb") as packed:
        stream = gzip.GzipFile(fileobj=packed) if kind_of(path) == "tar.gz" else packed
        limited = _Allowance(stream, packed, path.name)
        yield from _limited_tar_members(path, limited)


def _limited_tar_members(path: Path, limited: _Allowance) -> Iterator[Member]:
    def damage(error: Exception) -> str:
        where = f"{limited.name} is cut or damaged after {limited.total / 1e6:,.0f} MB unpacked"
        return f"{where} ({error}): download it again."

    with _damaged(damage):
        archive = tarfile.open(fileobj=limited, mode="r|", bufsize=tarfile.BLOCKSIZE)  # noqa: SIM115
    for number in itertools.count():
        with _damaged(damage):
            entry = archive.next()
        if entry is None:
            break
        archive.members.clear()  # tarfile remembers every member; a stream needs none
        if number >= MOST_MEMBERS:
            raise ArchiveRefused(f"{path.name} holds more than {MOST_MEMBERS:,} files.")
        if is_clutter(entry.name):
            limited.allow(entry.size)
            continue
        _check_name(path, entry.name)
        if not (entry.isreg() or entry.isdir()):
            what = "link" if entry.issym() or entry.islnk() else "device or pipe"
            raise ArchiveRefused(f"{path.name} holds the {what} {entry.name[:80]!a}.")
        if entry.issparse():  # zeros that are not stored, so no limit on what is read would count them
            raise ArchiveRefused(f"{path.name} holds the sparse file {entry.name[:80]!a}. {_NONE}")
        if entry.size < 0 or not is_archive_name(entry.name):  # an archive inside is never read
            _check_size(path, entry.name, entry.size)
        limited.allow(entry.size)

        def read(entry: tarfile.TarInfo = entry) -> bytes:
            with _damaged(damage):
                return archive.extractfile(entry).read()

        if entry.isreg():
            yield Member(entry.name, entry.size, read, limited.position)
    # tarfile takes a garbled header for the end. After a true end come only zeros.
    limited.allow(2**20)
    with _damaged(damage):
        if limited.read(2**16).strip(b"\0"):
            raise ValueError("a header is garbled")
