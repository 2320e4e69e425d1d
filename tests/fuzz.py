"""Thousands of damaged archives, PNGs, headers and tables: ``make fuzz`` (minutes; not in ``make test``).

Sound files are changed at random (bytes flipped, cut, repeated, moved, zeroed) and converted. Every
one must end within seconds and without much memory, in a report or in one of the documented errors,
which names the file, with nothing written outside the target. Among the sound files are three
bombs. ``FUZZ_EXAMPLES=50000 make fuzz`` looks longer.
"""

import os
import re
import resource
import signal
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_malformed import (
    CASE,
    HDR,
    NEURITE,
    NORM,
    PNG,
    SEG4,
    SUBJECT,
    gnu_sparse,
    packed_small,
    write_tar,
    write_tree,
    write_zip,
)

from oasis_helpers.intake.archives import ArchiveDamaged, ArchiveRefused
from oasis_helpers.intake.convert import convert
from oasis_helpers.intake.subjects import read_subjects

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "3000"))
SECONDS = 20
MEMORY = 192 * 2**20  # bytes beyond what is used before; a bomb gives 250 MB
BOMB = 250 * 2**20
TABLE = "ID,M/F,Hand,Age,Educ,SES,MMSE,CDR\nOAS1_0001_MR1,F,R,74,2,3,29,0\nOAS1_0002_MR1,M,R,21,,,,\n"


def _archive(write, name, files):
    with tempfile.TemporaryDirectory() as folder:
        return write(Path(folder) / name, files).read_bytes()


def _bomb(method):
    with tempfile.TemporaryDirectory() as folder:
        return packed_small(Path(folder), method, BOMB).read_bytes()


FEW = {name: content for name, content in CASE.items() if "slice_1" in name}
SOUND = {
    "course.zip": _archive(write_zip, "course.zip", FEW),
    "neurite.tar": _archive(lambda p, f: write_tar(p, f, packed=False), "neurite.tar", NEURITE),
    "neurite.tar.gz": _archive(write_tar, "neurite.tar.gz", NEURITE),
    "bzip2.zip": _bomb(zipfile.ZIP_BZIP2),
    "deflated.zip": _bomb(zipfile.ZIP_DEFLATED),
    "sparse.tar": gnu_sparse(NORM, BOMB) + bytes(1024),
}


@contextmanager
def _little_memory():
    """What takes more than MEMORY in here fails; what the fuzzer itself gathers does not count."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@st.composite
def damaged(draw, sound: bytes) -> bytes:
    """``sound`` after one to six changes."""
    raw = bytearray(sound)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(raw) - 1, 0)))
        size = draw(st.sampled_from([1, 1, 2, 4, 16, 512]))
        match draw(st.sampled_from(["set", "set", "set", "cut", "zero", "repeat", "remove", "insert"])):
            case "set":
                content = draw(st.binary(min_size=1, max_size=size))
                raw[at : at + len(content)] = content
            case "cut":
                del raw[at:]
            case "zero":
                raw[at : at + size] = bytes(size)
            case "repeat":
                raw[at:at] = raw[at : at + size]
            case "remove":
                del raw[at : at + size]
            case "insert":
                raw[at:at] = draw(st.binary(max_size=size))
    return bytes(raw)


class _TooLong(BaseException):
    """No error that anything under test may catch."""


def _too_long(signum, frame):
    raise _TooLong(f"no end after {SECONDS} s")


def _convert_safely(folder: Path, source: Path) -> None:
    before = {p for p in folder.rglob("*") if "out" not in p.relative_to(folder).parts}
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        with _little_memory():
            said = convert(source, folder / "out", workers=1).left_out
    except (ArchiveRefused, ArchiveDamaged, FileNotFoundError) as error:
        said = [str(error)]
    except ValueError as error:
        said = [str(error)]
        if not re.search(r"is not a zip|is a text|is a web page|is packed by", said[0]):
            raise
    finally:
        signal.alarm(0)
    for line in said:
        assert source.name in line or line.startswith("case "), "it names the file"
        assert "\n" not in line
    assert {p for p in folder.rglob("*") if "out" not in p.relative_to(folder).parts} == before


often = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", SOUND)
@often
@given(data=st.data())
def test_archives(name, data):
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / name
        source.write_bytes(data.draw(damaged(SOUND[name])))
        _convert_safely(Path(folder), source)


@pytest.mark.parametrize(
    ("files", "name"), [(FEW, PNG.replace("4.nii", "1.nii")), (NEURITE, NORM), (NEURITE, SEG4)]
)
@often
@given(data=st.data())
def test_files(files, name, data):
    with tempfile.TemporaryDirectory() as folder:
        changed = {**files, name: data.draw(damaged(files[name]))}
        _convert_safely(Path(folder), write_tree(Path(folder) / "tree", changed))


@settings(often, max_examples=max(EXAMPLES // 5, 1))
@given(data=st.data())
def test_analyze_headers(data):
    with tempfile.TemporaryDirectory() as folder:
        changed = {**SUBJECT, HDR: data.draw(damaged(SUBJECT[HDR]))}
        _convert_safely(Path(folder), write_tree(Path(folder) / "tree", changed))


@often
@given(data=st.data())
def test_tables(data):
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.csv"
        table.write_bytes(data.draw(damaged(TABLE.encode())))
        said = f"{table}: "
        try:
            with _little_memory():
                read_subjects(table)
        except ValueError as error:
            said = str(error)
        assert re.fullmatch(rf"{re.escape(str(table))}\b.*", said), said
