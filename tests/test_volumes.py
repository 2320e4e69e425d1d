"""Any T1 volume becomes planes where the phantoms have theirs: orientation, registration, files, refusals."""

import builtins
import csv
import gzip
import re
import tarfile

import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from t1_like import ORIENTATIONS, brain, errors, head, scanned, stored, world_map

from oasis_helpers.__main__ import main
from oasis_helpers.data import OASISDataset, check_dataset
from oasis_helpers.intake import volumes as module
from oasis_helpers.intake.convert import convert, split_of
from oasis_helpers.intake.registration import Fit, register
from oasis_helpers.intake.scans import ScanUnusable, find_scans, read_volume
from oasis_helpers.intake.volumes import course_planes, read_volume_rows

PIXEL = 0.972  # template mm × this: pixels


def save(path, values, affine, kind=nibabel.Nifti1Image):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(kind(values, affine), path)
    return path


def small(seed=0, zoom=4.0):
    """A head in coarse voxels, int16, and its affine."""
    values, affine = scanned(head(), np.eye(4), (zoom,) * 3)
    return values.astype(np.int16) + np.int16(seed), affine


@pytest.fixture
def placed(monkeypatch):
    """Registration that believes the header; the similarity is what the file's brightest voxel says."""

    def believe(values, affine, *, trusted=True):
        return Fit(np.linalg.inv(affine), 0.9 if values.max() > 700 else 0.3, "RAS")

    monkeypatch.setattr(module, "register", believe)


# ---- where the planes are -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mni", "pixel"),
    [((0, -16, 17), (87.5, 103.5, 16)), ((30, 20, 17), (87.5 + 29.16, 103.5 + 34.992, 16)),
     ((-20, -60, 8), (87.5 - 19.44, 103.5 - 42.768, 16 - 8.748))],
)  # fmt: skip
def test_a_point_of_the_atlas_is_at_its_pixel(mni, pixel):
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = -90, -126, -72
    at = np.indices((91, 109, 91)) * 2 + affine[:3, 3].reshape(3, 1, 1, 1)
    blob = np.exp(-((at - np.reshape(mni, (3, 1, 1, 1))) ** 2).sum(axis=0) / (2 * 4**2))
    planes = course_planes(blob, np.linalg.inv(affine), order=3)
    assert planes.shape == (176, 208, 32)
    assert np.allclose(ndimage.center_of_mass(planes[:, :, 1:])[:2], pixel[:2], atol=0.05)
    assert np.argmax(planes.max(axis=(0, 1))) == pytest.approx(pixel[2], abs=0.6)


def test_the_planes_are_the_same_in_all_48_orientations(monkeypatch):
    monkeypatch.setattr(module, "PLANES", 8)  # the lowest ones, to save time
    values, affine = scanned(brain(), np.eye(4), (2, 2.5, 3))
    wanted = course_planes(values, np.linalg.inv(affine), order=1)
    assert wanted.max() > 300
    assert len({tuple(o.ravel()) for o in ORIENTATIONS}) == 48
    for orientation in ORIENTATIONS:
        turned, where = stored(values, affine, orientation)
        assert np.allclose(course_planes(turned, np.linalg.inv(where), order=1), wanted, atol=0.05)


def test_a_plane_does_not_depend_on_the_voxel_size():
    fine, affine = brain()
    other, its = scanned(brain(), np.eye(4), (1.5, 2, 2.5))
    a, b = (course_planes(v, np.linalg.inv(m), order=3) for v, m in ((fine, affine), (other, its)))
    here = np.corrcoef(a.ravel(), b.ravel())[0, 1]
    assert here > 0.98
    for axis in range(3):
        for step in (-1, 1):  # a pixel would be seen
            assert np.corrcoef(a.ravel(), np.roll(b, step, axis).ravel())[0, 1] < here


# ---- registration: three, for each takes seconds -----------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A lab's folder, converted: one subject turned and with masks, one cut short and its second session."""
    root = tmp_path_factory.mktemp("lab")
    rng = np.random.default_rng(4)
    world = world_map(rng, 14, 30, 0.1)
    orientation = nibabel.orientations.axcodes2ornt("PIR")
    scan = stored(*scanned(head(), world, (1.2, 1.6, 1.4), rng), orientation)
    inside = stored(*scanned(brain(), world, (1.2, 1.6, 1.4)), orientation)[0] / 800
    tissue = np.select([inside > 0.8, inside > 0.6, inside > 0.1], [2, 1, 3])  # BIDS: grey 1, white 2, CSF 3
    anat = root / "in" / "sub-01" / "ses-1" / "anat"
    whole = save(anat / "sub-01_ses-1_T1w.nii.gz", scan[0].astype(np.int16), scan[1])
    save(anat / "sub-01_ses-1_dseg.nii.gz", tissue.astype(np.uint8), scan[1])
    cut = root / "in" / "sub-02" / "ses-1" / "anat" / "sub-02_ses-1_T1w.nii.gz"
    cut.parent.mkdir(parents=True)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    code = main(["convert", str(root / "in"), str(root / "out"), "--workers", "1"])
    return root, code, scan, world


def image_of(root, case, k, split="train", kind="case"):
    folder = f"keras_png_slices_{'seg_' if kind == 'seg' else ''}{split}"
    return np.asarray(Image.open(root / folder / f"{kind}_{case:03d}_slice_{k}.nii.png"))


def test_a_turned_scan_lands_within_a_pixel(lab):
    root, code, (values, affine), world = lab
    assert code == 1  # of one subject nothing could be used
    true = course_planes(values, np.linalg.inv(affine) @ world, order=1)
    found = np.stack([image_of(root / "out", 50001, k)[40:-40, 24:-24] for k in range(32)], axis=2)
    assert found.max(axis=(0, 1)).tolist() == [255] * 32

    def likeness(rows, columns, slices):
        part = np.s_[30:-30, 30:-30, 4:-4]
        moved = np.roll(true, (rows, columns, slices), (0, 1, 2))
        return np.corrcoef(moved[part].ravel(), found[part].ravel())[0, 1]

    here = likeness(0, 0, 0)
    assert here > 0.97
    for step in np.vstack([np.eye(3, dtype=int), -np.eye(3, dtype=int)]):
        assert likeness(*step) < here


def test_its_masks_are_those_beside_it(lab):
    root = lab[0]
    images = [image_of(root / "out", 50001, k) for k in range(32)]
    masks = [image_of(root / "out", 50001, k, kind="seg") for k in range(32)]
    assert set(np.unique(masks)) == {0, 85, 170, 255}
    means = [np.mean([i[m == v].mean() for i, m in zip(images, masks)]) for v in (85, 170, 255)]
    assert means == sorted(means)  # CSF, grey, white
    data = OASISDataset(root / "out" / "keras_png_slices_train", root / "out" / "keras_png_slices_seg_train")
    assert len(data) == 32


def test_what_was_made_is_written_down_and_whole(lab):
    root = lab[0]
    row = read_volume_rows(root / "out")["sub-01"]
    assert row.case == 50001
    assert row.file == "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz"
    assert row.axes == "PIR"
    assert 0.9 < row.similarity <= 1
    report = check_dataset(root / "out")
    assert report.ok, report
    assert report.checksums == "unmodified"


def test_a_second_call_registers_only_what_is_missing(lab, monkeypatch):
    root = lab[0]
    asked = []
    monkeypatch.setattr(
        module, "register", lambda *a, **k: asked.append(1) or Fit(np.linalg.inv(a[1]), 0.9, "RAS")
    )
    report = convert(root / "in", root / "out", workers=1)
    assert (report.converted, report.kept, asked) == (0, 1, [])
    assert len(report.left_out) == 1
    assert "sub-02_ses-1_T1w.nii.gz: it ends early or is damaged" in report.left_out[0]


def test_an_analyze_header_is_not_believed():
    rng = np.random.default_rng(2)
    world = world_map(rng, 6, 15, 0.08)
    values, affine = stored(*scanned(head(), world, (2, 2, 2), rng), nibabel.orientations.axcodes2ornt("ASL"))
    fit = register(values, np.diag([-2.0, 2, 2, 1]), trusted=False)
    assert fit.axes == "ASL"
    off = errors(fit.matrix, affine, world) * PIXEL
    assert off.mean() < 0.7
    assert off.max() < 1.3


def test_noise_is_no_head():
    noise = np.random.default_rng(0).normal(500, 100, (60, 60, 60)).astype(np.float32)
    assert register(noise, np.diag([3.0, 3, 3, 1])).similarity < 0.3


# ---- files and subjects ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti1Pair, nibabel.AnalyzeImage])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_type_and_byte_order_is_read(kind, dtype, order, tmp_path):
    values, affine = small(zoom=6.0)
    values = (values / 5).astype(dtype)
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
    name = "a.nii" if kind is nibabel.Nifti1Image else "a.img"
    nibabel.save(kind(values, affine, header), tmp_path / name)
    found = read_volume(tmp_path / name)
    assert found.values.dtype == np.float32
    assert np.array_equal(found.values, values.astype(np.float32))
    assert found.trusted == (kind is not nibabel.AnalyzeImage)
    if found.trusted:
        assert np.allclose(found.affine, affine)


@pytest.mark.parametrize(
    ("header", "image"),
    [("a.hdr", "a.img.gz"), ("a.hdr.gz", "a.img.gz"), ("A.HDR", "A.IMG"), ("a.hdr", "a.IMG"),
     ("mpr-1.nifti.hdr", "mpr-1.nifti.img.gz")],
)  # fmt: skip
@pytest.mark.parametrize("kind", [nibabel.Nifti1Pair, nibabel.AnalyzeImage])
def test_a_pair_is_read_packed_or_not_and_whatever_its_letters(kind, header, image, tmp_path):
    values, affine = small(zoom=6.0)
    nibabel.save(kind(values, affine), tmp_path / "made.img")
    for made, name in (("made.hdr", header), ("made.img", image)):
        content = (tmp_path / made).read_bytes()
        (tmp_path / made).unlink()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert [scan.path.name for scan in find_scans(tmp_path)] == [header]
    for name in (header, image):
        assert [scan.path.name for scan in find_scans(tmp_path / name)] == [header]
        assert np.array_equal(read_volume(tmp_path / name).values, values.astype(np.float32))


def test_the_3d_set_of_neurite_is_named(placed, tmp_path, capsys):
    names = ("aligned_norm", "aligned_orig", "aligned_seg35", "norm", "orig", "seg4")
    for name in names:
        save(tmp_path / "in" / "OASIS_OAS1_0007_MR1" / f"{name}.nii.gz", *small(zoom=8.0))
    report = convert(tmp_path / "in", tmp_path / "out", workers=1)
    assert report.ok, report
    assert read_volume_rows(tmp_path / "out")["OAS1_0007"].file.endswith("aligned_norm.nii.gz")
    assert any("neurite-oasis's 3D set" in note for note in report.notes)
    with tarfile.open(tmp_path / "neurite-oasis.v1.0.tar", "w") as archive:
        archive.add(tmp_path / "in", "neurite-oasis.v1.0")
    assert main(["convert", str(tmp_path / "neurite-oasis.v1.0.tar"), str(tmp_path / "out2")]) == 1
    error = capsys.readouterr().err
    assert "neurite-oasis's 3D set" in error
    assert "unpack it and convert the folder" in error


def test_an_archive_is_no_volume(tmp_path):
    (tmp_path / "lab.zip").write_bytes(b"PK\3\4")
    with pytest.raises(FileNotFoundError, match="Unpack archives"):
        convert(tmp_path / "lab.zip", tmp_path / "out", "volumes")


def test_broken_archives_beside_volumes_are_named(placed, tmp_path):
    save(tmp_path / "in" / "anna.nii.gz", *small())
    (tmp_path / "in" / "more.zip").write_text("<html>log in")
    report = convert(tmp_path / "in", tmp_path / "out", workers=1)
    assert report.converted == 1
    assert "more.zip is a web page" in report.left_out[0]


def test_force_leaves_the_earlier_set_if_no_volume_fits(placed, tmp_path):
    values, affine = small()
    convert(save(tmp_path / "good.nii", values, affine), tmp_path / "out", workers=1)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    poor = save(tmp_path / "poor.nii", np.minimum(values, 600), affine)
    assert not convert(poor, tmp_path / "out", workers=1, force=True).ok
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    good = save(tmp_path / "other.nii", values, affine)
    convert(good, tmp_path / "out", workers=1, force=True)
    assert list(read_volume_rows(tmp_path / "out")) == ["other"]


def test_a_nifti_that_names_no_orientation_is_not_trusted(tmp_path):
    values, affine = small()
    image = nibabel.Nifti1Image(values, affine)
    image.set_sform(affine, 0)
    image.set_qform(affine, 0)
    nibabel.save(image, tmp_path / "a.nii")
    assert not read_volume(tmp_path / "a.nii").trusted


@pytest.mark.parametrize(
    ("names", "subjects"),
    [
        (["OAS2_0001_MR1/RAW/mpr-1.nifti.hdr", "OAS2_0001_MR1/RAW/mpr-1.nifti.img",
          "OAS2_0001_MR2/RAW/mpr-1.nifti.hdr"],
         {"OAS2_0001": 2}),
        (["a/sub-OAS30001_ses-d0129_run-01_T1w.nii.gz", "a/sub-OAS30001_ses-d0129_T2w.nii.gz"],
         {"OAS30001": 1}),
        (["OAS1_0007_MR1/RAW/OAS1_0007_MR1_mpr-1_anon.hdr", "OAS1_0007_MR1/RAW/OAS1_0007_MR1_mpr-2_anon.hdr",
          "OAS1_0007_MR1/PROCESSED/MPRAGE/SUBJ_111/OAS1_0007_MR1_mpr_n4_anon_sbj_111.hdr"],
         {"OAS1_0007": 2}),
        (["sub-2/ses-1/anat/sub-2_ses-1_T1w.nii",
          "sub-10/anat/sub-10_T1w.nii.gz",
          "derivatives/x/sub-3_T1w.nii.gz",
          "sub-2/ses-2/anat/sub-2_ses-2_T1w.nii", "sub-2/func/sub-2_bold.nii.gz"], {"sub-2": 2, "sub-10": 1}),
        (["anna.nii.gz", "bert.nii", "anna_seg.nii.gz", ".hidden.nii", "notes.txt"], {"anna": 1, "bert": 1}),
        (["anna/t1.nii.gz", "anna/again.nii.gz", "bert/t1.nii.gz"], {"anna": 2, "bert": 1}),
    ],
)  # fmt: skip
def test_a_folder_is_read_by_its_names(names, subjects, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [scan.subject for scan in find_scans(tmp_path)]
    assert {s: found.count(s) for s in found} == subjects
    assert found == sorted(found, key=lambda s: [int(t) if t.isdigit() else 0 for t in re.split(r"(\d+)", s)])


def test_one_file_is_enough(placed, tmp_path):
    report = convert(save(tmp_path / "anna.nii.gz", *small()), tmp_path / "out", workers=1)
    assert report.ok, report
    assert report.converted == 1
    assert any("no masks" in note for note in report.notes)
    assert any("no case for validate" in note for note in report.notes)
    assert check_dataset(tmp_path / "out").ok  # it was converted without masks, so none is missing


def test_ids_and_splits_are_by_subject(placed, tmp_path):
    names = [f"sub-{n:02}/ses-{s}/anat/sub-{n:02}_ses-{s}_T1w.nii" for n in range(1, 4) for s in (1, 2)]
    names += ["OAS1_0402_MR1/RAW/OAS1_0402_MR1_T1w.nii", "sub-OAS30001/sub-OAS30001_T1w.nii"]
    names += ["OAS2_0003_MR1/OAS2_0003_MR1_T1w.nii"]
    for name in names:
        save(tmp_path / "in" / name, *small(zoom=8.0))
    report = convert(tmp_path / "in", tmp_path / "out", workers=1)
    assert report.ok, report
    rows = read_volume_rows(tmp_path / "out")
    assert {s: r.case for s, r in rows.items() if "OAS" in s} == {
        "OAS1_0402": 402, "OAS2_0003": 20003, "OAS30001": 30001,
    }  # fmt: skip
    assert sorted(r.case for s, r in rows.items() if "OAS" not in s) == list(range(50001, 50004))
    assert all("_ses-1_" in r.file for s, r in rows.items() if s.startswith("sub-0"))
    with (tmp_path / "out" / "conversion.csv").open(newline="") as file:
        splits = {int(r["case"]): r["split"] for r in csv.DictReader(file)}
    assert splits[402] == split_of(402) == "validate"
    assert set(splits.values()) == {"train", "validate", "test"}
    assert check_dataset(tmp_path / "out").leaks == []

    save(tmp_path / "in" / "sub-00" / "sub-00_T1w.nii", *small(zoom=8.0))  # another comes, and no id moves
    convert(tmp_path / "in", tmp_path / "out", workers=1)
    after = read_volume_rows(tmp_path / "out")
    assert {s: after[s] for s in rows} == rows
    assert after["sub-00"].case == 50004


def test_what_does_not_fit_is_named_and_left_out(placed, tmp_path):
    values, affine = small()
    save(tmp_path / "in" / "good.nii", values, affine)
    save(tmp_path / "in" / "poor.nii", np.minimum(values, 600), affine)
    report = convert(tmp_path / "in", tmp_path / "out", workers=1)
    assert not report.ok
    assert len(report.left_out) == 1
    assert "poor.nii: its similarity with the template is 0.30, below 0.6" in report.left_out[0]
    report = convert(tmp_path / "in", tmp_path / "out", workers=1, least_similarity=0.2)
    assert (report.ok, report.converted, report.kept) == (True, 1, 1)


def test_a_header_that_is_wrong_about_its_axes_is_found_out(monkeypatch, tmp_path):
    def fit(values, affine, *, trusted=True):
        return Fit(np.linalg.inv(affine), 0.3 if trusted else 0.8, "RAS" if trusted else "ASR")

    monkeypatch.setattr(module, "register", fit)
    report = convert(save(tmp_path / "a.nii", *small()), tmp_path / "out", workers=1)
    assert report.ok
    assert any("its header is wrong about its axes: they run to ASR" in note for note in report.notes)


def test_a_fit_that_is_doubtful_is_compared_with_the_other_ways_to_lie(monkeypatch, tmp_path):
    """A brain mirrored front to back reaches 0.7 as its header has it, and more when nothing is believed."""
    found = {True: 0.7, False: 0.95}

    def fit(values, affine, *, trusted=True):
        return Fit(np.linalg.inv(affine), found[trusted], "RAS" if trusted else "LPS")

    monkeypatch.setattr(module, "register", fit)
    report = convert(save(tmp_path / "a.nii", *small()), tmp_path / "out", workers=1)
    assert any("they run to LPS" in note and "which side is left" in note for note in report.notes)
    found[False] = 0.75  # no clear difference
    report = convert(save(tmp_path / "b.nii", *small()), tmp_path / "out2", workers=1)
    assert read_volume_rows(tmp_path / "out2")["b"].axes == "RAS"
    assert not any("header" in note for note in report.notes)


def test_the_next_scan_of_a_subject_stands_in_for_a_broken_one(placed, tmp_path):
    values, affine = small()
    save(tmp_path / "in" / "sub-1" / "sub-1_run-1_T1w.nii", np.full_like(values, 7), affine)
    save(tmp_path / "in" / "sub-1" / "sub-1_run-2_T1w.nii", values, affine)
    report = convert(tmp_path / "in", tmp_path / "out", workers=1)
    assert (report.converted, len(report.left_out)) == (1, 1)
    assert "run-2" in read_volume_rows(tmp_path / "out")["sub-1"].file


def test_a_segmentation_on_another_grid_costs_the_masks_alone(placed, tmp_path):
    save(tmp_path / "in" / "a.nii", *small())
    save(
        tmp_path / "in" / "a_seg.nii",
        (np.indices((30, 30, 30))[0] % 4).astype(np.uint8),
        np.diag([5.0, 5, 5, 1]),
    )
    report = convert(tmp_path / "in", tmp_path / "out", workers=1)
    assert report.converted == 1
    assert report.left_out == [
        f"{tmp_path / 'in' / 'a_seg.nii'}: it is on another grid than the volume; a has images without masks"
    ]


def test_nothing_of_the_users_is_overwritten(placed, tmp_path):
    source = save(tmp_path / "a.nii", *small())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="is not empty"):
        convert(source, tmp_path / "out", workers=1)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_without_simpleitk_one_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    real = builtins.__import__

    def missing(name, *rest, **more):
        if name == "SimpleITK":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    source = save(tmp_path / "a.nii", *small())
    assert main(["convert", str(source), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "pip install SimpleITK" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- malformed ---------------------------------------------------------------------------------------


def _gzip_cut(path, values, affine):
    content = gzip.compress(nibabel.Nifti1Image(values, affine).to_bytes())
    path.write_bytes(content[: len(content) // 2])


def _other_bytes(path, values, affine):
    noisy = values + np.random.default_rng(0).integers(0, 40, values.shape, dtype=np.int16)
    nibabel.save(nibabel.Nifti1Image(noisy.byteswap(), affine), path)


def _with_nan(path, values, affine):
    values = values.astype(np.float32)
    values[5, 5, 5:8] = np.nan
    nibabel.save(nibabel.Nifti1Image(values, affine), path)


def _saved(change, at=lambda a: a):
    def write(path, values, affine):
        nibabel.save(nibabel.Nifti1Image(change(values), at(affine)), path)

    return write


MALFORMED = {
    "NaN": (_with_nan, "3 of its voxels are no numbers"),
    "constant": (_saved(lambda v: np.full_like(v, 7)), "all its voxels are 7"),
    "4D": (_saved(lambda v: np.stack([v] * 3, axis=3)), "it is 4D"),
    "2D": (_saved(lambda v: v[:, :, :1]), "too few planes"),
    "other bytes": (_other_bytes, "its bytes are in another order"),
    "cut": (_gzip_cut, "ends early or is damaged"),
    "colours": (_saved(lambda v: v.astype(np.complex64)), "values of type complex64"),
    "no head": (_saved(lambda v: v, lambda a: a @ np.diag([0.1, 0.1, 0.1, 1])), "which is no head"),
    "empty": (lambda path, *_: path.write_bytes(b""), "it cannot be read"),
    "noise": (lambda path, *_: path.write_bytes(bytes(range(256)) * 9), "it cannot be read"),
    "text": (lambda path, *_: path.write_text("hello"), "it cannot be read"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_volume_is_one_clear_line(kind, tmp_path):
    write, message = MALFORMED[kind]
    path = tmp_path / ("bad.nii.gz" if kind == "cut" else "bad.nii")
    write(path, *small())
    with pytest.raises(ScanUnusable, match=message) as caught:
        read_volume(path)
    assert "\n" not in str(caught.value)


def test_malformed_volumes_cost_no_other(placed, tmp_path):
    values, affine = small(zoom=6.0)
    save(tmp_path / "in" / "good.nii", values, affine)
    for kind, (write, _) in MALFORMED.items():
        write(tmp_path / "in" / f"{kind}.nii{'.gz' if kind == 'cut' else ''}", values, affine)
    report = convert(tmp_path / "in", tmp_path / "out", workers=1)
    assert report.converted == 1
    assert len(report.left_out) == len(MALFORMED)
    for kind in MALFORMED:
        (line,) = [line for line in report.left_out if line.startswith(f"{tmp_path / 'in' / kind}.nii")]
        assert MALFORMED[kind][1] in line


def test_half_a_pair_says_which_half_is_missing(tmp_path):
    values, affine = small()
    save(tmp_path / "a.img", values, affine, nibabel.AnalyzeImage)
    (tmp_path / "a.img").rename(tmp_path / "gone")
    with pytest.raises(ScanUnusable, match=r"the \.img beside it is missing"):
        read_volume(tmp_path / "a.hdr")


def test_a_folder_without_volumes_is_refused(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("x")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--format", "volumes"]) == 1
    assert "holds no volume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"a,b\n1,2\n", b"case,subject,file,similarity,axes\nx,A,b,1,R\n", b"\xff\xfe"]
)
def test_a_damaged_list_of_volumes_is_named(content, tmp_path):
    (tmp_path / "volumes.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"volumes\.csv is damaged: convert the volumes again"):
        read_volume_rows(tmp_path)
