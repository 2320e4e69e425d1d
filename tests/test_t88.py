"""OASIS-1's volumes saved again by somebody, and heads that lie wrongly in them."""

import gzip
import hashlib
import io

import nibabel
import numpy as np
import pytest
from oasis_like import analyze, subject_files, write_tar, write_tree

from oasis_helpers.intake.convert import FIRST_PLANE, convert
from oasis_helpers.intake.orientation import misplaced
from oasis_helpers.intake.scans import ScanUnusable
from oasis_helpers.intake.t88 import T88, read_t88

COURSE = np.s_[FIRST_PLANE : FIRST_PLANE + 32]
LAS = np.diag([-1.0, 1, 1, 1])


def packed(content):
    return gzip.compress(content, 1, mtime=0)


def nifti(values, affine=LAS, **header):
    image = nibabel.Nifti1Image(values, affine)
    for key, value in header.items():
        image.header[key] = value
    return image.to_bytes()


def without_codes(raw):
    """With an orientation, of which the header says that it means nothing (qform_code and sform_code 0)."""
    return raw[:252] + bytes(4) + raw[256:]


def pair(values, affine=LAS):
    image = nibabel.Nifti1Pair(values, affine)
    files = {kind: io.BytesIO() for kind in ("header", "image")}
    image.to_file_map({k: nibabel.FileHolder(fileobj=f) for k, f in files.items()})
    return {"hdr": files["header"].getvalue(), "img": files["image"].getvalue()}


def read(files):
    return read_t88("volume", {kind: lambda content=content: content for kind, content in files.items()})


def turned(values, codes):
    """The same volume stored with its axes running to ``codes``."""
    there = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("LAS"), nibabel.orientations.axcodes2ornt(codes)
    )
    back = nibabel.orientations.inv_ornt_aff(there, values.shape)
    return nibabel.apply_orientation(values, there), LAS @ back


FORMS = {
    "NIfTI": lambda v: {"nii": nifti(v)},
    "NIfTI, identity": lambda v: {"nii": nifti(v, np.eye(4))},
    "NIfTI, no orientation": lambda v: {"nii": without_codes(nifti(v, np.diag([1.0, 1, -1, 1])))},
    "NIfTI, trailing axis": lambda v: {"nii": nifti(v[..., None])},
    "NIfTI, scaled": lambda v: {"nii": nifti((v // 2).astype(np.int16), scl_slope=2.0, scl_inter=1.0)},
    "pair, uint16": lambda v: pair(v.astype(np.uint16)),
    "pair, int32": lambda v: pair(v.astype(np.int32)),
    "pair, uint32": lambda v: pair(v.astype(np.uint32)),
    "pair, float64": lambda v: pair(v.astype(np.float64)),
    "Analyze": lambda v: dict(zip(("hdr", "img"), analyze(v))),
    **{
        f"turned to {c}": lambda v, c=c: {"nii": nifti(*turned(v, c))}
        for c in ("RAS", "LPS", "RPI", "SAL", "PIR")
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_a_volume_saved_again_is_the_same(form):
    values = np.random.default_rng(0).integers(0, 1500, T88, dtype=np.int16)
    if form == "NIfTI, scaled":
        values |= 1
    assert np.array_equal(read(FORMS[form](values)), values)


ENDINGS = {
    "nii": lambda v: {"nii": nifti(v)},
    "nii.gz": lambda v: {"nii.gz": packed(nifti(v))},
    "img.gz": lambda v: {"hdr": analyze(v)[0], "img.gz": packed(analyze(v)[1])},
    "both packed": lambda v: {"hdr.gz": packed(analyze(v)[0]), "IMG.GZ": packed(analyze(v)[1])},
    "pair": lambda v: pair(v.astype(np.uint16)),
}


@pytest.mark.parametrize("form", ENDINGS)
def test_a_case_saved_again_gives_the_same_slices(form, head, tmp_path):
    published = subject_files(1, *head)
    files = {n: c for n, c in published.items() if not n.endswith((".hdr", ".img"))}
    for name in published:
        if name.endswith("t88_gfc.img") or name.endswith("fseg.img"):
            values = head[1] if "fseg" in name else head[0]
            files |= {f"{name[:-3]}{ending}": c for ending, c in ENDINGS[form](values).items()}
    source = write_tree(tmp_path / "t", files) if form != "img.gz" else write_tar(tmp_path / "d.tgz", files)
    report = convert(source, tmp_path / "out", workers=1)
    assert report.ok, report
    convert(write_tree(tmp_path / "p", published), tmp_path / "wanted", workers=1)
    digests = [
        {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / folder).rglob("*.png")}
        for folder in ("out", "wanted")
    ]
    assert len(digests[0]) == 64
    assert digests[0] == digests[1]


def test_both_forms_of_one_case_are_one_case(head, tmp_path):
    files = subject_files(1, *head)
    image = next(n for n in files if n.endswith("t88_gfc.img"))
    report = convert(
        write_tree(tmp_path / "t", {**files, f"{image}.gz": packed(files[image])}), tmp_path / "out"
    )
    assert report.ok, report
    assert report.converted == 1


def test_a_packed_volume_is_no_bomb(head, tmp_path):
    files = subject_files(1, *head)
    image = next(n for n in files if n.endswith("t88_gfc.img"))
    files[f"{image}.gz"] = packed(bytes(100 * 2**20))
    del files[image]
    report = convert(write_tree(tmp_path / "t", files), tmp_path / "out")
    assert "unpacks to more than 55 MB: a bomb" in report.left_out[0]


def test_what_does_not_fit_says_what_is_known():
    with pytest.raises(ScanUnusable, match="is 176×208×170, should be 176×208×176"):
        read({"nii": nifti(np.zeros((176, 208, 170), np.int16))})
    with pytest.raises(ScanUnusable, match="is 208×176×176, should be"):
        read({"nii": nifti(np.zeros((208, 176, 176), np.int16), np.eye(4))})
    with pytest.raises(ScanUnusable, match="values of type complex64"):
        read({"nii": nifti(np.zeros(T88, np.complex64))})
    with pytest.raises(ScanUnusable, match=r"has 99 bytes|cannot be read"):
        read({"nii": nifti(np.zeros(T88, np.int16))[:99]})


WRONG = {
    "mirrored front to back": lambda v: v[:, ::-1],
    "upside down": lambda v: v[:, :, ::-1],
    "mirrored front to back and upside down": lambda v: v[:, ::-1, ::-1],
    "with its first and last axes exchanged": lambda v: v.transpose(2, 1, 0),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_head_that_lies_wrongly_is_noticed(what, head):
    assert misplaced(WRONG[what](head[0]), COURSE) == what
    brain = head[0] * (head[1] > 0)
    assert misplaced(WRONG[what](brain), COURSE) == what


def test_a_head_that_lies_well_is_not(head):
    assert misplaced(head[0], COURSE) is None
    assert misplaced(head[0] * (head[1] > 0), COURSE) is None
    assert misplaced(head[0][::-1], COURSE) is None  # left and right cannot be told
    assert misplaced(np.zeros(T88, np.int16), COURSE) is None


def test_the_report_says_so_and_what_cannot_be_told(head, tmp_path):
    mirrored = [v[:, ::-1].copy() for v in head]
    report = convert(write_tree(tmp_path / "t", subject_files(1, *mirrored)), tmp_path / "out")
    assert report.converted == 1
    assert "case 001 seems to be stored mirrored front to back" in str(report)
    assert "left and right, which no picture tells" in str(report)
