"""nilearn's maps of OASIS become a set: its own fetcher on files in its layout, and no network."""

import gzip
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nilearn.datasets import fetch_oasis_vbm, load_mni152_gm_template, load_mni152_wm_template
from PIL import Image

from oasis_helpers.__main__ import main
from oasis_helpers.data import check_dataset, find_data
from oasis_helpers.intake import vbm as module
from oasis_helpers.intake.convert import split_of
from oasis_helpers.intake.subjects import Subject, load_subjects
from oasis_helpers.intake.vbm import convert_vbm

NAME = "OAS1_{0:04d}_MR1/mwc{1}OAS1_{0:04d}_MR1_mpr_anon_fslswapdim_bet.nii.gz"
TABLE = """ID,M/F,Hand,Age,Educ,SES,MMSE,CDR,eTIV,nWBV,ASF,Delay
OAS1_0006_MR1,M,R,39,,,,,1636,0.813,1.073,
OAS1_0007_MR1,F,R,21,,,,,1247,0.862,1.407,
OAS1_0008_MR1,M,R,31,,,,,1400,0.8,1.2,
OAS1_0009_MR1,F,R,74,2,3,29,0.5,1344,0.743,1.306,
OAS1_0010_MR1,M,R,82,3,2,30,0,1500,0.7,1.1,
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder as nilearn leaves it after fetching ten subjects: number 8 is none of them."""
    folder = tmp_path_factory.mktemp("nilearn_data")
    affine = np.diag([-2.0, 2, 2, 1])  # radiological, as SPM writes
    affine[:3, 3] = 90, -126, -72
    grid = np.indices((91, 109, 91)).reshape(3, -1)
    at = affine[:3, :3] @ grid + affine[:3, 3:]
    maps = {}
    for tissue, template in ((1, load_mni152_gm_template(1)), (2, load_mni152_wm_template(1))):
        voxel = np.round(at - template.affine[:3, 3:]).astype(int)
        inside = ((voxel >= 0) & (template.shape > voxel.T).T).all(axis=0)
        values = np.zeros(grid.shape[1], np.float32)
        values[inside] = template.get_fdata(dtype=np.float32)[tuple(voxel[:, inside])]
        maps[tissue] = values.reshape(91, 109, 91)
    packed = {t: gzip.compress(nibabel.Nifti1Image(v, affine).to_bytes(), 1) for t, v in maps.items()}
    for case in (1, 2, 3, 4, 5, 6, 7, 9, 10, 11):
        for tissue, content in packed.items():
            path = folder / "oasis1" / NAME.format(case, tissue)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    (folder / "oasis1" / "oasis_cross-sectional.csv").write_text(TABLE)
    (folder / "oasis1" / "data_usage_agreement.txt").write_text("terms")
    return folder


def fetcher(kept):
    return partial(fetch_oasis_vbm, data_dir=kept)


@pytest.fixture(scope="module")
def made(kept, tmp_path_factory):
    out = tmp_path_factory.mktemp("vbm") / "out"
    return out, convert_vbm(out, agree=True, n_subjects=10, fetch=fetcher(kept))


def test_the_maps_become_slices_of_the_right_people(made):
    out, report = made
    assert report.ok, report
    assert report.converted == 10
    assert load_subjects(out) == {
        6: Subject(39, "M", None),
        7: Subject(21, "F", None),
        9: Subject(74, "F", 0.5),
        10: Subject(82, "M", 0),
    }
    assert any("6 cases are not in nilearn's table, the first is 1" in note for note in report.notes)
    assert not list(out.glob("*/case_008_*"))
    assert find_data(out).kind == "oasis"
    assert check_dataset(out).ok


def test_they_are_where_the_phantoms_planes_are(made):
    """Each pixel's density against the template at the place that the geometry names."""
    out, _ = made
    template = load_mni152_gm_template(1)
    grey = template.get_fdata()
    image = np.asarray(Image.open(out / "keras_png_slices_train" / "case_009_slice_9.nii.png"))
    mask = np.asarray(Image.open(out / "keras_png_slices_seg_train" / "seg_009_slice_9.nii.png"))
    assert set(np.unique(mask)) == {0, 170, 255}
    i, j = np.meshgrid(np.arange(176), np.arange(208), indexing="ij")
    centre = np.array([0, -16, 17])
    place = np.stack([i - 87.5, j - 119.5, np.full(i.shape, 10.0)], axis=-1)
    voxel = np.round(centre + (place - centre) / 0.972 - template.affine[:3, 3]).astype(int)
    inside = ((voxel >= 0) & (voxel < grey.shape)).all(axis=-1)
    wanted = np.where(inside, grey[tuple(np.clip(voxel, 0, np.array(grey.shape) - 1).transpose(2, 0, 1))], 0)
    found = image[40:-40, 24:-24]
    here = np.corrcoef(found.ravel(), wanted.ravel())[0, 1]
    assert here > 0.93
    for step, axis in ((2, 0), (-2, 0), (2, 1), (-2, 1)):
        assert np.corrcoef(found.ravel(), np.roll(wanted, step, axis).ravel())[0, 1] < here
    assert wanted[mask[40:-40, 24:-24] == 170].mean() > 0.6


def test_a_second_call_goes_on(kept, made):
    out, _ = made
    gone = out / "keras_png_slices_train" / "case_002_slice_3.nii.png"
    before = gone.read_bytes()
    gone.unlink()
    report = convert_vbm(out, agree=True, n_subjects=10, fetch=fetcher(kept))
    assert (report.converted, report.kept) == (1, 9)
    assert gone.read_bytes() == before


def test_a_damaged_map_costs_its_case_alone(kept, tmp_path):
    bunch = fetcher(kept)(n_subjects=2, dartel_version=False)
    cut = tmp_path / "OAS1_0402_MR1.nii.gz"
    cut.write_bytes(Path(bunch.gray_matter_maps[1]).read_bytes()[:5000])
    bunch.gray_matter_maps[1] = str(cut)
    report = convert_vbm(tmp_path / "out", agree=True, fetch=lambda **_: bunch)
    assert report.converted == 1
    (line,) = report.left_out
    assert line.startswith("case 402: it ends early or is damaged")
    assert split_of(402) == "validate"


def test_the_terms_come_first(tmp_path, capsys, monkeypatch):
    def never(**_):
        raise AssertionError("fetched before the terms were agreed to")

    with pytest.raises(ValueError, match="add --agree"):
        convert_vbm(tmp_path / "out", fetch=never)
    assert "https://sites.wustl.edu/oasisbrains/" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: "no")
    with pytest.raises(ValueError, match="did not agree"):
        convert_vbm(tmp_path / "out", fetch=never)
    assert not (tmp_path / "out").exists()


def test_without_a_network_one_line_says_so(tmp_path, capsys, monkeypatch):
    def unreachable(**_):
        raise ConnectionError("Max retries exceeded\nwith url: archive.tgz")

    monkeypatch.setattr("nilearn.datasets.fetch_oasis_vbm", unreachable)
    assert main(["convert", module.SOURCE, str(tmp_path / "out"), "--agree"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: nilearn could not fetch the maps (Max retries exceeded with url")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
