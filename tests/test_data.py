import os
import shutil
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from torch.utils.data import DataLoader

from oasis_helpers import data
from oasis_helpers.data import (
    OASISDataset,
    check_dataset,
    find_data,
    load_factors,
    load_masks,
    load_slices,
    read_slices,
    slice_transform,
    to_unit_range,
)
from oasis_helpers.intake.subjects import Subject
from oasis_helpers.layout import (
    SPLITS,
    WrongSize,
    image_name,
    read_png,
    replace_file,
    slices_in,
    write_file,
)

SEG_TRAIN = "keras_png_slices_seg_train"


@pytest.fixture
def copy(phantoms, tmp_path):
    """A copy that a test may spoil, passing for the course set."""
    root = tmp_path / "set"
    shutil.copytree(phantoms.root, root)
    (root / "phantoms.json").unlink()
    return root


def test_the_seed_projects_usage_runs_as_written(phantoms):
    root_path, transform = phantoms.root, slice_transform(64)
    for split in ("train", "test", "validate"):
        dataset = OASISDataset(root=f"{root_path}/keras_png_slices_{split}", transform=transform)
        batch = next(iter(DataLoader(dataset, batch_size=32, shuffle=True)))
        assert batch.shape == (len(dataset), 1, 64, 64)
        assert batch.min() == -1
        assert 0.5 < batch.max() <= 1


def test_order_is_numeric(tmp_path):
    folder = tmp_path / "keras_png_slices_train"
    folder.mkdir()
    for case, index in [(10, 2), (2, 10), (2, 9), (100, 0), (2, 1)]:
        Image.new("L", (256, 256), 7).save(folder / image_name(case, index))
    (folder / "notes.txt").write_text("not a slice")
    dataset = OASISDataset(folder)
    assert list(zip(dataset.case_ids, dataset.slice_ids)) == [(2, 1), (2, 9), (2, 10), (10, 2), (100, 0)]
    assert isinstance(dataset[0], Image.Image)


def test_images_come_with_their_masks(phantoms):
    dataset = OASISDataset(phantoms.train, slice_transform(32), phantoms.root / SEG_TRAIN)
    image, mask = dataset[5]
    assert image.shape == (1, 32, 32)
    assert mask.shape == (256, 256)
    assert mask.dtype == torch.long
    assert mask.unique().tolist() == [0, 1, 2, 3]


def test_the_memory_path_equals_the_png_path(phantoms):
    dataset = OASISDataset(phantoms.train, slice_transform(64))
    slices = load_slices(phantoms.train, 64)
    assert slices.dtype == torch.uint8
    expected = torch.stack(list(dataset))
    assert float((to_unit_range(slices) - expected).abs().max()) <= 1 / 255 + 1e-6
    assert torch.equal(load_slices(phantoms.train, 64, cases=1), slices[:4])


def test_slices_come_with_their_case_plane_and_mask(phantoms):
    dataset = OASISDataset(phantoms.train)
    found = read_slices(phantoms.train, 64, masks=True)
    assert torch.equal(found.images, load_slices(phantoms.train, 64))
    assert torch.equal(found.masks, load_masks(phantoms.root / SEG_TRAIN, 64))
    assert (found.case.tolist(), found.plane.tolist()) == (dataset.case_ids, dataset.slice_ids)
    assert found.case.dtype == found.plane.dtype == torch.long
    second = read_slices(phantoms.train, 64, cases=1)
    assert second.case.tolist() == [1, 1, 1, 1]
    assert second.masks is None


def test_masks_are_those_of_the_images(copy):
    """The first case has no masks, as after a conversion without its segmentation."""
    for path in (copy / SEG_TRAIN).glob("seg_001_*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"case_001_slice_0.*has no mask: .*seg_001_slice_0.*3 more"):
        load_masks(copy / SEG_TRAIN, 32, cases=1)
    for path in (copy / "keras_png_slices_train").glob("case_001_*"):
        path.unlink()
    assert len(load_masks(copy / SEG_TRAIN, 32)) == 4


def test_masks_are_counted_by_the_images(copy):
    """Masks of slices that have no image are not in the way."""
    whole = load_masks(copy / SEG_TRAIN, 32)
    for path in (copy / "keras_png_slices_train").glob("case_*_slice_[013].nii.png"):
        path.unlink()
    assert torch.equal(load_masks(copy / SEG_TRAIN, 32, cases=1), whole[[2, 6]])
    assert read_slices(copy / "keras_png_slices_train", 32, cases=1).case.tolist() == [1, 2]


def test_mistakes_in_what_is_asked_for(phantoms):
    with pytest.raises(ValueError, match=r"keras_png_slices_train is no folder of masks"):
        load_masks(phantoms.train, 32)
    with pytest.raises(ValueError, match="cases is 0: give 1 or more"):
        load_slices(phantoms.train, 32, cases=0)


def test_factors_of_phantoms_and_of_people(phantoms, copy):
    found = load_factors(phantoms)
    assert list(found) == [1, 2, 402, 441]
    assert found[402].split == "validate"
    assert 0 < found[1].atrophy < 1
    masks = load_masks(phantoms.root / SEG_TRAIN, 208, cases=1)  # unscaled
    assert found[1].white_mm3 == int((masks == 3).sum())
    assert load_factors(find_data(copy)) is None
    (copy / "subjects.csv").write_text("ID,M/F,Age,CDR\nOAS1_0002_MR1,F,74,0.5\n")
    assert load_factors(find_data(copy)) == {2: Subject(74, "F", 0.5)}


def test_a_damaged_table_fails_the_check(copy, phantoms):
    assert check_dataset(phantoms.root).tables == []
    table = copy / "subjects.csv"
    table.write_text("ID,M/F,Age,CDR\nOAS1_0002_MR1,F,74,0.5\n")
    assert check_dataset(copy).tables == []
    table.write_text("ID,M/F,Age,CDR\nOAS1_0002_MR1,F,old,0.5\n")
    report = check_dataset(copy)
    assert not report.ok
    assert "damaged table: 1" in str(report)
    assert "subjects.csv, line 2" in str(report)
    (copy / "phantoms.json").write_text("{}")
    (copy / "phantoms.csv").write_text("case\nx\n")
    assert "phantoms.csv, line 2" in check_dataset(copy).tables[0]


@pytest.mark.parametrize("size", [17, 64, 128, 256])
def test_slices_and_masks_are_cut_and_scaled_as_by_torchvision(phantoms, size):
    from torchvision.transforms import v2

    path = next(iter(slices_in(phantoms.train, "case").values()))
    with Image.open(path) as picture:
        cut = v2.Compose([v2.CenterCrop(208), v2.Resize(size, antialias=True), v2.PILToTensor()])
        assert torch.equal(slice_transform(size)(picture), to_unit_range(cut(picture)))
    masks = phantoms.root / SEG_TRAIN
    whole, scaled = load_masks(masks, 208, cases=1), load_masks(masks, size, cases=1)
    scores = torch.nn.functional.one_hot(whole.long(), 4).permute(0, 3, 1, 2).float()
    assert torch.equal(scaled.long(), v2.functional.resize(scores, size, antialias=True).argmax(1))


def test_a_table_of_phantoms_changed_by_hand(copy):
    table = copy / "phantoms.csv"
    table.write_text(table.read_text().replace("441,test", "441,test,0.5"))
    (copy / "phantoms.json").write_text("{}")
    with pytest.raises(ValueError, match=r"phantoms.csv, line 5 is no row of phantoms"):
        load_factors(find_data(copy))


@pytest.mark.parametrize(
    "inside", ["", "keras_png_slices_data", "keras_png_slices_data/keras_png_slices_data"]
)
def test_find_data_looks_into_the_extra_top_folder(phantoms, tmp_path, inside, monkeypatch):
    target = tmp_path / "zip" / inside
    target.mkdir(parents=True)
    for folder in phantoms.root.iterdir():
        (target / folder.name).symlink_to(folder)
    location = find_data(tmp_path / "zip")
    assert location.train == target / "keras_png_slices_train"
    assert find_data(location.train).root == target
    monkeypatch.setenv("OASIS_ROOT", str(tmp_path / "zip"))
    assert find_data() == location
    assert str(location) == "phantoms, 4 cases"


def test_real_data_is_called_oasis(copy):
    assert find_data(copy).kind == "oasis"
    assert str(find_data(copy)) == "OASIS, 4 cases"


def test_find_data_makes_phantoms_when_nothing_is_named(monkeypatch, phantoms):
    from oasis_helpers.intake import phantoms as module

    asked = []
    monkeypatch.delenv("OASIS_ROOT", raising=False)
    monkeypatch.setattr(module, "make_phantoms", lambda out: asked.append(out) or phantoms)
    assert find_data() == phantoms
    assert asked == [module.phantom_cache()]


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere", "does not exist"), ("empty", "keras_png_slices_train")]
)
def test_named_data_is_never_replaced_by_phantoms(tmp_path, monkeypatch, name, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("OASIS_ROOT", str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match=message):
        find_data()
    (tmp_path / "set.zip").write_bytes(b"PK")
    with pytest.raises(NotADirectoryError, match="Unpack"):
        find_data(tmp_path / "set.zip")


# ---- each way in which a folder can be wrong, with what the learner reads -------------------


def _first(root):
    return root / "keras_png_slices_train" / "case_001_slice_0.nii.png"


def _truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def _save(mode, size=(256, 256)):
    return lambda path: Image.new(mode, size).save(path, format="PNG")


def _claim_81_megapixels(path):
    raw = bytearray(path.read_bytes())
    raw[16:24] = struct.pack(">II", 9000, 9000)
    raw[29:33] = struct.pack(">I", zlib.crc32(bytes(raw[12:29])))
    path.write_bytes(raw)


SPOILED = {
    "truncated": (_truncate, OSError, "cannot be read", "corrupt"),
    "empty file": (lambda p: p.write_bytes(b""), OSError, "cannot be read", "corrupt"),
    "text": (lambda p: p.write_text("no PNG"), OSError, "cannot be read", "corrupt"),
    "BMP": (lambda p: Image.new("L", (256, 256)).save(p, format="BMP"), OSError, "no PNG", "corrupt"),
    "giant": (_claim_81_megapixels, ValueError, "9000×9000", "wrong_size"),
    "RGB": (_save("RGB"), ValueError, "mode RGB", "wrong_mode"),
    "RGBA": (_save("RGBA"), ValueError, "mode RGBA", "wrong_mode"),
    "palette": (_save("P"), ValueError, "mode P", "wrong_mode"),
    "16 bit": (_save("I;16"), ValueError, "mode I", "wrong_mode"),
    "size": (_save("L", (128, 256)), ValueError, "128×256", "wrong_size"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_png_is_named(copy, kind):
    spoil, error, message, where = SPOILED[kind]
    spoil(_first(copy))
    with pytest.raises(error, match=message) as caught:
        OASISDataset(copy / "keras_png_slices_train")[0]
    assert "case_001_slice_0.nii.png" in str(caught.value)
    assert "\n" not in str(caught.value)
    report = check_dataset(copy)
    assert not report.ok
    assert len(getattr(report, where)) == 1
    assert "case_001_slice_0.nii.png" in getattr(report, where)[0]
    assert str(copy) not in str(report)


def test_no_other_program_is_started_for_a_file_named_png(copy, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was asked"))
    Image.new("L", (256, 256)).save(_first(copy), format="EPS")
    with pytest.raises(OSError, match="no PNG"):
        OASISDataset(copy / "keras_png_slices_train")[0]
    assert len(check_dataset(copy).corrupt) == 1


# ---- files are whole or not there -----------------------------------------------------------


def test_a_file_that_fails_half_way_changes_nothing(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b"old")

    def half(temporary):
        temporary.write_bytes(b"ne")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        replace_file(path, half)
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
    assert path.read_bytes() == b"old"


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append("on disk") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *names: done.append("named") or replace(*names))
    write_file(tmp_path / "a", b"content")
    assert done == ["on disk", "named"]
    assert (tmp_path / "a").read_bytes() == b"content"


def test_a_temporary_file_cannot_be_foreseen(tmp_path, monkeypatch):
    seen = []
    for _ in range(2):
        replace_file(tmp_path / "a", lambda temporary: seen.append(temporary.name))
    assert seen[0] != seen[1]
    assert all(name.startswith(".a.") and name.endswith(".part") for name in seen)
    # And if somebody did foresee it: a link there is not followed.
    monkeypatch.setattr("secrets.token_hex", lambda size: "known")
    (tmp_path / "mine").write_text("years of work")
    (tmp_path / ".a.known.part").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "a", b"content")
    assert (tmp_path / "mine").read_text() == "years of work"


def test_a_folder_that_is_missing_or_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist.*phantoms"):
        OASISDataset(tmp_path / "no")
    (tmp_path / "keras_png_slices_train").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no slices"):
        OASISDataset(tmp_path / "keras_png_slices_train")
    (tmp_path / "x.zip").write_text("")
    with pytest.raises(NotADirectoryError, match="Unpack"):
        OASISDataset(tmp_path / "x.zip")
    report = check_dataset(tmp_path)
    assert len(report.missing) == 6  # the other folders, and all cases
    assert not report.ok


def test_partners_that_are_missing(copy):
    (copy / SEG_TRAIN / "seg_002_slice_1.nii.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"case_002_slice_1.*has no mask: .*seg_002_slice_1"):
        OASISDataset(copy / "keras_png_slices_train", label_path=copy / SEG_TRAIN)
    assert "seg_002_slice_1" in check_dataset(copy).missing[0]
    (copy / "keras_png_slices_train" / "case_002_slice_1.nii.png").unlink()
    (copy / "keras_png_slices_train" / "case_001_slice_3.nii.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"seg_001_slice_3.*has no image: .*case_001_slice_3"):
        OASISDataset(copy / "keras_png_slices_train", label_path=copy / SEG_TRAIN)
    found = " ".join(check_dataset(copy).missing)
    assert "case_001_slice_3.nii.png" in found
    assert "case_002_slice_1.nii.png: a gap" in found


def test_a_mask_with_odd_values(copy):
    Image.new("L", (256, 256), 100).save(copy / SEG_TRAIN / "seg_001_slice_0.nii.png")
    with pytest.raises(ValueError, match="value 100; masks have 0, 85, 170, 255"):
        OASISDataset(copy / "keras_png_slices_train", label_path=copy / SEG_TRAIN)[0]


def test_a_case_in_two_splits(copy):
    for k in range(4):
        for kind, seg in (("case", ""), ("seg", "seg_")):
            name = f"{kind}_001_slice_{k}.nii.png"
            shutil.copy(
                copy / f"keras_png_slices_{seg}train" / name, copy / f"keras_png_slices_{seg}test" / name
            )
    report = check_dataset(copy)
    assert report.leaks == ["case 001 is in train and test: keep it in one split"]
    assert "split leakage" in str(report)


def test_a_set_with_one_slice_a_case(copy):
    location = find_data(copy, whole_cases=True)
    for path in copy.rglob("*.png"):
        if "_slice_0" not in path.name:
            path.unlink()
    with pytest.raises(ValueError, match="one slice a case"):
        find_data(copy, whole_cases=True)
    assert len(load_slices(location.train, 16, cases=1)) == 2  # as many slices as a whole case, if there are


def test_cases_that_are_not_whole_are_not_called_unmodified(copy, phantoms):
    report = check_dataset(copy)  # four slices a case, under OASIS names
    assert not report.ok
    assert "no case is whole" in str(report)
    assert any("case_001_slice_4.nii.png: a gap" in line for line in report.missing)
    assert check_dataset(phantoms.root).checksums == "not OASIS"


def test_the_shipped_checksums_cover_the_course_set():
    import csv
    from pathlib import Path

    with (Path(data.__file__).parent / "oasis_png_cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    counts = {s: sum(r["split"] == s for r in rows) for s in SPLITS}
    assert counts == {"train": 302, "validate": 35, "test": 17}


def test_unknown_split(phantoms):
    with pytest.raises(ValueError, match="train, validate, test"):
        phantoms.folder("val")


def test_transform_cuts_only_padding(phantoms):
    image = OASISDataset(phantoms.train)[0]
    kept = slice_transform(208)(image)  # cut and not scaled
    assert round(float((kept + 1).sum() * 127.5)) == np.asarray(image).sum()


def test_a_picture_of_a_hundred_megapixels_is_one_clear_line(tmp_path):
    # Pillow has a warning of its own for these, and reads no pixel before we refuse it.
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    png += struct.pack(">I", 1) + b"IDAT" + b"x" + struct.pack(">I", zlib.crc32(b"IDATx"))
    (tmp_path / "large.png").write_bytes(png)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(WrongSize, match="10000×10000, should be 256×256"):
            read_png(tmp_path / "large.png")


@pytest.mark.parametrize("prefix", ["case", "seg"])
def test_two_files_for_one_slice_are_reported_as_a_pair(prefix, phantoms, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(phantoms.root, root)
    folder = root / f"keras_png_slices_{'seg_' if prefix == 'seg' else ''}train"
    own = folder / f"{prefix}_001_slice_0.nii.png"
    shutil.copy(folder / f"{prefix}_002_slice_0.nii.png", folder / f"{prefix}_1_slice_0.png")
    report = check_dataset(root)
    assert not report.ok
    assert report.problems["one slice twice"] == [
        f"{folder.name}/{prefix}_1_slice_0.png beside {own.name}: keep one of the two"
    ]
    assert slices_in(folder, prefix)[1, 0] == own


@pytest.mark.parametrize("mixed", [["slices", "slices_seg"], ["images", "labels"], ["disc1.tar.gz"]])
def test_data_in_another_form_names_convert(mixed, tmp_path):
    files = {}
    for number, name in enumerate(mixed[:2]):
        files[f"{name}/{('case', 'seg')[number]}_001_slice_0.png"] = b""
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=rf"python -m oasis_helpers convert {tmp_path} OUT"):
        find_data(tmp_path)
    if len(mixed) == 1:
        (tmp_path / "a.tar.gz").write_bytes(b"")
        with pytest.raises(NotADirectoryError, match=r"Unpack it .* oasis_helpers convert"):
            find_data(tmp_path / "a.tar.gz")


def test_phantoms_and_people_in_one_folder_are_refused(phantoms, tmp_path):
    shutil.copytree(phantoms.root, tmp_path / "set")
    (tmp_path / "set" / "conversion.json").write_text("{}")
    with pytest.raises(ValueError, match="keep them in two folders"):
        find_data(tmp_path / "set")
