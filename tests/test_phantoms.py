import csv
import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from oasis_helpers.__main__ import main
from oasis_helpers.data import OASISDataset, check_dataset
from oasis_helpers.intake import phantoms as module
from oasis_helpers.intake.phantoms import (
    PhantomFactors,
    _render,
    fresh_heads,  # before conftest.py forbids it
    make_heads,
    make_phantoms,
    read_factors,
)


def _digests(root):
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in root.rglob("*")
        if p.is_file()
    }


def test_layout_is_that_of_the_course(phantoms):
    folders = sorted(p.name for p in phantoms.root.iterdir() if p.is_dir())
    assert folders == sorted(
        f"keras_png_slices_{m}{s}" for m in ("", "seg_") for s in ("train", "validate", "test")
    )
    assert sorted(p.name for p in phantoms.test.iterdir()) == [
        f"case_441_slice_{k}.nii.png" for k in range(4)
    ]
    image = Image.open(phantoms.train / "case_001_slice_0.nii.png")
    assert (image.mode, image.size) == ("L", (256, 256))
    mask = np.asarray(Image.open(phantoms.root / "keras_png_slices_seg_train" / "seg_001_slice_0.nii.png"))
    assert sorted(np.unique(mask)) == [0, 85, 170, 255]
    assert check_dataset(phantoms.root).ok


def test_padding_and_orientation(phantoms):
    for image, mask in OASISDataset(phantoms.train, label_path=phantoms.root / "keras_png_slices_seg_train"):
        pixels, labels = np.asarray(image), mask.numpy()
        assert pixels[:40].max() == pixels[-40:].max() == pixels[:, :24].max() == pixels[:, -24:].max() == 0
        assert pixels.max() == 255
        # Left and right halves hold about as much brain; so a row is left–right.
        assert abs((labels[:128] > 0).sum() / (labels > 0).sum() - 0.5) < 0.05


def test_anterior_is_to_the_right(phantoms):
    from nilearn.datasets import load_mni152_gm_template

    template = load_mni152_gm_template(resolution=1)
    origin = np.round(template.affine[:3, 3]).astype(int)
    plane = np.asarray(template.dataobj)[:, :, 1 - origin[2]]  # x rightward, y to the front, at z = 1 mm
    grey = np.zeros((256, 256))
    # MNI (0, −16) is the middle of a slice.
    top, left = 128 + origin[0], 128 + origin[1] + 16
    grey[top : top + plane.shape[0], left : left + plane.shape[1]] = plane
    for case in (1, 2):
        seg = phantoms.root / "keras_png_slices_seg_train" / f"seg_{case:03d}_slice_0.nii.png"
        mask = np.asarray(Image.open(seg)) == 170
        right = np.corrcoef(mask.ravel(), grey.ravel())[0, 1]
        wrong = [np.corrcoef(m.ravel(), grey.ravel())[0, 1] for m in (mask[:, ::-1], mask.T, mask.T[::-1])]
        assert right > max(wrong) + 0.05


def test_bytes_do_not_depend_on_workers_or_order(phantoms, tmp_path):
    make_phantoms(tmp_path / "two", (2, 1, 1), slices=4, workers=2)
    assert _digests(tmp_path / "two") == _digests(phantoms.root)


def test_another_seed_gives_other_subjects(phantoms, tmp_path):
    other = make_phantoms(tmp_path / "s1", (1, 0, 0), slices=1, seed=1, workers=1)
    name = "case_001_slice_0.nii.png"
    assert (other.train / name).read_bytes() != (phantoms.train / name).read_bytes()


def test_factors_are_recorded(phantoms):
    with (phantoms.root / "phantoms.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["case"] for r in rows] == ["1", "2", "402", "441"]
    assert [r["split"] for r in rows] == ["train", "train", "validate", "test"]
    assert set(rows[0]) == set(PhantomFactors.__annotations__)
    masks = phantoms.root / "keras_png_slices_seg_train"
    white = sum(
        int((np.asarray(Image.open(masks / f"seg_001_slice_{k}.nii.png")) == 255).sum()) for k in range(4)
    )
    assert int(rows[0]["white_mm3"]) == white


def test_an_interrupted_run_is_completed(phantoms, tmp_path):
    root = tmp_path / "p"
    make_phantoms(root, (2, 1, 1), slices=4, workers=1)
    whole = _digests(root)
    # As after a kill: case 2 half written, its row and the later ones not there yet.
    (root / "keras_png_slices_train" / "case_002_slice_3.nii.png").unlink()
    (root / "keras_png_slices_train" / ".case_002_slice_3.nii.png.1.part").write_bytes(b"half")
    lines = (root / "phantoms.csv").read_text().splitlines(keepends=True)
    (root / "phantoms.csv").write_text("".join(lines[:2]))
    kept = (root / "keras_png_slices_train" / "case_001_slice_0.nii.png").stat().st_mtime_ns
    make_phantoms(root, (2, 1, 1), slices=4, workers=1)
    assert _digests(root) == whole
    assert (root / "keras_png_slices_train" / "case_001_slice_0.nii.png").stat().st_mtime_ns == kept


def test_a_finished_set_is_left_alone(phantoms, monkeypatch):
    monkeypatch.setattr("oasis_helpers.intake.phantoms._load_template", lambda: pytest.fail("made again"))
    assert make_phantoms(phantoms.root, (2, 1, 1), slices=4) == phantoms


def test_one_process_for_each_processor_that_we_may_use(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("joblib.cpu_count", lambda: 3)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr(module, "_factors", lambda jobs, workers: asked.append(workers) or [])
    make_phantoms(tmp_path / "p", (4, 0, 0), slices=1)
    assert asked == [3]


def test_the_default_set_takes_no_options(monkeypatch, capsys):
    monkeypatch.setattr(module, "make_phantoms", lambda *a, **k: pytest.fail("made the default set"))
    assert main(["phantoms", "--cases", "1", "0", "0", "--seed", "0"]) == 1
    error = "error: --cases, --seed: the default set has its own. Give a folder OUT for a set of yours.\n"
    assert capsys.readouterr().err == error


def test_the_public_name_is_the_same_thing():
    from oasis_helpers import phantoms as public

    assert all(getattr(public, name) is getattr(module, name) for name in public.__all__)


def test_nothing_of_the_users_is_touched(phantoms, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty"):
        make_phantoms(tmp_path / "mine", (1, 0, 0), slices=1)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(FileExistsError, match="seed 0 ≠ 5"):
        make_phantoms(phantoms.root, (2, 1, 1), slices=4, seed=5)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        make_phantoms(tmp_path / "file")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cases": (402, 0, 0)}, "0 to 401"),
        ({"cases": (0, 0, 0)}, "at least one"),
        ({"cases": (1, 2)}, "three numbers"),
        ({"slices": 33}, "1 to 32"),
        ({"seed": -1}, "0 or more"),
        ({"workers": 0}, "1 or more"),
    ],
)
def test_mistakes_are_named(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_phantoms(tmp_path / "p", **{"cases": (1, 0, 0), **settings})
    assert not (tmp_path / "p").exists()


def test_a_full_disk_is_noticed_before(tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("u", "free")(1000))
    with pytest.raises(OSError, match="MB free"):
        make_phantoms(tmp_path / "p", (1, 0, 0))


@pytest.fixture(scope="module")
def rendered():
    """Eight whole cases, not written to disk: images, masks (slices, 256, 256) and factors."""
    template = module._load_template()
    cases = [_render(template, case, "train", slice(32), 0) for case in range(1, 9)]
    images, masks = (np.concatenate([c[i] for c in cases]) for i in (0, 1))
    return images.astype(float), masks, [c[2] for c in cases]


@pytest.mark.parametrize(
    ("value", "mean", "mean_within", "sd", "sd_within", "share", "share_within"),
    [  # DATA: mean ± sd and share of the pixels of each mask value in a slice of OASIS
        (0, 15.6, 4, 39, 5, 0.72, 0.04),
        (85, 35, 4, 13, 5, 0.06, 0.03),
        (170, 77, 5, 12, 4, 0.11, 0.03),
        (255, 115, 6, 11, 4, 0.11, 0.03),
    ],
)
def test_tissues_look_like_oasis(rendered, value, mean, mean_within, sd, sd_within, share, share_within):
    images, masks, _ = rendered
    per_slice = [(i[m == value].mean(), i[m == value].std()) for i, m in zip(images, masks)]
    found_mean, found_sd = np.mean(per_slice, axis=0)
    assert found_mean == pytest.approx(mean, abs=mean_within)
    assert found_sd == pytest.approx(sd, abs=sd_within)
    assert (masks == value).mean() == pytest.approx(share, abs=share_within)


def test_half_the_pixels_are_zero_and_the_scalp_is_brightest(rendered):
    images, masks, _ = rendered
    assert (images == 0).mean() == pytest.approx(0.5, abs=0.04)
    assert all(i.max() == 255 and (i == 255).sum() < 8 for i in images)
    # The brightest thousand pixels of every slice lie outside the brain, in a ring.
    for image, mask in zip(images[::16], masks[::16]):
        brightest = np.argsort(image.ravel())[-1000:]
        assert (mask.ravel()[brightest] == 0).mean() > 0.98


def test_atrophy_widens_the_ventricles(rendered):
    _, _, factors = rendered
    volumes, atrophy = ([getattr(f, name) for f in factors] for name in ("ventricle_mm3", "atrophy"))
    assert np.corrcoef(volumes, atrophy)[0, 1] > 0.6
    assert max(volumes) > 1.5 * min(volumes)
    brain = [f.grey_mm3 + f.white_mm3 for f in factors]
    assert np.std(brain) / np.mean(brain) > 0.02


def test_fewer_slices_show_the_same_subject(rendered, phantoms):
    # Scaled by its own maximum, a slice can differ by rounding alone; the masks are equal.
    _, masks, _ = rendered
    first = np.asarray(Image.open(phantoms.root / "keras_png_slices_seg_train" / "seg_001_slice_2.nii.png"))
    assert (first == masks[2]).all()


def test_heads_of_one_slice_are_new_heads_at_all_heights(tmp_path):
    few = make_heads(tmp_path / "few", 4, workers=1)
    names = sorted(p.name for p in few.test.iterdir())
    assert [name[:9] for name in names] == [f"case_{case}" for case in range(1001, 1005)]
    assert len({name.partition("slice")[2] for name in names}) > 1
    assert not list(few.train.iterdir())
    masks = few.root / "keras_png_slices_seg_test"
    assert all((masks / name.replace("case", "seg")).exists() for name in names)
    assert sorted(read_factors(few.root)) == [1001, 1002, 1003, 1004]
    again = make_heads(tmp_path / "two", 2, workers=2)
    assert all((few.test / p.name).read_bytes() == p.read_bytes() for p in again.test.iterdir())
    with pytest.raises(ValueError, match="give 1 to 99,000 heads"):
        make_heads(tmp_path / "none", 0)
    with pytest.raises(FileExistsError, match="heads 4 ≠ 5"):
        make_heads(tmp_path / "few", 5)


def test_a_slice_alone_is_that_of_its_case(rendered):
    _, masks, _ = rendered
    _, alone, _ = _render(module._load_template(), 1, "train", slice(20, 21), 0)
    assert (alone[0] == masks[20]).all()


def test_the_right_half_lies_in_front_of_the_left():
    causes, origin, planes = module._Causes.draw(np.random.default_rng(0)), np.zeros(3), slice(1)
    straight, turned = (
        module._sources(replace(causes, torque=torque), np.random.default_rng(1), origin, planes)
        for torque in (0.0, 2.0)
    )
    moved = (straight - turned)[
        1, :, 100, 0
    ]  # how much farther back a pixel's source lies; rows: left to right
    assert moved[:40] == pytest.approx(-2, abs=0.05)
    assert moved[-40:] == pytest.approx(2, abs=0.05)
    assert (np.diff(moved) >= -1e-5).all()  # and nothing is torn between
    drawn = [module._Causes.draw(np.random.default_rng(seed)) for seed in range(200)]
    assert np.mean([c.torque for c in drawn]) > 1
    assert np.mean([c.left_growth for c in drawn]) > 0.3  # the left ventricle is the larger one


def test_the_cortex_is_folded(rendered):
    images, masks, _ = rendered
    brain = masks[::32] > 0
    shallow = [
        b & ~ndimage.binary_erosion(b, iterations=14) & ndimage.binary_erosion(b, iterations=4) for b in brain
    ]
    fluid = [(m[s] == 85).mean() for m, s in zip(masks[::32], shallow)]
    assert np.mean(fluid) > 0.12  # sulci, deeper than the film of fluid around the brain
    assert all((i[s] < 60).any() for i, s in zip(images[::32], shallow))


def test_fresh_heads_are_made_once_and_apart_from_all_sets(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "user_cache_path", lambda *a, **k: tmp_path / "cache")
    monkeypatch.setattr(module, "make_heads", lambda *a: asked.append(a))
    fresh_heads()
    assert asked == [(tmp_path / "cache" / f"phantoms-r{module.RECIPE}-fresh", 1200)]
    assert max(module.FIRST_ID[s] + module.MOST_CASES[s] for s in module.FIRST_ID) <= module.FIRST_HEAD


def test_plan_is_recorded(phantoms):
    plan = json.loads((phantoms.root / "phantoms.json").read_text())
    assert plan["seed"] == 0
    assert plan["cases"] == [2, 1, 1]


def test_a_planted_lesion_is_dark_inside_white_matter_and_known():
    classes = np.zeros((64, 64), int)
    classes[8:56, 8:56] = 1
    classes[10:54, 10:54] = 3
    image = np.select([classes == 1, classes == 3], [-0.6, 0.4], -1.0)
    before = image.copy()
    found, lesion = module.plant_lesion(image, classes, np.random.default_rng(0))
    assert np.array_equal(image, before)
    assert 15 < lesion.sum() < 70
    assert found[lesion].mean() < -0.1 < 0.4 == image[10, 10]
    away = ~ndimage.binary_dilation(lesion, iterations=4)
    assert np.allclose(found[away], image[away], atol=0.02)
    again, _ = module.plant_lesion(image, classes, np.random.default_rng(0))
    assert np.array_equal(found, again)
    with pytest.raises(ValueError, match="choose another"):
        module.plant_lesion(image, np.ones((64, 64), int), np.random.default_rng(0))
