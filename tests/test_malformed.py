"""What strangers' files can do to a conversion: each is answered by one clear line, through both doors.

``pytest tests/test_malformed.py -s`` prints the table of inputs and messages.
"""

import gzip
import io
import re
import struct
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from oasis_like import (
    course_files,
    neurite_files,
    nifti,
    subject_files,
    write_tar,
    write_tree,
    write_zip,
)
from PIL import Image

from oasis_helpers.__main__ import main
from oasis_helpers.intake.archives import ArchiveDamaged, ArchiveRefused, members
from oasis_helpers.intake.convert import T88, convert

CASE = course_files({1: "train"})
PNG = "keras_png_slices_data/keras_png_slices_train/case_001_slice_4.nii.png"
MASK = "keras_png_slices_data/keras_png_slices_seg_train/seg_001_slice_4.nii.png"
HEAD = np.zeros(T88, np.int16)
HEAD[40:120, 60:150] = np.random.default_rng(1).integers(600, 900, (80, 90, T88[2]))  # no bomb, as in life
LABELS = (HEAD > 0).astype(np.uint8)
SUBJECT = subject_files(1, HEAD, LABELS)
HDR, IMG = (next(n for n in SUBJECT if n.endswith(f"88_gfc.{end}")) for end in ("hdr", "img"))
SEG = next(n for n in SUBJECT if n.endswith("fseg.img"))
NEURITE = neurite_files([1])
NORM, SEG4 = (next(n for n in NEURITE if n.endswith(end)) for end in ("norm.nii.gz", "seg4.nii.gz"))


def zipped(name=PNG, content=b"x", **attributes):
    """A course zip with one member more, whose entry has these attributes."""

    def build(folder):
        path = write_zip(folder / "course.zip", CASE)
        entry = zipfile.ZipInfo(name)
        entry.compress_type = zipfile.ZIP_DEFLATED
        for key, value in attributes.items():
            setattr(entry, key, value)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(entry, content)
        return path

    return build


def zip_bytes(change, files=CASE):
    """A course zip whose bytes were changed."""

    def build(folder):
        path = write_zip(folder / "course.zip", files)
        path.write_bytes(change(bytearray(path.read_bytes())))
        return path

    return build


def patched(signature, offset, content, *, last=False):
    """Overwrite bytes behind the first (or last) record of a zip with this signature."""

    def change(raw):
        at = (raw.rfind if last else raw.find)(signature) + offset
        raw[at : at + len(content)] = content
        return raw

    return change


def end_record(raw):
    """Of a zip without comment: the bytes before the end record, and the table's count, size and place."""
    return raw[:-22], struct.unpack("<HII", raw[-12:-2])


def as_zip64(raw, *, start=0, count=0xFFFF, comment=b""):
    """The zip with a ZIP64 end record as streaming writers make it: −1 in each field of the old one."""
    body, (entries, size, place) = end_record(raw)
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, size, place)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + len(body), 1)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, 2**32 - 1, 2**32 - 1, len(comment))
    return body + record + locator + end + comment


def listing(entries, *, announced=None):
    """A zip of a table of contents alone, with so many entries."""
    table = b"".join(
        struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, 0, 0, 0x21, 0, 0, 0, 6, *[0] * 6)
        + f"{i:06}".encode()
        for i in range(entries)
    )
    count = announced if announced is not None else entries
    head = b"PK\3\4" + bytes(26)
    return head + table + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(table), len(head), 0)


def long_table(folder):
    """Forty megabytes of nothing, which the ZIP64 record calls the table of contents."""
    path = folder / "c.zip"
    size = 40 * 10**6
    with path.open("wb") as file:
        file.write(b"PK\3\4")
        file.seek(size)
        end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, size, 0, 0)
        file.write(as_zip64(end, start=size))
    return path


def packed_small(folder, method, size=32 * 2**20):
    """A slice by name that announces ten bytes and unpacks to more."""
    path = folder / "c.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(PNG, bytes(size))
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
        content = patched(signature, offset, struct.pack("<I", 10))(content)
    path.write_bytes(content)
    return path


def gnu_sparse(name, size):
    """The header of a file of ``size`` zeros, none of them stored."""
    entry = tarfile.TarInfo(name)
    entry.type = tarfile.GNUTYPE_SPARSE
    raw = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    raw[483:495] = b"%011o\0" % size
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def pax_sparse(name, size):
    """The same in the form that GNU tar writes today: the map is in the data."""
    entry = tarfile.TarInfo(name)
    entry.size = 512
    about = {"major": 1, "minor": 0, "name": name, "realsize": size}
    entry.pax_headers = {f"GNU.sparse.{key}": str(value) for key, value in about.items()}
    return entry.tobuf(tarfile.PAX_FORMAT) + b"0\n".ljust(512, b"\0")


def tarred(name="x", kind=tarfile.REGTYPE, content=b"x", size=None, target="/etc/passwd"):
    """A disc archive with one member more, of this kind and claimed size."""

    def build(folder):
        path = folder / "disc1.tar.gz"
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w") as archive:
            for file, body in {**SUBJECT, name: content}.items():
                entry = tarfile.TarInfo(file)
                entry.size = len(body)
                if file == name:
                    entry.type, entry.linkname = kind, target
                    if size is not None:
                        raw.write(_claiming(entry, size))
                        continue
                archive.addfile(entry, io.BytesIO(body))
        path.write_bytes(gzip.compress(raw.getvalue(), 1))
        return path

    return build


def _claiming(entry, size):
    entry.size = size
    return entry.tobuf(tarfile.GNU_FORMAT)


def disc_bytes(change):
    def build(folder):
        path = write_tar(folder / "disc1.tar.gz", SUBJECT)
        path.write_bytes(change(bytearray(path.read_bytes())))
        return path

    return build


def nested_headers(count):
    """Extended headers that each announce another one."""
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = tarfile.XHDTYPE, 512
    return (entry.tobuf(tarfile.USTAR_FORMAT) + b"9 a=bcde\n".ljust(512, b"\0")) * count


def garbled_header(folder):
    """The archive is sound gzip; the header of its fourth member is noise."""
    raw = bytearray(gzip.decompress(write_tar(folder / "disc1.tar.gz", SUBJECT).read_bytes()))
    at = raw.find(IMG.encode())
    raw[at : at + 200] = NOISE[:200]
    (folder / "disc1.tar.gz").write_bytes(gzip.compress(bytes(raw), 1))
    return folder / "disc1.tar.gz"


def too_many_entries(folder):
    header = tarfile.TarInfo("OAS1_0001_MR1/x").tobuf()
    with gzip.open(folder / "disc1.tar.gz", "wb", compresslevel=1) as archive:
        for _ in range(110):
            archive.write(header * 1000)
    return folder / "disc1.tar.gz"


def pax_bomb(folder):
    """An extended header that claims a gigabyte, which tarfile would read whole."""
    entry = tarfile.TarInfo("pax")
    entry.type = tarfile.XHDTYPE
    with gzip.open(folder / "disc1.tar.gz", "wb", compresslevel=1) as archive:
        archive.write(_claiming(entry, 2**30))
        for _ in range(64):
            archive.write(NOISE[: 2**15] * 2)
    return folder / "disc1.tar.gz"


def raw_file(content, name="file.zip"):
    def build(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return build


def tree(files, **changes):
    """Files in a folder; a change of None takes one away."""
    wanted = {name: content for name, content in {**files, **changes}.items() if content is not None}
    return lambda folder: write_tree(folder / "tree", wanted)


def png(mode="L", size=(256, 256), format="PNG"):
    written = io.BytesIO()
    Image.new(mode, size, 0).save(written, format=format)
    return written.getvalue()


def giant_png():
    """A PNG of 900 megapixels in its header and 100 bytes in the file."""
    raw = bytearray(png())
    raw[16:24] = struct.pack(">II", 30_000, 30_000)
    raw[29:33] = struct.pack(">I", zlib.crc32(bytes(raw[12:29])))
    return bytes(raw)


def nan_volume():
    volume = HEAD.astype(np.float32)
    volume[60, 70, 90] = np.nan
    return volume


def with_table(content):
    def build(folder):
        (folder / "table.csv").write_bytes(content.encode() if isinstance(content, str) else content)
        return write_tree(folder / "tree", CASE)

    return build


TABLE = ["--subjects", "table.csv"]
COLUMNS = "ID,M/F,Hand,Age,Educ,SES,MMSE,CDR\n"
BIG = subject_files(1, HEAD + 1, LABELS, scans=3)
NOISE = np.random.default_rng(0).integers(0, 256, 2_000_000, dtype=np.uint8).tobytes()

# name of the input: how to make it, what the message says, more arguments
INPUTS = {
    # -- what is not there, or is something else
    "a path that does not exist": (lambda f: f / "no.zip", "does not exist"),
    "an empty file": (raw_file(b""), "is empty: download it again"),
    "a text file": (raw_file(b"hello " * 200), "not a zip, a tar or a tar.gz"),
    "a folder of other things": (tree({"a/b.txt": b"x"}), "holds no file named like"),
    "an empty zip": (lambda f: write_zip(f / "c.zip", {}), "is an empty zip: download it again"),
    "gzip that is no tar": (raw_file(gzip.compress(NOISE), "d.tar.gz"), "cut or damaged"),
    "a format that is not there": (tree(CASE), "no file named like OAS1_0001", ["--format", "oasis1"]),
    # -- zips
    "zip: path that climbs out": (zipped("../../evil.png"), "climbs out of its folder"),
    "zip: climbs out with backslashes": (zipped("a\\..\\..\\evil.png"), "climbs out of its folder"),
    "zip: absolute path": (zipped("/var/evil.png"), "absolute path"),
    "zip: drive letter": (zipped("C:/evil.png"), "absolute path"),
    "zip: control characters": (zipped("case\x07.png"), "control characters"),
    "zip: symbolic link": (zipped("link", external_attr=0o120777 << 16), "the link 'link'"),
    "zip: device": (zipped("dev", external_attr=0o060666 << 16), "the device or pipe 'dev'"),
    "zip: bomb": (zipped("zeros.png", b"\0" * 40_000_000), "a bomb"),
    "zip: many small bombs": (
        lambda f: write_zip(f / "c.zip", {**CASE, **{f"{i}.png": b"\0" * 10_000_000 for i in range(30)}}),
        "a bomb",
    ),
    "zip: member of 3 GB": (zip_bytes(patched(b"PK\1\2", 24, b"\0\0\0\xc0")), "no file of OASIS exceeds"),
    "zip: 65,535 entries announced": (
        zip_bytes(patched(b"PK\5\6", 8, b"\xff\xff\xff\xff", last=True)),
        "announces 65,535 files",
    ),
    "zip: lists more than it announces": (
        raw_file(listing(66_000, announced=3)),
        "announces 3 files and lists 66,000",
    ),
    "zip: too many files": (raw_file(listing(110_000, announced=3)), "holds more than 100,000 files"),
    "zip: ZIP64 that says otherwise": (
        raw_file(as_zip64(listing(66_000, announced=464), count=3)),
        "two tables of contents that contradict",
    ),
    "zip: ZIP64 of more than it lists": (
        zip_bytes(lambda raw: as_zip64(patched(b"PK\5\6", 8, b"\7\0\7\0", last=True)(raw))),
        "announces 7 files and lists 64",
    ),
    "zip: −1 and no ZIP64": (
        zip_bytes(patched(b"PK\5\6", 8, b"\xff" * 12, last=True)),
        "cannot be opened",
    ),
    "zip: long table of contents": (long_table, "table of contents of 40 MB"),
    "zip: end record in the comment": (
        zip_bytes(lambda raw: as_zip64(raw, comment=b"PK\5\6" + bytes(18))),
        "holds no file named like",
    ),
    "zip: bzip2": (lambda f: packed_small(f, zipfile.ZIP_BZIP2), "packed by method 12"),
    "zip: LZMA": (lambda f: packed_small(f, zipfile.ZIP_LZMA), "packed by method 14"),
    "zip: more than it announces": (lambda f: packed_small(f, zipfile.ZIP_DEFLATED), "cannot be unpacked"),
    "zip: place of a member before the file": (
        zip_bytes(patched(b"PK\5\6", 16, b"\xff" * 4, last=True)),
        "cannot be",
    ),
    "zip: encrypted": (zip_bytes(patched(b"PK\1\2", 8, b"\1\0")), "is encrypted"),
    "zip: cut": (zip_bytes(lambda raw: raw[: len(raw) // 2]), "no table of contents"),
    "zip: directory garbled": (zip_bytes(patched(b"PK\1\2", 0, b"XXXX")), "cannot be opened"),
    "zip: wrong checksum": (zip_bytes(patched(b"PK\1\2", 16, b"\1\2\3\4")), "cannot be unpacked"),
    "zip: unknown compression": (
        zip_bytes(lambda raw: patched(b"PK\1\2", 10, b"\x63\0")(patched(b"PK\3\4", 8, b"\x63\0")(raw))),
        "packed by method 99",
    ),
    # -- tars
    "tar: path that climbs out": (tarred("../evil.img"), "climbs out of its folder"),
    "tar: absolute path": (tarred("/etc/evil"), "absolute path"),
    "tar: symbolic link": (tarred("link", tarfile.SYMTYPE), "the link 'link'"),
    "tar: hard link": (tarred("link", tarfile.LNKTYPE), "the link 'link'"),
    "tar: device": (tarred("dev", tarfile.CHRTYPE), "the device or pipe 'dev'"),
    "tar: pipe": (tarred("pipe", tarfile.FIFOTYPE), "the device or pipe 'pipe'"),
    "tar: bomb": (
        lambda f: write_tar(f / "disc1.tar.gz", {"zeros": b"\0" * 100_000_000, **SUBJECT}),
        "a bomb",
    ),
    "tar: member of 3 GB": (tarred("big", size=3 * 2**30), "no file of OASIS exceeds"),
    "tar: header of a gigabyte": (pax_bomb, "a bomb"),
    "tar: sparse file": (raw_file(gnu_sparse(IMG, 2**25) + bytes(1024), "d.tar"), "holds the sparse file"),
    "tar: sparse file, PAX": (
        raw_file(pax_sparse(IMG, 2**25) + bytes(1024), "d.tar"),
        "holds the sparse file",
    ),
    "tar: headers in headers": (raw_file(nested_headers(900), "d.tar"), "cut or damaged"),
    "tar: less than nothing": (raw_file(_claiming(tarfile.TarInfo(IMG), -1024), "d.tar"), "has -1024 bytes"),
    "tar: 110,000 entries": (too_many_entries, "a bomb|more than 100,000 files"),
    "tar: cut": (disc_bytes(lambda raw: raw[: len(raw) // 2]), "cut or damaged"),
    "tar: garbled in the middle": (
        disc_bytes(lambda raw: raw[: len(raw) // 2] + bytes(2000) + raw[len(raw) // 2 + 2000 :]),
        "cut or damaged",
    ),
    "tar: header garbled": (garbled_header, "cut or damaged|cannot be read"),
    "tar: the course's PNGs": (lambda f: write_tar(f / "c.tar.gz", CASE), "Unpack it and give the folder"),
    # -- PNGs
    "png: RGB": (tree(CASE, **{PNG: png("RGB")}), "mode RGB, should be L"),
    "png: RGBA": (tree(CASE, **{PNG: png("RGBA")}), "mode RGBA, should be L"),
    "png: 16 bits": (tree(CASE, **{PNG: png("I;16")}), "mode I;16, should be L"),
    "png: wrong size": (tree(CASE, **{PNG: png(size=(64, 64))}), "64×64, should be 256×256"),
    "png: cut": (tree(CASE, **{PNG: CASE[PNG][:200]}), "is damaged"),
    "png: no PNG": (tree(CASE, **{PNG: b"GIF89a nothing"}), r"is damaged \(no PNG\); copy it again"),
    "png: of another format": (tree(CASE, **{PNG: png(format="BMP")}), r"is damaged \(no PNG\)"),
    "png: 900 megapixels": (tree(CASE, **{PNG: giant_png()}), "30000×30000, should be|is damaged"),
    "png: two megabytes": (tree(CASE, **{PNG: NOISE}), "has 2 MB; such files have at most 1"),
    "png: slice missing": (tree(CASE, **{PNG: None}), "slices 4 are missing"),
    "png: in two splits": (
        tree(CASE, **{PNG.replace("train", "test"): CASE[PNG]}),
        "is in test and train; keep it in one",
    ),
    "png: twice, and differing": (tree(CASE, **{f"again/{PNG}": png()}), "is there twice"),
    "png: masks without images": (
        tree({n: c for n, c in CASE.items() if "_seg_" in n}),
        "it has masks and no image",
    ),
    # -- volumes
    "analyze: no .hdr": (tree(SUBJECT, **{HDR: None}), "the .hdr beside the .img of the volume is missing"),
    "analyze: no .img": (tree(SUBJECT, **{IMG: None}), "the .img beside the .hdr of the volume is missing"),
    "analyze: .img cut": (
        tree(SUBJECT, **{IMG: SUBJECT[IMG][:99]}),
        "has 99 bytes, its header says 12,886,016",
    ),
    "analyze: .hdr cut": (tree(SUBJECT, **{HDR: SUBJECT[HDR][:99]}), "header of the volume cannot be read"),
    "analyze: .hdr of noise": (
        tree(SUBJECT, **{HDR: NOISE[:348]}),
        "header of the volume cannot be read|is .*, should be 176×208×176",
    ),
    "analyze: another grid": (
        tree(subject_files(1, np.ones((8, 9, 10), np.int16), None)),
        "8×9×10, should be 176×208×176",
    ),
    "analyze: not a number": (tree(subject_files(1, nan_volume(), LABELS)), "values that are no numbers"),
    "analyze: nothing in a plane": (tree(subject_files(1, HEAD * 0, LABELS)), "plane 73 is empty"),
    "analyze: complex values": (tree(subject_files(1, HEAD.astype(np.complex64), LABELS)), "of type"),
    "analyze: labels up to 7": (tree(subject_files(1, HEAD, LABELS * 7)), "mask holds values from 0 to 7"),
    "analyze: mask cut": (tree(SUBJECT, **{SEG: SUBJECT[SEG][:50]}), "the .img of the mask has 50 bytes"),
    "analyze: two averages": (tree(SUBJECT, **BIG), "is there twice; keep one"),
    # -- neurite
    "neurite: bomb": (tree(NEURITE, **{NORM: gzip.compress(bytes(50_000_000))}), "to more than 4 MB: a bomb"),
    "neurite: another shape": (tree(NEURITE, **{NORM: nifti(np.ones((9, 9)))}), "should be 160×192"),
    "neurite: labels of 9": (tree(NEURITE, **{SEG4: nifti(np.full((160, 192), 9.0))}), "other values than"),
    "neurite: no image": (tree(NEURITE, **{NORM: None}), "slice_norm.nii.gz is missing"),
    "neurite: cut": (tree(NEURITE, **{NORM: NEURITE[NORM][:80]}), "ends early|cannot be read"),
    "neurite: no NIfTI": (tree(NEURITE, **{NORM: gzip.compress(b"x" * 4000)}), "cannot be read"),
    # -- tables of subjects
    "table: missing": (tree(CASE), "is not there", ["--subjects", "other.csv"]),
    "table: spreadsheet": (with_table(b"PK\3\4 xlsx"), "is a spreadsheet", TABLE),
    "table: not text": (with_table(b"\x89PNG\x8d\x81\0\0"), "is not text", TABLE),
    "table: no age": (with_table("ID,M/F,CDR\n"), "has no column Age", TABLE),
    "table: odd id": (with_table(COLUMNS + "sub-01,F,R,70,,,,0\n"), "line 2: ID is 'sub-01'", TABLE),
    "table: odd age": (with_table(COLUMNS + "OAS1_0001_MR1,F,R,old,,,,0\n"), "line 2: Age is 'old'", TABLE),
    "table: odd sex": (with_table(COLUMNS + "OAS1_0001_MR1,X,R,70,,,,0\n"), "line 2: M/F is 'X'", TABLE),
    "table: odd CDR": (with_table(COLUMNS + "OAS1_0001_MR1,F,R,70,,,,9\n"), "line 2: CDR is '9'", TABLE),
    # -- what was asked for
    "--stripped of PNGs": (tree(CASE), "stripped is for OASIS-1", ["--stripped"]),
    "--workers 0": (tree(CASE), "workers is 0: give 1 or more", ["--workers", "0"]),
}


def _outside(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if "out" not in p.parts)


@pytest.mark.parametrize("name", INPUTS)
def test_malformed(name, tmp_path, capsys, monkeypatch):
    build, message, *more = INPUTS[name]
    arguments = more[0] if more else []
    monkeypatch.chdir(tmp_path)
    source = build(tmp_path)
    before = _outside(tmp_path)

    code = main(["convert", str(source), str(tmp_path / "out"), *arguments])
    found = capsys.readouterr()
    assert code == 1
    errors = [line for line in found.err.splitlines() if line.startswith("error: ")]
    left_out = [line for line in found.out.splitlines() if line.startswith("left out: ")]
    line = next((line for line in errors + left_out if re.search(message, line)), None)
    assert line, errors + left_out
    assert "Traceback" not in found.err
    assert len(line) < 400
    assert _outside(tmp_path) == before, "nothing is written outside OUT"
    with capsys.disabled():
        print(f"\n  {name:34} {line.replace(str(tmp_path), '…')[:150]}", end="")

    settings = dict(zip(arguments[::2], arguments[1::2])) if "--stripped" not in arguments else {}
    try:
        report = convert(
            source, tmp_path / "out2", settings.get("--format"), stripped="--stripped" in arguments,
            subjects=settings.get("--subjects"), workers=int(settings.get("--workers", 1)),
        )  # fmt: skip
        said = report.left_out
    except (ValueError, OSError) as error:
        said = [str(error)]
    assert any(re.search(message, line) for line in said)


BOMBS = {
    name: INPUTS[name][0]
    for name in INPUTS
    if name.startswith(
        (
            "zip: bzip2",
            "zip: LZMA",
            "zip: more than it",
            "zip: ZIP64 that",
            "zip: too",
            "zip: long",
            "tar: sparse",
        )
    )
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_no_memory(name, tmp_path):
    path = BOMBS[name](tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises((ArchiveRefused, ArchiveDamaged)):
            sum(len(member.read()) for member in members(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12 * 2**20  # bytes; each would give 32 MB, or lists files in a table of 5 MB


def test_a_volume_too_large_is_not_kept_for_later(tmp_path):
    # In a stream the files of many subjects may wait for their last one.
    files = subject_files(1, HEAD, LABELS)
    files[IMG] = HEAD.tobytes() * 5
    report = convert(write_tar(tmp_path / "disc1.tar.gz", files), tmp_path / "out")
    assert "has 64 MB; such files have at most 55" in str(report)


UNUSUAL = {
    "ZIP64 with −1, as a stream is packed": lambda raw: as_zip64(raw),
    "ZIP64 with −1 for the sizes only": lambda raw: as_zip64(raw, count=64),
    "with a comment": lambda raw: as_zip64(raw, comment=b"from the cloud"),
    "behind another zip": lambda raw: listing(0) + raw,
    "both": lambda raw: listing(0) + as_zip64(raw),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_honest_zip_of_an_unusual_form_is_read(name, tmp_path):
    path = zip_bytes(UNUSUAL[name])(tmp_path)
    assert {m.name: m.read() for m in members(path)} == CASE


def test_out_must_not_be_a_file_or_inside_the_source(tmp_path):
    source = write_tree(tmp_path / "tree", CASE)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        convert(source, tmp_path / "file")
    with pytest.raises(FileExistsError, match="is inside"):
        convert(source, source / "out")
    with pytest.raises(ValueError, match="choose one of course, oasis1, neurite"):
        convert(source, tmp_path / "out", "dicom")


def test_a_good_case_beside_a_bad_one_is_converted(tmp_path):
    files = course_files({1: "train", 402: "validate", 441: "test"})
    report = convert(write_zip(tmp_path / "c.zip", {**files, PNG: png("RGB")}), tmp_path / "out")
    assert report.converted == 2
    assert len(report.left_out) == 1
    assert "case 001: case_001_slice_4.nii.png has mode RGB" in report.left_out[0]
