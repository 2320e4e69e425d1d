"""Thousands of damaged archives, PNGs, headers and tables: ``make fuzz`` (minutes; not in ``make test``).

Sound files are changed at random (bytes flipped, cut, repeated, moved, zeroed) and converted. Every
one must end within seconds, in a report or in one of the two documented errors, with nothing
written outside the target. ``FUZZ_EXAMPLES=50000 make fuzz`` looks longer.
"""

import os
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_malformed import CASE, HDR, NEURITE, NORM, PNG, SEG4, SUBJECT, write_tar, write_tree, write_zip

from oasis_helpers.convert import convert
from oasis_helpers.subjects import read_subjects

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "3000"))
SECONDS = 20
TABLE = "ID,M/F,Hand,Age,Educ,SES,MMSE,CDR\nOAS1_0001_MR1,F,R,74,2,3,29,0\nOAS1_0002_MR1,M,R,21,,,,\n"


def _archive(write, name, files):
    with tempfile.TemporaryDirectory() as folder:
        return write(Path(folder) / name, files).read_bytes()


FEW = {name: content for name, content in CASE.items() if "slice_1" in name}
SOUND = {
    "course.zip": _archive(write_zip, "course.zip", FEW),
    "neurite.tar": _archive(lambda p, f: write_tar(p, f, packed=False), "neurite.tar", NEURITE),
    "neurite.tar.gz": _archive(write_tar, "neurite.tar.gz", NEURITE),
}


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


def _too_long(signum, frame):
    raise TimeoutError(f"no end after {SECONDS} s")


def _said(work) -> str:
    """The message of a documented error; every other error goes through."""
    try:
        work()
    except TimeoutError:
        raise
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def _convert_safely(folder: Path, source: Path) -> None:
    before = {p for p in folder.rglob("*") if "out" not in p.relative_to(folder).parts}
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    said = _said(lambda: convert(source, folder / "out", workers=1))
    signal.alarm(0)
    assert "\n" not in said
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
        assert "\n" not in _said(lambda: read_subjects(table))
