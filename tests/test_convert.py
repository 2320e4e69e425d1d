"""Conversion of every form of OASIS, on files made here: forms, geometry, resuming, subjects."""

import hashlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from oasis_like import (
    analyze,
    course_files,
    neurite_files,
    subject_files,
    write_tar,
    write_tree,
    write_zip,
)
from PIL import Image

from oasis_helpers.data import OASISDataset, check_dataset, find_data
from oasis_helpers.intake import convert as module
from oasis_helpers.intake.convert import FIRST_PLANE, convert, recognise, split_of
from oasis_helpers.intake.subjects import Subject, load_subjects, read_subjects
from oasis_helpers.layout import course_cases

COURSE = {1: "train", 402: "validate", 441: "test"}


def digests(root):
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="session")
def disc(head, tmp_path_factory):
    """A disc archive with three subjects, a repeat session, and files that nobody needs."""
    files = {"disc1/readme.txt": b"x"}
    for case, session, scans in ((1, 1, 4), (1, 2, 4), (402, 1, 3), (441, 1, 4)):
        found = subject_files(case, *head, session=session, scans=scans)
        files |= {f"disc1/{name}": content for name, content in found.items()}
    return write_tar(tmp_path_factory.mktemp("disc") / "oasis_cross-sectional_disc1.tar.gz", files)


@pytest.fixture(scope="session")
def converted(disc, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    return out, convert(disc, out, workers=2)


def image_of(root, case, k, split="train", masks=False):
    prefix = "seg" if masks else "case"
    folder = f"keras_png_slices_{'seg_' if masks else ''}{split}"
    return np.asarray(Image.open(root / folder / f"{prefix}_{case:03d}_slice_{k}.nii.png"))


def test_no_command_that_brings_data_in_needs_torch(phantoms, tmp_path):
    source = write_tree(tmp_path / "c", course_files({1: "train"}))
    commands = [
        ["check", str(phantoms.root)],
        ["convert", str(source), str(tmp_path / "out")],
        ["phantoms", str(phantoms.root), "--cases", "2", "1", "1", "--slices", "4"],  # they are there
    ]
    program = f"""
import sys
from oasis_helpers.__main__ import main
print([main(command) for command in {commands}])
print({{"torch", "torchvision", "nilearn", "matplotlib"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["[0, 0, 0]", "set()"]


def test_one_thread_for_each_processor_that_we_may_use(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("joblib.cpu_count", lambda: 3)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    pool = module.ThreadPoolExecutor
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda n: asked.append(n) or pool(n))
    convert(write_tree(tmp_path / "c", course_files({1: "train"})), tmp_path / "out")
    assert asked == [3]


# ---- the course set -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "top", ["keras_png_slices_data/", "", "keras_png_slices_data/keras_png_slices_data/"]
)
@pytest.mark.parametrize("form", ["zip", "folder"])
def test_the_course_set_is_copied_byte_for_byte(top, form, tmp_path):
    files = course_files(COURSE, top=top)
    files[f"{top}__MACOSX/keras_png_slices_train/._case_001_slice_0.nii.png"] = b"\0\5\26\7"
    source = write_zip(tmp_path / "c.zip", files) if form == "zip" else write_tree(tmp_path / "c", files)
    report = convert(source, tmp_path / "out")
    assert report.ok, report
    assert (report.converted, report.kept) == (3, 0)
    for name, content in files.items():
        if "._" not in name:
            path = tmp_path / "out" / name.removeprefix(top)
            assert path.read_bytes() == content
    assert find_data(tmp_path / "out").kind == "oasis"


def test_the_whole_course_set_gets_its_verdict(tmp_path, monkeypatch):
    """The verdicts, with the checksums of a miniature in the place of the real ones."""
    files = course_files(COURSE)
    root = write_tree(tmp_path / "c", files) / "keras_png_slices_data"

    def digest(folder):
        ordered = sorted((root / folder).iterdir(), key=lambda p: int(p.name.split("_")[3].split(".")[0]))
        hashes = [hashlib.sha256(p.read_bytes()).hexdigest() for p in ordered]
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    known = {
        case: {
            "slices": "32",
            "split": split,
            "images_sha256": digest(f"keras_png_slices_{split}"),
            "masks_sha256": digest(f"keras_png_slices_seg_{split}"),
        }
        for case, split in COURSE.items()
    }
    monkeypatch.setattr("oasis_helpers.intake.check.course_cases", lambda: known)
    report = check_dataset(root)
    assert report.ok
    assert "checksums: complete and unmodified" in str(report)

    encoded = tmp_path / "encoded"
    shutil.copytree(root, encoded)
    for path in encoded.rglob("*.png"):
        Image.open(path).save(path, compress_level=9)
    report = check_dataset(encoded)
    assert report.ok
    assert "complete, re-encoded" in str(report)

    one = tmp_path / "one"
    shutil.copytree(root, one)
    path = one / "keras_png_slices_train" / "case_001_slice_5.nii.png"
    pixels = np.array(Image.open(path))
    pixels[3, 3] = 9
    Image.fromarray(pixels).save(path)
    report = check_dataset(one)
    assert not report.ok
    assert "altered: cases 1" in str(report)
    assert "case_001_slice_5.nii.png: something outside the middle" in str(report)

    (one / "keras_png_slices_seg_test" / "seg_441_slice_31.nii.png").unlink()
    shutil.rmtree(one / "keras_png_slices_validate")
    report = check_dataset(one)
    assert "folder keras_png_slices_validate" in str(report)
    assert "seg_441_slice_31.nii.png: the mask of a slice that is there" in str(report)
    assert not report.ok


# ---- OASIS-1: geometry ----------------------------------------------------------------------------


def test_a_disc_becomes_the_course_set(converted):
    root, report = converted
    assert report.ok, report
    assert report.converted == 3
    assert report.notes == []
    for split, case in (("train", 1), ("validate", 402), ("test", 441)):
        assert {p.name for p in (root / f"keras_png_slices_{split}").iterdir()} == {
            f"case_{case:03d}_slice_{k}.nii.png" for k in range(32)
        }
    dataset = OASISDataset(root / "keras_png_slices_train", label_path=root / "keras_png_slices_seg_train")
    assert len(dataset) == 32
    checked = check_dataset(root)
    assert checked.ok, checked
    assert "complete and unmodified" in str(checked)


def test_every_voxel_is_where_it_should_be(head, converted):
    root, _ = converted
    volume, labels = head
    for k in (0, 17, 31):
        plane = volume[:, :, FIRST_PLANE + k].astype(float)
        expected = np.zeros((256, 256), np.uint8)
        expected[40:216, 24:232] = np.round(plane * (255 / plane.max()))
        assert (image_of(root, 1, k) == expected).all()
        mask = np.zeros((256, 256), np.uint8)
        mask[40:216, 24:232] = 85 * labels[:, :, FIRST_PLANE + k]
        assert (image_of(root, 1, k, masks=True) == mask).all()
    assert FIRST_PLANE + 17 == 90  # OASIS's tra_90


@pytest.mark.parametrize(
    "header", [{}, {"big": False}, {"trailing": False}, {"orient": 3}, {"orient": 5, "big": False}], ids=str
)
def test_a_marked_voxel_lands_on_its_pixel(head, header, tmp_path):
    # Left–right, front–back and up–down each have their own mark; no header may move them.
    volume, labels = (v.copy() for v in head)
    marks = {(20, 104, 90): 3100, (150, 30, 80): 3200, (88, 190, 100): 3300}
    for where, value in marks.items():
        volume[where] = value
        labels[where] = 3
    source = write_tree(tmp_path / "tree", subject_files(1, volume, labels, **header))
    report = convert(source, tmp_path / "out", workers=1)
    assert report.ok, report
    for x, y, z in marks:
        image = image_of(tmp_path / "out", 1, z - FIRST_PLANE)
        assert np.argwhere(image == 255).tolist() == [[40 + x, 24 + y]]
        assert image_of(tmp_path / "out", 1, z - FIRST_PLANE, masks=True)[40 + x, 24 + y] == 255


def test_real_numbers_and_negative_ones_are_scaled_too(head, tmp_path):
    volume = head[0].astype(np.float32) / 7
    volume[0, 0] = -50
    convert(write_tree(tmp_path / "t", subject_files(1, volume, head[1])), tmp_path / "out")
    image = image_of(tmp_path / "out", 1, 4)
    plane = np.clip(volume[:, :, FIRST_PLANE + 4].astype(float), 0, None)
    assert (image[40:216, 24:232] == np.round(plane * (255 / plane.max()))).all()


def test_stripped_takes_the_brain_only(head, tmp_path):
    source = write_tree(tmp_path / "t", subject_files(1, *head))
    report = convert(source, tmp_path / "out", stripped=True)
    assert report.ok
    image, mask = (image_of(tmp_path / "out", 1, 10, masks=m) for m in (False, True))
    assert (image[mask == 0] == 0).all()
    assert image[mask > 0].any()


def test_tree_disc_and_folder_of_discs_give_the_same_bytes(head, disc, converted, tmp_path):
    import tarfile

    with tarfile.open(disc) as archive:
        archive.extractall(tmp_path / "tree", filter="data")
    convert(tmp_path / "tree", tmp_path / "from-tree", workers=1)
    (tmp_path / "discs").mkdir()
    (tmp_path / "discs" / disc.name).symlink_to(disc)
    convert(tmp_path / "discs", tmp_path / "from-discs")
    assert digests(tmp_path / "from-tree") == digests(tmp_path / "from-discs") == digests(converted[0])


def test_discs_can_follow_each_other(head, disc, tmp_path):
    convert(disc, tmp_path / "out")
    second = write_tar(tmp_path / "oasis_cross-sectional_disc2.tar.gz", subject_files(2, *head))
    report = convert(second, tmp_path / "out")
    assert (report.converted, report.kept) == (1, 3)
    assert check_dataset(tmp_path / "out").ok


def test_a_missing_segmentation_is_reported_and_the_images_come(head, tmp_path):
    report = convert(write_tree(tmp_path / "t", subject_files(1, head[0], None)), tmp_path / "out")
    assert report.ok
    assert "case 001 has no segmentation" in str(report)
    assert "no case for validate" in str(report)
    assert len(OASISDataset(tmp_path / "out" / "keras_png_slices_train")) == 32


def test_a_head_stored_upside_down_is_noticed(head, tmp_path):
    upside_down = [v[:, :, ::-1].copy() for v in head]
    upside_down[0][:, :, FIRST_PLANE : FIRST_PLANE + 32] = head[0][:, :, FIRST_PLANE : FIRST_PLANE + 32]
    report = convert(write_tree(tmp_path / "t", subject_files(1, *upside_down)), tmp_path / "out")
    assert "upside down" in str(report)


def test_splits_are_the_courses_and_else_drawn_from_the_id():
    assert all(split_of(case) == row["split"] for case, row in course_cases().items())
    absent = [case for case in range(1, 458) if case not in course_cases()]
    drawn = [split_of(case) for case in absent]
    assert len(absent) > 60
    assert drawn == [split_of(case) for case in absent]
    assert {"train", "validate", "test"} == {split_of(case) for case in range(500, 700)}
    many = [split_of(case) for case in range(1000, 6000)]
    assert abs(many.count("train") / 5000 - 0.85) < 0.02
    assert abs(many.count("validate") / 5000 - 0.10) < 0.02


# ---- neurite-oasis ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tar", "folder"])
def test_neurite_slices_stay_apart(form, tmp_path):
    files = neurite_files([1, 402, 441])
    if form == "tar":
        source = write_tar(tmp_path / "neurite-oasis.v1.0.tar", files, packed=False)
    else:
        source = write_tree(tmp_path / "n", files)
    assert recognise(source) == "neurite"
    report = convert(source, tmp_path / "out")
    assert report.ok, report
    image, mask = (image_of(tmp_path / "out", 402, 0, "validate", m) for m in (False, True))
    assert image[48 + 40, 32 + 50] == 255
    assert image[48 + 60, 32 + 60] == 128
    # cortex and deep grey are grey matter, then white matter, then CSF
    assert mask[48 + 60, 32 + 40 : 32 + 44].tolist() == [170, 170, 255, 85]
    assert check_dataset(tmp_path / "out").ok
    with pytest.raises(FileExistsError, match="converted otherwise"):
        convert(write_tree(tmp_path / "c", course_files(COURSE)), tmp_path / "out")


# ---- nothing is lost, nothing overwritten ---------------------------------------------------------------


def test_an_interrupted_conversion_goes_on(disc, converted, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(converted[0], out)
    # As after a kill: case 402 half there and not noted, a file half written.
    rows = (out / "conversion.csv").read_text().splitlines(keepends=True)
    (out / "conversion.csv").write_text("".join(rows[:2]))
    (out / "keras_png_slices_validate" / "case_402_slice_9.nii.png").unlink()
    (out / "keras_png_slices_test" / ".case_441_slice_3.nii.png.77.part").write_bytes(b"half")
    kept = (out / "keras_png_slices_train" / "case_001_slice_0.nii.png").stat().st_mtime_ns
    report = convert(disc, out)
    assert (report.converted, report.kept) == (2, 1)
    assert digests(out) == digests(converted[0])
    assert (out / "keras_png_slices_train" / "case_001_slice_0.nii.png").stat().st_mtime_ns == kept


def test_killed_at_any_moment_it_goes_on(disc, converted, tmp_path):
    command = [sys.executable, "-m", "oasis_helpers", "convert", str(disc), str(tmp_path / "out")]
    moments = np.random.default_rng(0).uniform(0.8, 2.5, 3)  # seconds; about one passes before it begins
    for seconds in moments:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.kill()
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    assert digests(tmp_path / "out") == digests(converted[0])


def test_a_folder_of_the_users_is_left_alone(disc, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty"):
        convert(disc, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    convert(disc, tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_force_replaces_an_earlier_conversion_and_nothing_else(head, disc, tmp_path):
    out = tmp_path / "out"
    convert(disc, out)
    (out / "notes.txt").write_text("mine")
    other = write_tree(tmp_path / "t", subject_files(2, *head))
    with pytest.raises(FileExistsError, match="stripped False ≠ True"):
        convert(other, out, stripped=True)
    convert(other, out, stripped=True, force=True)
    assert {p.name[:8] for p in out.rglob("case_*")} == {"case_002"}
    assert (out / "notes.txt").read_text() == "mine"


def test_a_full_disk_is_noticed_before(disc, tmp_path, monkeypatch):
    from collections import namedtuple

    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("u", "free")(10))
    with pytest.raises(OSError, match="MB free"):
        convert(disc, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cut_disc_gives_what_came_whole(disc, tmp_path):
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(disc.read_bytes()[: disc.stat().st_size * 3 // 5])
    report = convert(cut, tmp_path / "out")
    assert not report.ok
    assert report.converted >= 1
    assert "download it again" in str(report)
    assert convert(disc, tmp_path / "out").ok  # the whole archive completes it
    assert check_dataset(tmp_path / "out").ok


def test_the_volume_of_another_grid_is_refused_and_the_others_come(head, tmp_path):
    files = subject_files(1, *head) | subject_files(2, np.ones((8, 8, 8), np.int16), None)
    report = convert(write_tree(tmp_path / "t", files), tmp_path / "out")
    assert report.converted == 1
    assert report.left_out == ["case 002: the volume is 8×8×8, should be 176×208×176"]


# ---- who they are -----------------------------------------------------------------------------------------

TABLE = """ID,M/F,Hand,Age,Educ,SES,MMSE,CDR,eTIV,nWBV,ASF,Delay
OAS1_0001_MR1,F,R,74,2,3,29,0,1344,0.743,1.306,N/A
OAS1_0001_MR2,F,R,75,2,3,29,0,1344,0.743,1.306,20
OAS1_0402_MR1,M,R,21,,,,,1500,0.85,1.1,N/A
"""


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_subjects_join_by_case(disc, delimiter, tmp_path):
    table = tmp_path / "oasis_cross-sectional.csv"
    table.write_text("\ufeff" + TABLE.replace(",", delimiter), encoding="utf-8")
    report = convert(disc, tmp_path / "out", subjects=table)
    assert "1 cases are not in" in str(report)
    assert load_subjects(tmp_path / "out") == {1: Subject(74, "F", 0.0), 402: Subject(21, "M", None)}
    assert load_subjects(tmp_path) is None


def test_analyze_of_the_tests_is_what_nibabel_reads(tmp_path):
    import nibabel

    volume = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    (tmp_path / "a.hdr").write_bytes(analyze(volume)[0])
    (tmp_path / "a.img").write_bytes(analyze(volume)[1])
    image = nibabel.AnalyzeImage.from_filename(tmp_path / "a.img")
    assert image.shape == (2, 3, 4, 1)
    assert image.get_data_dtype() == np.dtype(">i2")
    assert (np.asarray(image.dataobj)[..., 0] == volume).all()


def test_read_subjects_wants_a_table(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not there"):
        read_subjects(tmp_path / "no.csv")
