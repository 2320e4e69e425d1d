"""Folders and archives as people have them: a broken part costs no other, and nothing is skipped silently."""

import gzip
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from filelock import FileLock
from oasis_like import course_files, neurite_files, subject_files, write_tar, write_tree, write_zip

from oasis_helpers.__main__ import main
from oasis_helpers.data import check_dataset
from oasis_helpers.intake import archives, target
from oasis_helpers.intake.archives import ArchiveRefused, kind_of, members
from oasis_helpers.intake.cases import PENDING
from oasis_helpers.intake.convert import T88, convert
from oasis_helpers.intake.sources import find_source

LOGIN = b"\n<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>"


def cases_in(root):
    found = {}
    for path in root.rglob("*.png"):
        found.setdefault(int(path.name.split("_")[1]), []).append(path)
    return {case: len(paths) for case, paths in sorted(found.items())}


def neurite_tar(path, cases, packed=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tar(path, neurite_files(cases), packed=packed)


def _link(path):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in neurite_files([8]).items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        entry = tarfile.TarInfo("link")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry)


def _cut(path):
    neurite_tar(path, [8, 9])
    path.write_bytes(path.read_bytes()[:-400])


def _dangling(path):
    path.symlink_to(path.with_name("gone"))


BROKEN = {
    "a login page": (lambda p: p.write_bytes(LOGIN), "a web page, not an archive: log in and download"),
    "a login page, packed": (lambda p: p.write_bytes(gzip.compress(LOGIN)), "a web page, not an archive"),
    "an error of a server": (lambda p: p.write_text('{"error": "denied"}'), "is a text .*denied.*: log in"),
    "nothing": (lambda p: p.write_bytes(b""), "is empty: download it again"),
    "an empty zip": (lambda p: p.write_bytes(b"PK\5\6" + bytes(18)), "is an empty zip: download it again"),
    "a pointer": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "is a text"),
    "noise": (lambda p: p.write_bytes(bytes(range(256)) * 9), "is not a zip, a tar or a tar.gz"),
    "a link": (_link, "holds the link 'link'"),
    "cut": (_cut, "is cut or damaged"),
    "a link to nothing": (_dangling, "is a link to something that is not there"),
    "another packer": (lambda p: p.write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(99)), "7-Zip .* and give the"),
    "RAR": (lambda p: p.write_bytes(b"Rar!\x1a\x07\0" + bytes(99)), "unrar"),
    "bzip2": (lambda p: p.write_bytes(b"BZh91AY" + bytes(99)), "tar -xjf"),
    "a zip that is damaged": (lambda p: p.write_bytes(b"PK\3\4" + bytes(99)), "no table of contents"),
}


@pytest.mark.parametrize(
    "name",
    [
        "disc0.tar.gz",
        "disc2.zip",
        "deep/er/disc2.TGZ",
        "disc2.tar.gz (1)",
        "disc2.tar.gz.part",
        "disc2.tar.gz.html",
        "Unconfirmed 1234.crdownload",
        "disc2.part",
        "disc2.xz",
        "disc2.z01",
    ],
)
def test_a_login_page_costs_no_other(name, tmp_path, capsys):
    neurite_tar(tmp_path / "in" / "disc1.tar.gz", [1, 402, 441])
    page = tmp_path / "in" / name
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_bytes(LOGIN)
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    found = capsys.readouterr()
    assert "3 cases converted" in found.out
    assert f"left out: {page} is a web page" in found.out
    assert check_dataset(tmp_path / "out").ok


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("number", [0, 2])
def test_a_broken_part_costs_no_other_and_is_named(kind, number, tmp_path):
    write, message = BROKEN[kind]
    neurite_tar(tmp_path / "in" / "disc1.tar.gz", [1, 402, 441])
    write(tmp_path / "in" / f"disc{number}.tar.gz")
    report = convert(tmp_path / "in", tmp_path / "out")
    assert set(cases_in(tmp_path / "out")) - ({8} if kind == "cut" else set()) == {1, 402, 441}
    assert len(report.left_out) == 1
    assert f"disc{number}.tar.gz" in report.left_out[0]
    assert re.search(message, report.left_out[0])


def test_if_all_parts_are_broken_the_line_says_how(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "disc1.tar.gz").write_bytes(LOGIN)
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "a web page, not an archive" in error
    assert not (tmp_path / "out").exists()


# ---- parts of several kinds ------------------------------------------------------------------------


def test_zips_tars_and_files_are_all_used(tmp_path):
    files = neurite_files([1, 2, 402, 441])
    by_case = {c: {n: x for n, x in files.items() if f"_{c:04d}_" in n} for c in (1, 2, 402, 441)}
    source = write_tree(tmp_path / "in", by_case[1])
    write_zip(source / "a.zip", by_case[2])
    write_tar(source / "b.tar.gz", by_case[402])
    (source / "deep").mkdir()
    write_tar(source / "deep" / "c.TAR", by_case[441], packed=False)
    report = convert(source, tmp_path / "out")
    assert report.ok, report
    assert cases_in(tmp_path / "out") == dict.fromkeys((1, 2, 402, 441), 2)


def test_a_case_whose_files_are_in_two_parts_is_put_together(tmp_path):
    files = course_files({1: "train"})
    source = write_tree(tmp_path / "in", {n: c for n, c in files.items() if "_seg_" in n})
    write_zip(
        source / "images-001.zip", {n: c for n, c in files.items() if "slice_1" in n and "_seg_" not in n}
    )
    write_zip(
        source / "images-002.zip", {n: c for n, c in files.items() if "slice_1" not in n and "_seg_" not in n}
    )
    report = convert(source, tmp_path / "out")
    assert report.ok, report
    assert cases_in(tmp_path / "out") == {1: 64}

    both = neurite_files([5])
    norm = next(name for name in both if name.endswith("norm.nii.gz"))
    source = write_tree(tmp_path / "in2", {norm: both.pop(norm)})
    write_tar(source / "masks.tar.gz", both)
    report = convert(source, tmp_path / "out2")
    assert report.ok, report
    assert cases_in(tmp_path / "out2") == {5: 2}


@pytest.mark.parametrize("again", ["disc1 (1).tar.gz", "copy/disc1.tar.gz", "disc1.zip", "open"])
def test_the_same_disc_twice_gives_each_case_once(again, tmp_path):
    source, files = tmp_path / "in", neurite_files([1, 402, 441])
    first = neurite_tar(source / "disc1.tar.gz", [1, 402, 441])
    if again == "open":
        write_tree(source, files)
    elif again.endswith(".zip"):
        write_zip(source / again, files)
    else:
        (source / again).parent.mkdir(exist_ok=True)
        shutil.copy(first, source / again)
    report = convert(source, tmp_path / "out")
    assert report.ok, report
    assert (report.converted, cases_in(tmp_path / "out")) == (3, {1: 2, 402: 2, 441: 2})
    assert "holds 3 cases once more, the first is 1" in str(report)
    assert check_dataset(tmp_path / "out").ok


def test_a_second_copy_stands_in_for_a_damaged_one(tmp_path):
    _cut(neurite_tar(tmp_path / "in" / "disc1.tar.gz", [1]))
    neurite_tar(tmp_path / "in" / "disc1 (1).tar.gz", [8, 9])
    convert(tmp_path / "in", tmp_path / "out")
    assert cases_in(tmp_path / "out") == {8: 2, 9: 2}

    files = neurite_files([5])
    norm = next(name for name in files if name.endswith("norm.nii.gz"))
    write_tar(tmp_path / "in2.tar.gz", {**files, norm: files[norm][:60]})
    source = write_tree(tmp_path / "in2", {})
    source.mkdir(exist_ok=True)
    shutil.move(tmp_path / "in2.tar.gz", source / "a.tar.gz")
    write_tar(source / "b.tar.gz", files)
    report = convert(source, tmp_path / "out2")
    assert report.ok, report
    assert "another copy of the case was used" in str(report)


def test_copies_that_differ_are_refused_whichever_is_first(tmp_path):
    files = course_files({1: "train", 2: "train"})
    name = next(n for n in files if "case_001_slice_4" in n)
    other = next(content for n, content in files.items() if "case_002_slice_4" in n)
    source = write_tree(tmp_path / "in", files)
    write_zip(source / "old.zip", {name: other})
    report = convert(source, tmp_path / "out")
    assert cases_in(tmp_path / "out") == {2: 64}
    assert "case_001_slice_4.nii.png is there twice; keep one of the two" in report.left_out[0]


def test_many_interleaved_subjects_come_whole(tmp_path):
    cases = list(range(1, 2 * PENDING))
    files = neurite_files(cases)
    ordered = sorted(files, key=lambda name: name.rsplit("/", 1)[-1])  # all of one kind, then all of another
    report = convert(write_tar(tmp_path / "disc.tar.gz", {n: files[n] for n in ordered}), tmp_path / "out")
    assert report.ok, report
    assert cases_in(tmp_path / "out") == dict.fromkeys(cases, 2)
    assert check_dataset(tmp_path / "out").ok
    assert [p.name for p in (tmp_path / "out").iterdir() if p.is_file()].count(".conversion.lock") == 1
    assert len([p for p in (tmp_path / "out").iterdir() if p.is_file()]) == 3


def test_what_belongs_to_another_form_is_named(tmp_path):
    source = write_tree(tmp_path / "in", course_files({1: "train"}))
    neurite_tar(source / "neurite.tar", [402], packed=False)
    write_zip(source / "papers.zip", {"a.pdf": b"x"})
    report = convert(source, tmp_path / "out")
    assert cases_in(tmp_path / "out") == {1: 64}
    (line,) = report.left_out
    assert "neurite.tar also holds neurite files" in line
    assert "--format neurite" in line
    assert any("papers.zip holds nothing of OASIS" in note for note in report.notes)


@pytest.mark.parametrize("outer", ["all.zip", "all.tar", "folder/all.zip"])
def test_an_archive_in_an_archive_is_named(outer, tmp_path, capsys):
    inner = write_zip(tmp_path / "keras_png_slices_data.zip", course_files({1: "train"}))
    files = {"from teacher/keras_png_slices_data.zip": inner.read_bytes(), "x/disc12.tar.gz": b"x"}
    path = tmp_path / outer
    path.parent.mkdir(exist_ok=True)
    if outer.endswith("zip"):
        write_zip(path, files)
    else:
        write_tar(path, files, packed=False)
    source = path if outer[0] == "a" else path.parent
    assert main(["convert", str(source), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "all." in error
    assert "holds from teacher/keras_png_slices_data.zip: unpack it once" in error


def test_an_archive_in_an_archive_may_be_large(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "LARGEST_MEMBER", 1000)
    for path in (write_zip(tmp_path / "a.zip", {"disc1.tar.gz": bytes(range(256)) * 9}),
                 write_tar(tmp_path / "a.tar", {"disc1.tar.gz": bytes(2000)}, packed=False)):  # fmt: skip
        assert [m.name for m in members(path)] == ["disc1.tar.gz"]


def test_all_of_oasis_in_one_archive_is_no_bomb():
    assert archives.LARGEST_TOTAL > 60e9


def test_links_are_followed_and_no_circle_is(tmp_path):
    elsewhere = write_tree(tmp_path / "elsewhere", course_files({1: "train"}))
    neurite_tar(tmp_path / "more" / "n.tar", [2])
    source = tmp_path / "in"
    source.mkdir()
    (source / "link").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "back").symlink_to(elsewhere, target_is_directory=True)
    report = convert(source, tmp_path / "out")
    assert report.ok, report
    assert cases_in(tmp_path / "out") == {1: 64}
    (source / "link").unlink()
    (source / "discs").symlink_to(tmp_path / "more", target_is_directory=True)
    assert convert(source, tmp_path / "out2").converted == 1


@pytest.mark.parametrize("form", ["tree", "zip", "tar"])
def test_the_case_of_letters_does_not_matter(form, monkeypatch, tmp_path):
    monkeypatch.setattr("oasis_helpers.intake.convert.misplaced", lambda *a: None)  # noise is no head
    volume = np.zeros(T88, np.int16)
    volume[40:120, 60:150] = np.random.default_rng(1).integers(600, 900, (80, 90, T88[2]))
    files = {n.upper(): c for n, c in subject_files(1, volume, (volume > 0).astype(np.uint8)).items()}
    source = {
        "tree": lambda: write_tree(tmp_path / "t", files),
        "zip": lambda: write_zip(tmp_path / "T.ZIP", files),
        "tar": lambda: write_tar(tmp_path / "T.TAR.GZ", files),
    }[form]()
    report = convert(source, tmp_path / "out", workers=1)
    assert report.ok, report
    assert cases_in(tmp_path / "out") == {1: 64}


@pytest.mark.parametrize(
    "name",
    [
        "__MACOSX/._case_001_slice_0.nii.png", "keras_png_slices_train/._case_001_slice_0.nii.png", 
        ".DS_Store",
        "Icon\r", "keras_png_slices_train/Thumbs.db", "desktop.ini", "$RECYCLE.BIN/x", ".directory",
        ".thumbnails/normal/case_001_slice_0.nii.png", "@eaDir/x", 
        ".Trash-1000/keras_png_slices_train/case_009_slice_0.png",
        "~$notes.docx",
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["zip", "tree"])
def test_clutter_refuses_nothing(name, form, tmp_path):
    files = {**course_files({1: "train"}), f"keras_png_slices_data/{name}": b"\0\5\26\7"}
    source = write_zip(tmp_path / "c.zip", files) if form == "zip" else write_tree(tmp_path / "c", files)
    if "/" not in name:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).write_bytes(b"\0")
    report = convert(source, tmp_path / "out")
    assert report.ok, report
    assert cases_in(tmp_path / "out") == {1: 64}


def test_clutter_in_a_tar_refuses_nothing(tmp_path):
    files = {
        "Icon\r": b"",
        "._disc1": b"x",
        "a/.DS_Store": b"x",
        "Thumbs.db": bytes(10),
        **neurite_files([1]),
    }
    assert convert(write_tar(tmp_path / "d.tar.gz", files), tmp_path / "out").ok


def test_slices_without_splits_get_the_courses(tmp_path):
    files = {}
    for name, content in course_files({1: "train", 402: "validate"}).items():
        base = name.rsplit("/", 1)[-1].replace(".nii", "")
        files[f"{'slices_seg' if base.startswith('seg') else 'slices'}/{base}"] = content
    report = convert(write_tree(tmp_path / "in", files), tmp_path / "out")
    assert report.ok, report
    assert cases_in(tmp_path / "out") == {1: 64, 402: 64}
    assert len(list((tmp_path / "out" / "keras_png_slices_seg_validate").iterdir())) == 32


# ---- honest archives of unusual forms ---------------------------------------------------------------


@pytest.mark.parametrize("backwards", [False, True])
def test_a_zip_with_either_slash_in_either_place(backwards, tmp_path):
    files = course_files({1: "train"}, top="")
    path = write_zip(tmp_path / "c.zip", files)
    raw = bytearray(path.read_bytes())
    directory = raw.find(b"PK\1\2")
    for name in files:
        first = raw.find(name.encode())
        at = first if backwards else raw.find(name.encode(), directory)
        raw[at : at + len(name)] = name.replace("/", "\\").encode()
    path.write_bytes(raw)
    report = convert(path, tmp_path / "out")
    assert report.ok, report
    assert cases_in(tmp_path / "out") == {1: 64}


def test_a_tar_without_its_mark(tmp_path):
    path = tmp_path / "old"
    with path.open("wb") as file:
        for name, content in neurite_files([1]).items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            header = bytearray(entry.tobuf(tarfile.USTAR_FORMAT))
            header[257:345] = bytes(88)  # as before POSIX
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            file.write(bytes(header) + content + bytes(-len(content) % 512))
        file.write(bytes(1024))
    assert kind_of(path) == "tar"
    assert convert(path, tmp_path / "out").ok
    source = tmp_path / "in"
    source.mkdir()
    path.rename(source / "old")  # without an ending in a folder, too
    assert convert(source, tmp_path / "out2").ok


# ---- OUT -------------------------------------------------------------------------------------------


def test_what_is_refused_leaves_nothing_of_it(tmp_path):
    _link(tmp_path / "a.tar.gz")
    report = convert(tmp_path / "a.tar.gz", tmp_path / "out")
    assert "the link" in report.left_out[0]
    assert cases_in(tmp_path / "out") == {}
    with pytest.raises(ArchiveRefused):
        list(members(tmp_path / "a.tar.gz"))


def _all_broken(folder):
    files = neurite_files([1])
    return write_tree(folder, {n: c[:50] for n, c in files.items()})


def test_force_deletes_nothing_before_there_is_something_better(tmp_path):
    out = tmp_path / "out"
    convert(write_tree(tmp_path / "c", course_files({1: "train"})), out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    report = convert(_all_broken(tmp_path / "broken"), out, force=True)
    assert not report.ok
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    _link(tmp_path / "bad.zip")
    (tmp_path / "table.csv").write_text("nonsense")
    for arguments in (["bad.zip"], ["gone"], ["c", "--subjects", "table.csv"], ["c", "--format", "oasis1"]):
        source = str(tmp_path / arguments[0])
        rest = [str(tmp_path / a) if a.endswith("csv") else a for a in arguments[1:]]
        main(["convert", source, str(out), "--force", *rest])
        if arguments[0] != "bad.zip":
            assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert convert(write_tree(tmp_path / "n", neurite_files([402])), out, force=True).ok
    assert cases_in(out) == {402: 2}


def test_two_conversions_at_once_are_told_apart(tmp_path, capsys):
    source, out = write_tree(tmp_path / "c", course_files({1: "train"})), tmp_path / "out"
    out.mkdir()
    (out / "keras_png_slices_train").mkdir()
    half = out / "keras_png_slices_train" / ".case_009_slice_0.nii.png.ab.part"
    half.write_bytes(b"of the other")
    (out / "conversion.json").write_text('{"version": 1, "format": "course", "stripped": false}')
    with FileLock(out / target.LOCK):
        assert main(["convert", str(source), str(out)]) == 1
    error = capsys.readouterr().err
    assert "is being written by another conversion. Wait" in error
    assert error.count("\n") == 1
    assert half.exists()
    assert cases_in(out) == {}
    assert main(["convert", str(source), str(out)]) == 0
    assert not half.exists()


def test_two_processes_do_not_harm_each_other(tmp_path, capsys):
    source = write_tree(tmp_path / "c", course_files({c: "train" for c in range(1, 13)}))
    out = tmp_path / "out"
    command = ["convert", str(source), str(out), "--workers", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "oasis_helpers", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as other:
        while not (out / target.LOCK).exists() and other.poll() is None:
            time.sleep(0.01)
        code = main(command)
        errors = other.communicate()[1]
    assert code == 0 or "another conversion" in capsys.readouterr().err
    assert other.returncode == 0 or "another conversion" in errors
    assert 0 in (code, other.returncode)
    assert cases_in(out) == dict.fromkeys(range(1, 13), 64)
    assert not list(out.glob("*/.*"))


@pytest.mark.parametrize("force", [False, True])
def test_phantoms_and_people_are_not_mixed(force, tmp_path):
    source, out = write_tree(tmp_path / "c", course_files({1: "train"})), tmp_path / "out"
    out.mkdir()
    (out / "phantoms.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds phantoms"):
        convert(source, out, force=force)
    assert [p.name for p in out.iterdir()] == ["phantoms.json"]
    (source / "keras_png_slices_data" / "phantoms.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds phantoms, no people"):
        convert(source, tmp_path / "out2", force=force)
    assert not (tmp_path / "out2").exists()
    write_zip(source / "people.zip", course_files({402: "validate"}))
    report = convert(source, tmp_path / "out2", force=force)
    assert "holds phantoms, no people" in report.left_out[0]
    assert cases_in(tmp_path / "out2") == {402: 64}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("conversion.json", "{", "conversion.json is damaged"), ("conversion.json", "[1]", "conversion.json is"),
     ("conversion.csv", "a,b\n1,2\n", "conversion.csv is damaged"),
     ("conversion.csv", "case,split,images,masks,sha256\nx,,,,\n", "conversion.csv is damaged")],
)  # fmt: skip
def test_a_damaged_note_of_a_conversion_is_one_line(name, content, message, tmp_path, capsys):
    source, out = write_tree(tmp_path / "c", course_files({1: "train"})), tmp_path / "out"
    convert(source, out)
    (out / name).write_text(content)
    assert main(["convert", str(source), str(out)]) == 1
    assert message in capsys.readouterr().err
    assert main(["convert", str(source), str(out), "--force"]) == 0
    assert json.loads((out / "conversion.json").read_text())["format"] == "course"


def test_what_is_finished_needs_no_space(tmp_path, monkeypatch):
    source, out = write_tree(tmp_path / "c", course_files({1: "train", 2: "train"})), tmp_path / "out"
    convert(source, out)
    size = find_source(source).size
    free = shutil.disk_usage(tmp_path)._replace(free=size // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    assert convert(source, out).kept == 2
    with pytest.raises(OSError, match="MB free"):
        convert(source, tmp_path / "other")


@pytest.mark.parametrize("content", ["[]", "null", '{"version": 1}', '{"format": 5}', "{", "\xff"])
def test_check_names_the_plan_that_is_damaged(content, tmp_path, capsys):
    convert(neurite_tar(tmp_path / "in" / "disc1.tar.gz", [1, 402, 441]), tmp_path / "out")
    (tmp_path / "out" / "conversion.json").write_bytes(content.encode("latin-1"))
    assert main(["check", str(tmp_path / "out")]) == 1
    assert "conversion.json is damaged: convert again into a new folder" in capsys.readouterr().err


def test_out_that_links_to_itself_is_named(tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    source = neurite_tar(tmp_path / "in" / "disc1.tar.gz", [1, 402, 441])
    for out in (source.parent, source):
        assert main(["convert", str(out), str(tmp_path / "loop")]) == 1
        assert "loop cannot be a folder" in capsys.readouterr().err


def test_a_slice_left_empty_is_made_again(tmp_path):
    source = neurite_tar(tmp_path / "in" / "disc1.tar.gz", [1, 402, 441])
    convert(source, tmp_path / "out")
    next((tmp_path / "out").rglob("case_402_*.png")).write_bytes(b"")
    assert convert(source, tmp_path / "out").converted == 1
    assert check_dataset(tmp_path / "out").ok
