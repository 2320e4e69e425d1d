"""Kaggle's JPEGs of OASIS become a set: geometry, subjects, classes, what is damaged, and what is refused."""

import io
import json
import re

import numpy as np
import pytest
from oasis_like import write_tar, write_tree, write_zip
from PIL import Image, ImageDraw

from oasis_helpers.__main__ import main
from oasis_helpers.data import OASISDataset, check_dataset, load_factors
from oasis_helpers.intake.convert import convert, split_of
from oasis_helpers.intake.kaggle import CLASSES, FIRST, write_like_kaggle
from oasis_helpers.intake.subjects import Subject
from oasis_helpers.layout import DataLocation, image_name, png_bytes

NON, VERY_MILD, MILD, MODERATE = CLASSES
LENGTH, BREADTH = 190, 144  # mm of the drawn head


def jpeg(image, **how):
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95, **how)
    return buffer.getvalue()


def drawn(grey=200, middle=(120, 84), size=(496, 248), mode="RGB"):
    """An ellipse of 190×144 mm around ``middle`` (mm along, across), a bright spot 40 mm to its right."""
    image = Image.new("L", size, 3)
    draw = ImageDraw.Draw(image)

    def ellipse(x, y, length, breadth, value):
        draw.ellipse(
            [((x - length / 2) * 496 / 256, (y - breadth / 2) * 248 / 160),
             ((x + length / 2) * 496 / 256, (y + breadth / 2) * 248 / 160)], fill=value
        )  # fmt: skip

    ellipse(*middle, LENGTH, BREADTH, grey)
    ellipse(middle[0] + 40, middle[1], 10, 10, 255)
    return jpeg(image.convert(mode))


def scan(case, repeat=1, *, of=NON, session=1, numbers=range(FIRST, FIRST + 32), content=None, copy=""):
    """The files of one scan; the brightness of a slice tells the session and the repeat."""
    content = content or drawn(grey=100 + 20 * repeat + 8 * session)
    name = f"Data/{of}/OAS1_{case:04d}_MR{session}_mpr-{repeat}_{{}}{copy}.jpg"
    return {name.format(number): content for number in numbers}


def grey_of(root, case, k=16):
    """The commonest value of a drawn head, in 255ths of the spot."""
    pixels = np.asarray(Image.open(root / f"keras_png_slices_{split_of(case)}" / image_name(case, k)))
    return int(np.bincount(pixels[pixels > 60]).argmax())


def said(lines, words):
    (line,) = [line for line in lines if words in line]
    return line


# ---- a whole set ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files():
    """Two sessions and two repeats, a subject of each split, two classes, and what systems leave behind."""
    return {
        **scan(1, 1), **scan(1, 2), **scan(1, 1, session=2),
        **scan(1, 1, numbers=(100, 160)),  # slices that nothing needs
        **scan(2, 2, of=VERY_MILD, session=2),
        **scan(402, of=MODERATE), **scan(441),
        "Data/.DS_Store": b"x", f"__MACOSX/Data/{NON}/._OAS1_0001_MR1_mpr-1_114.jpg": b"\0\5\26\7",
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(files, tmp_path_factory):
    root = tmp_path_factory.mktemp("kaggle")
    write_tree(root / "in", files)
    return root, convert(root / "in", root / "out")


def test_subjects_go_whole_into_the_courses_splits(made):
    root, report = made
    assert report.ok, report
    assert report.converted == 4
    for split, cases in (("train", {1, 2}), ("validate", {402}), ("test", {441})):
        dataset = OASISDataset(root / "out" / f"keras_png_slices_{split}")
        assert set(dataset.case_ids) == cases
        assert len(dataset) == 32 * len(cases)
    assert not list((root / "out").glob("keras_png_slices_seg_*/*"))
    assert "1 subjects have several scans" in said(report.notes, "several scans")


def test_the_first_session_and_repeat_is_taken(made):
    root, _ = made
    assert grey_of(root / "out", 1) == pytest.approx(128, abs=2)
    assert grey_of(root / "out", 2) == pytest.approx(156, abs=2)


def test_a_class_is_a_rating_in_the_table_of_traits(made):
    _, report = made
    assert load_factors(report.location) == {
        1: Subject(None, None, 0.0),
        2: Subject(None, None, 0.5),
        402: Subject(None, None, 2.0),
        441: Subject(None, None, 0.0),
    }
    assert "there is no folder Mild Dementia: nobody here has CDR 1" in report.notes


def test_a_network_is_told_the_rating_and_not_what_nobody_knows(made):
    from oasis_helpers.conditions import load_conditioned

    data = load_conditioned(made[1].location, 32)
    assert data.y["cdr"].tolist() == [0] * 32 + [1] * 32
    assert data.y["age"].isnan().all()
    assert set(data.y["sex"].tolist()) == {-1}


def test_a_zip_gives_the_same(made, files, tmp_path):
    convert(write_zip(tmp_path / "archive.zip", files), tmp_path / "out")
    wanted = {p.name: p.read_bytes() for p in made[0].glob("out/keras*/*.png")}
    assert {p.name: p.read_bytes() for p in tmp_path.glob("out/keras*/*.png")} == wanted


def test_a_folder_that_holds_the_zip_will_do(tmp_path):
    (tmp_path / "downloads").mkdir()
    write_zip(tmp_path / "downloads" / "archive.zip", scan(441))
    assert convert(tmp_path / "downloads", tmp_path / "out").converted == 1


def test_what_needs_masks_says_so(made):
    root, report = made
    assert "4 cases have no masks (the first is 1): what needs tissues will say so" in said(
        report.notes, "no masks"
    )
    folder = root / "out" / "keras_png_slices_train"
    with pytest.raises(FileNotFoundError, match=r"has no mask: .*Copy it, or do without the masks"):
        OASISDataset(folder, label_path=report.location.folder("train", masks=True))


def test_check_says_what_it_was_made_from(made, capsys):
    root, _ = made
    assert main(["check", str(root / "out")]) == 0
    assert capsys.readouterr().out.startswith("OASIS, Kaggle's JPEGs: ok\n")


@pytest.mark.parametrize(
    ("format", "form"),
    [
        ("course", "OASIS, the course's archive"),
        ("oasis1", "OASIS, discs of OASIS-1"),
        ("neurite", "OASIS, neurite-oasis 2D"),
        ("nilearn-oasis", "OASIS, grey matter by nilearn"),
        ("volumes", "T1 volumes"),
        (None, "OASIS, the course's archive"),
        ("later", "OASIS, later"),  # a set of a newer version
    ],
)
def test_check_names_every_form(format, form, made, tmp_path):
    for folder in made[0].glob("out/keras*"):
        (tmp_path / folder.name).symlink_to(folder)
    if format:
        (tmp_path / "conversion.json").write_text(json.dumps({"format": format}))
    assert str(check_dataset(tmp_path)).startswith(f"{form}: ")
    (tmp_path / "conversion.json").unlink(missing_ok=True)
    (tmp_path / "phantoms.json").touch()
    assert str(check_dataset(tmp_path)).startswith("phantoms: ")


# ---- geometry -------------------------------------------------------------------------------------


def test_a_head_keeps_its_proportions_and_comes_to_the_middle(made):
    pixels = np.asarray(Image.open(made[0] / "out" / "keras_png_slices_train" / image_name(1, 0)))
    assert pixels.shape == (256, 256)
    assert pixels.max() == 255
    rows, columns = np.nonzero(pixels > 60)
    assert np.ptp(rows) + 1 == pytest.approx(BREADTH, abs=1)
    assert np.ptp(columns) + 1 == pytest.approx(LENGTH, abs=1)
    assert rows.min() + rows.max() == pytest.approx(255, abs=1)
    assert columns.min() + columns.max() == pytest.approx(255, abs=1)
    spot = np.argwhere(pixels > 230).mean(axis=0)
    assert spot == pytest.approx((127.5, 167.5), abs=1)  # 40 mm to the right of the middle


def test_slice_k_is_jpeg_114_and_k(tmp_path):
    files = scan(1)
    files |= scan(1, numbers=[120], content=drawn(grey=90))
    report = convert(write_tree(tmp_path / "in", files), tmp_path / "out")
    assert report.ok
    dark = [k for k in range(32) if grey_of(tmp_path / "out", 1, k) == pytest.approx(90, abs=2)]
    assert dark == [6]


def test_what_is_larger_is_cut_and_check_is_content(tmp_path):
    wide = jpeg(Image.new("RGB", (496, 248), (180, 180, 180)))
    report = convert(write_tree(tmp_path / "in", scan(1, content=wide)), tmp_path / "out")
    assert check_dataset(report.location.root).ok


@pytest.fixture
def heads(tmp_path):
    """Two cases in the course set's layout, each slice an ellipse of 150×186 mm full of stripes and spots."""
    rows, columns = np.indices((256, 256)) - 127.5
    inside = (rows / 75) ** 2 + (columns / 93) ** 2 < 1
    location = DataLocation(tmp_path / "layout", "phantoms")
    location.train.mkdir(parents=True)
    for case in (1, 2):
        few = np.random.default_rng(case).integers(60, 250, (22, 22), np.uint8)
        spots = np.asarray(Image.fromarray(few).resize((256, 256), Image.Resampling.BICUBIC))
        for k in range(32):
            shown = np.where(inside, spots, 0)
            shown[:, 60 + 4 * k : 64 + 4 * k] = 0
            (location.train / image_name(case, k)).write_bytes(png_bytes(shown.astype(np.uint8)))
    return location


def test_a_set_written_in_kaggles_form_comes_back_as_it_was(heads, tmp_path):
    write_like_kaggle(tmp_path / "in", heads, {1: NON, 2: MODERATE}, scans=1)
    assert len(list(tmp_path.glob("in/*/*.jpg"))) == 2 * 32
    out = convert(tmp_path / "in", tmp_path / "out").location
    assert {case: of.cdr for case, of in load_factors(out).items()} == {1: 0.0, 2: 2.0}
    shifts = [(i, j) for i in range(-4, 5) for j in range(-4, 5)]
    for case, k in ((1, 9), (2, 20)):
        found, true = (np.asarray(Image.open(at.train / image_name(case, k)), float) for at in (out, heads))
        alike = [np.corrcoef(np.roll(found, by, (0, 1)).ravel(), true.ravel())[0, 1] for by in shifts]
        assert max(alike) > 0.985
        stretched = Image.fromarray(true.astype(np.uint8)).resize((264, 256)).crop((4, 0, 260, 256))
        of_stretched = [
            np.corrcoef(np.roll(stretched, by, (0, 1)).ravel(), true.ravel())[0, 1] for by in shifts
        ]
        assert max(of_stretched) < max(alike)  # 3 % longer would be seen


# ---- what is damaged or odd -----------------------------------------------------------------------


CUT = drawn()[:3000]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (scan(1, numbers=[120], content=CUT), "OAS1_0001_MR1_mpr-1: OAS1_0001_MR1_mpr-1_120.jpg is damaged"),
        (scan(1, numbers=[120], content=b"no JPEG"), "mpr-1_120.jpg is damaged"),
        (scan(1, numbers=[114], content=drawn(size=(128, 128))), "is 128×128, should be 496×248"),
        (scan(1, numbers=[114], content=drawn(mode="CMYK")), "has mode CMYK, should be RGB or L"),
        (scan(1, numbers=[114], content=drawn() + bytes(2**20)), "has 1 MB, such files have at most 1"),
        (
            scan(1, numbers=[114], content=jpeg(Image.new("RGB", (496, 248), (200, 40, 0)))),
            "is in colour, should be grey",
        ),
    ],
)
def test_of_a_damaged_scan_the_next_repeat_is_taken(damage, message, tmp_path, capsys):
    files = {**scan(1), **damage, **scan(1, 2)}
    source = write_tree(tmp_path / "in", files)
    assert main(["convert", str(source), str(tmp_path / "out")]) == 1
    out = capsys.readouterr().out
    assert message in said(out.splitlines(), "left out: ")
    assert "1 cases converted" in out
    assert grey_of(tmp_path / "out", 1) == pytest.approx(148, abs=2)


def test_missing_slices_are_counted(tmp_path):
    files = {**scan(1, numbers=range(100, 140)), **scan(2, numbers=[*range(114, 130), *range(131, 161)])}
    report = convert(write_tree(tmp_path / "in", files), tmp_path / "out")
    assert report.converted == 0
    assert report.left_out[:2] == [
        "OAS1_0001_MR1_mpr-1: slice 140 and 5 more of slices 114 to 145 are missing; copy the scan again",
        "OAS1_0002_MR1_mpr-1: slice 130 is missing; copy the scan again",
    ]
    assert report.left_out[2].endswith("no scan could be used")


def test_a_black_scan_is_named(tmp_path):
    black = jpeg(Image.new("RGB", (496, 248)))
    report = convert(write_tree(tmp_path / "in", scan(1, content=black)), tmp_path / "out")
    assert "its pictures are black" in report.left_out[0]


def test_a_subject_in_two_classes_is_left_out_and_named(tmp_path):
    files = {**scan(1), **scan(1, 2, of=MODERATE), **scan(2)}
    report = convert(write_tree(tmp_path / "in", files), tmp_path / "out")
    assert report.left_out == ["case 001 is in Non Demented and Moderate Dementia; keep it in one class"]
    assert list(load_factors(report.location)) == [2]
    assert not list((tmp_path / "out").glob("*/case_001_*"))


def test_files_of_other_names_are_counted_and_named(tmp_path):
    files = {**scan(1), f"Data/{NON}/a.jpg": CUT, f"Data/{NON}/b.png": CUT, "Data/read me.txt": b"hello"}
    report = convert(write_tree(tmp_path / "in", files), tmp_path / "out")
    assert report.converted == 1
    (line,) = report.left_out
    assert line.startswith("2 pictures whose names tell no subject and slice, the first is ")
    assert line.endswith(f"Data/{NON}/a.jpg")
    assert "1 files are no pictures and passed over" in said(report.notes, "read me.txt")


def test_copies_are_passed_over_and_stand_in_where_the_first_lacks(tmp_path):
    files = {**scan(1), **scan(1, copy=" (1)", numbers=[114, 115], content=CUT)}
    files |= scan(2, numbers=range(115, 146)) | scan(2, numbers=[114], copy="(1)")
    report = convert(write_tree(tmp_path / "in", files), tmp_path / "out")
    assert report.ok, report
    assert report.converted == 2
    assert "2 files are there again and passed over" in said(report.notes, "mpr-1_114 (1).jpg")


def test_without_folders_of_classes_nothing_is_said_of_ratings(tmp_path):
    files = scan(1, of="all")
    report = convert(write_tree(tmp_path / "in", files), tmp_path / "out")
    assert report.ok
    assert "1 cases are in no class's folder (the first is 1): their CDR is not known" in report.notes
    assert load_factors(report.location) is None


def test_the_table_of_oasis_knows_more_and_comes_first(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("ID,M/F,Hand,Age,CDR\nOAS1_0001_MR1,F,R,21,\nOAS1_0002_MR1,M,R,80,0.5\n")
    files = {**scan(1), **scan(2, of=MILD), **scan(402)}
    report = convert(write_tree(tmp_path / "in", files), tmp_path / "out", subjects=table)
    assert load_factors(report.location) == {
        1: Subject(21, "F", None),
        2: Subject(80, "M", 0.5),
        402: Subject(None, None, 0.0),
    }
    assert "case 002 is in Mild Dementia, the table says CDR 0.5: the table is taken" in report.notes
    assert "1 cases are not in the table, the first is 402: the class is known" in report.notes


# ---- going on, and what is there already ------------------------------------------------------------


def test_a_second_call_goes_on_and_keeps_what_another_folder_brought(tmp_path):
    out = tmp_path / "out"
    convert(write_tree(tmp_path / "a", scan(1, of=MODERATE)), out)
    report = convert(write_tree(tmp_path / "b", scan(2)), out)
    assert (report.converted, report.kept) == (1, 1)
    assert {case: of.cdr for case, of in load_factors(report.location).items()} == {1: 2.0, 2: 0.0}
    gone = out / "keras_png_slices_train" / image_name(1, 3)
    before = gone.read_bytes()
    gone.unlink()
    report = convert(tmp_path / "a", out)
    assert (report.converted, report.kept) == (1, 1)
    assert gone.read_bytes() == before


def test_nothing_else_is_overwritten(tmp_path):
    source = write_tree(tmp_path / "in", scan(1))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        convert(source, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


# ---- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "Non_Demented/non_100.jpg",
        "Dataset/Mild_Demented/mild_26.jpg",
        "train/ NonDemented/26 (19).jpg",
        "Very_Mild_Demented/verymild_1.jpg",
        "ModerateDemented/moderateDem0.jpg",
    ],
)
@pytest.mark.parametrize("form", ["folder", "zip"])
def test_a_set_without_subjects_is_refused_and_says_why(name, form, tmp_path, capsys):
    files = {name: drawn(size=(128, 128)), name.replace(".jpg", "0.jpg"): drawn(size=(128, 128))}
    source = write_tree(tmp_path / "in", files) if form == "folder" else write_zip(tmp_path / "in.zip", files)
    assert main(["convert", str(source), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"error: {source} holds 2 pictures like ")
    assert "no name says whose head it is, so no split can keep a person's slices on one side" in error
    assert "Use a form that names subjects: Kaggle's imagesoasis, or nilearn-oasis" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stripped"], "stripped is for OASIS-1 volumes; .* holds kaggle files"),
        (["--least-similarity", "0.5"], "a least similarity is for volumes"),
    ],
)
def test_settings_of_other_forms_are_refused(arguments, message, tmp_path, capsys):
    source = write_tree(tmp_path / "in", scan(1))
    assert main(["convert", str(source), str(tmp_path / "out"), *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_tar_is_not_read(tmp_path):
    archive = write_tar(tmp_path / "archive.tar", scan(1))
    with pytest.raises(ValueError, match="is a tar and was not looked into"):
        convert(archive, tmp_path / "out")


def test_repeat_scans_differ_and_are_repeats(heads, tmp_path):
    write_like_kaggle(tmp_path / "in", heads, {1: MILD, 2: MILD}, planes=range(2))
    paths = sorted(tmp_path.glob(f"in/{MILD}/*.jpg"))
    names = [f"OAS1_{c:04d}_MR1_mpr-{r}_{n}.jpg" for c in (1, 2) for r in (1, 2, 3) for n in (114, 115)]
    assert [p.name for p in paths] == names
    first, second, other = (np.asarray(Image.open(paths[i]).convert("L"), float) for i in (0, 2, 6))
    assert first.shape == (248, 496)
    repeat, person = (np.corrcoef(first.ravel(), x.ravel())[0, 1] for x in (second, other))
    assert person < repeat < 0.9999


def test_a_link_to_nothing_costs_no_other(tmp_path):
    write_tree(tmp_path / "in", {**scan(1), **scan(402), **scan(1, 2)})
    for name in ("dead.jpg", f"OAS1_0402_MR1_mpr-2_{FIRST}.jpg"):
        (tmp_path / "in" / "Data" / NON / name).symlink_to(tmp_path / "gone")
    report = convert(tmp_path / "in", tmp_path / "out")
    assert report.converted == 2
    assert sum("is a link to something that is not there" in line for line in report.left_out) == 2
