import json
import shutil
from functools import partial

import pytest
import torch
from PIL import Image

from oasis_helpers import __main__ as command_line
from oasis_helpers import evaluation
from oasis_helpers.data import load_masks, load_slices, to_unit_range
from oasis_helpers.evaluation import (
    PIXEL,
    Evaluation,
    Segmenter,
    Split,
    anatomy,
    anatomy_distances,
    bootstrap,
    check_images,
    check_splits,
    dice,
    embed,
    evaluate,
    fid,
    kid,
    load_segmenter,
    load_split,
    memorisation,
    ms_ssim,
    nearest_images,
    notes,
    precision_recall,
    resize_for_segmenter,
    save_segmenter,
    segment,
    train_segmenter,
)
from oasis_helpers.layout import DataLocation
from oasis_helpers.training import WEIGHTS, TrainConfig, read_header, save_weights


def _images(count=4, seed=0):
    return torch.rand((count, 1, 64, 64), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_dice_by_hand():
    predicted, truth = torch.tensor([[[0, 1], [1, 2]]]), torch.tensor([[[0, 1], [2, 2]]])
    found = dice(predicted, truth)
    assert torch.allclose(found[:3], torch.tensor([1.0, 2 / 3, 2 / 3]))
    assert found[3].isnan()  # class 3 is in neither


def test_masks_are_cut_and_scaled_like_slices(phantoms):
    slices, masks = load_slices(phantoms.train, 64), load_masks(phantoms.folder("train", masks=True), 64)
    assert masks.shape == (8, 64, 64)
    assert masks.dtype == torch.uint8
    assert set(masks.unique().tolist()) == {0, 1, 2, 3}
    brightness = [float(slices[:, 0][masks == tissue].float().mean()) for tissue in (1, 2, 3)]
    assert brightness == sorted(brightness)  # CSF, grey, white
    assert len(load_masks(phantoms.folder("train", masks=True), 64, cases=1)) == 4


def test_the_shipped_segmenter_finds_the_tissues(phantoms):
    images = to_unit_range(load_slices(phantoms.test, 64))
    found = dice(segment(images, load_segmenter()), load_masks(phantoms.folder("test", masks=True), 64))
    assert found.min() > 0.85
    assert found[1:].mean() > 0.9


def test_the_shipped_features_tell_real_from_spoilt(phantoms):
    network = load_segmenter()
    images = to_unit_range(load_slices(phantoms.train, 64))
    features = embed(images, network)
    assert features.shape == (8, network.num_features)
    assert features.abs().mean() < 3  # standardised
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    assert (embed(blurred, network) - features).abs().mean() > 0.3


def test_kid_is_the_unbiased_mmd():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn((2, 40, 6), generator=generator, dtype=torch.float64)
    y = y + 0.5

    def kernel(a, b):
        return (a @ b.T / 6 + 1) ** 3

    def without_self(k):
        return (k.sum() - k.diagonal().sum()) / (40 * 39)

    by_hand = without_self(kernel(x, x)) + without_self(kernel(y, y)) - 2 * kernel(x, y).mean()
    mean, deviation = kid(x, y, subsets=2, subset_size=40)
    assert mean == pytest.approx(float(by_hand), rel=1e-4)
    assert deviation == pytest.approx(0, abs=1e-5)  # every subset is the whole


def test_kid_of_one_distribution_is_about_zero_and_leaves_global_state_alone():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn((2, 500, 6), generator=generator)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    same, deviation = kid(x, y)
    assert torch.equal(torch.rand(1), expected)
    assert abs(same) < 3 * deviation
    assert kid(x, y + 1)[0] > 10 * abs(same)
    assert kid(x, y) == (same, deviation)
    with pytest.raises(ValueError, match="20 real and 500 generated images are too few for KID"):
        kid(x[:20], y)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros((2, 1, 64, 64), dtype=torch.uint8), "uint8"),
        (torch.zeros(2, 1, 32, 32), "64, 64"),
        (torch.zeros(2, 3, 64, 64), "64, 64"),
        (_images(2), "too few"),
        (_images() * float("nan"), "NaN"),
        (_images() * 3, "from -3"),
        ((_images() + 1) / 2, "dark air"),
        (torch.cat([_images(), -torch.ones(1, 1, 64, 64)]), "1 of 5 images are constant"),
    ],
)
def test_wrong_images_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        check_images(images, least=3)


def test_a_segmenter_learns_repeatably_and_comes_back(phantoms, tmp_path, monkeypatch):
    # which is faster is measured, and two measurements may differ
    monkeypatch.setattr("oasis_helpers.training.loop.faster_precision", lambda *_: "fp32")
    slices, masks = load_slices(phantoms.train, 64), load_masks(phantoms.folder("train", masks=True), 64)
    runs = [train_segmenter(slices, masks, steps=12, batch_size=4) for _ in range(2)]
    *states, last = runs[0]
    losses = [state.loss for state in states]
    assert [next(runs[1]).loss for _ in range(2)] == losses[:2]
    assert last.loss < 0.9 * losses[0]
    model = last.model
    images = to_unit_range(slices)
    features = embed(images, model)
    assert torch.allclose(features.mean(0), torch.zeros(model.num_features), atol=1e-4)
    save_segmenter(tmp_path / "s.safetensors", model, {"data": "phantoms"})
    assert torch.equal(embed(images, load_segmenter(tmp_path / "s.safetensors")), features)
    header = read_header(tmp_path / "s.safetensors")
    assert (header.kind, header.card) == ("segmenter", {"data": "phantoms"})


@pytest.mark.parametrize(
    ("slices", "masks", "message"),
    [
        ((8, 1, 64, 64), (7, 64, 64), "8 slices and masks of shape \\(7, 64, 64\\)"),
        ((8, 1, 64, 64), (8, 32, 32), "8 slices and masks of shape \\(8, 32, 32\\)"),
        ((8, 64, 64), (8, 64, 64), "give uint8 \\(N, 1, 64, 64\\)"),
    ],
)
def test_masks_that_are_not_those_of_the_slices_are_refused(slices, masks, message):
    with pytest.raises(ValueError, match=message):
        next(train_segmenter(*(torch.zeros(shape, dtype=torch.uint8) for shape in (slices, masks))))


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_segmenter(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="holds no segmenter"):
        load_segmenter(WEIGHTS)


def test_features_do_not_depend_on_the_batch():
    model, images = Segmenter().eval(), _images(70)
    features = embed(images, model)
    assert torch.allclose(features[66:], embed(images[66:], model), atol=1e-5)
    assert (features[66] - features[67]).abs().max() > 1e-3  # they do depend on the image


# ---- distances of sets ------------------------------------------------------------------------


def _points(count, shift=0.0, seed=0, dimensions=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, dimensions), generator=generator) + shift


def test_fid_of_two_normal_distributions():
    # ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), with Σ₂ = 4 Σ₁ and a shift of 1 in four dimensions
    assert fid(_points(20_000), 2 * _points(20_000, seed=1) + 1) == pytest.approx(
        4 + 4 * (1 + 4 - 4), rel=0.05
    )
    assert fid(_points(50), _points(50, seed=1)) > 5 * fid(_points(5000), _points(5000, seed=1))  # its bias
    with pytest.raises(ValueError, match="4 real and 9 generated images are too few"):
        fid(_points(4), _points(9))


def test_precision_and_recall_tell_fidelity_from_diversity():
    real = torch.cat([_points(200), _points(200, shift=8)])
    same = torch.cat([_points(200, seed=1), _points(200, shift=8, seed=2)])
    one_mode, astray = _points(400, seed=1), _points(400, shift=4, seed=1)
    good, dropped, bad = (precision_recall(real, generated) for generated in (same, one_mode, astray))
    assert min(good.values()) > 0.8
    assert dropped["precision"] > 0.8
    assert dropped["recall"] < 0.6
    assert dropped["coverage"] < 0.6
    assert bad["precision"] < 0.2
    assert bad["density"] < 0.2
    with pytest.raises(ValueError, match="too few for 5 neighbours"):
        precision_recall(real[:6], same)


def test_precision_by_hand():
    real, generated = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [6.0], [10.0]])
    # radii of the real points for k = 1: 1, 1, 2; of the generated: 5.5, 4, 4
    found = precision_recall(real, generated, k=1)
    assert found["precision"] == pytest.approx(1 / 3)
    assert found["recall"] == 1
    assert found["density"] == pytest.approx(2 / 3)
    assert found["coverage"] == pytest.approx(2 / 3)


def test_likeness_of_pairs():
    one = _images(1).expand(5, -1, -1, -1)
    assert ms_ssim(one) == pytest.approx(1, abs=1e-4)
    assert ms_ssim(_images(20)) < 0.2
    with pytest.raises(ValueError, match="too few"):
        ms_ssim(_images(1))


def test_neighbours_are_sought_in_other_cases():
    # two real heads of six slices each, far apart; a sample between them is near neither head's own ball
    generator = torch.Generator().manual_seed(0)
    heads = torch.tensor([[0.0, 0.0], [10.0, 0.0]]).repeat_interleave(6, 0)
    real = heads + 0.1 * torch.randn(heads.shape, generator=generator)
    cases = [0] * 6 + [1] * 6
    between = torch.tensor([[5.0, 0.0]]) + 0.1 * torch.randn((8, 2), generator=generator)
    assert precision_recall(real, between)["precision"] == 0
    assert precision_recall(real, between, cases=(cases, range(8)))["precision"] == 1
    with pytest.raises(ValueError, match="fewer than 5 others in other cases"):
        precision_recall(real, real, cases=([0] * 12, cases))


def test_the_bootstrap_draws_whole_cases():
    generator = torch.Generator().manual_seed(0)
    cases = torch.arange(30).repeat_interleave(10)
    values = torch.randn(30, generator=generator)[cases] + 0.01 * torch.randn(300, generator=generator)

    def mean(indices):
        return float(values[indices].mean())

    low, high = bootstrap(mean, cases.tolist(), rounds=1000)
    by_case = float(values.reshape(30, 10).mean(1).std() / 30**0.5)
    assert high - low == pytest.approx(2 * 1.96 * by_case, rel=0.15)  # as if there were 30, not 300
    low, high = bootstrap(mean, range(300), rounds=1000)
    assert high - low == pytest.approx(2 * 1.96 * by_case / 10**0.5, rel=0.15)
    assert bootstrap(mean, cases) == bootstrap(mean, cases)


# ---- anatomy ------------------------------------------------------------------------------------


def _head(left=20, right=43):
    """White matter with a rim of CSF, and in its middle a ventricle of 4×6 pixels."""
    classes = torch.zeros((1, 64, 64), dtype=torch.long)
    classes[:, left : right + 1, 16:48] = 1
    classes[:, left + 1 : right, 17:47] = 3
    classes[:, 30:34, 29:35] = 1
    return classes


def test_anatomy_by_hand():
    found = anatomy(_head())
    area = 24 * 32
    assert float(found["brain"]) == pytest.approx(area * PIXEL**2 / 100)
    assert float(found["ventricles"]) == pytest.approx(24 / area)  # the rim is CSF, but no ventricle
    assert float(found["CSF"]) == pytest.approx((24 + area - 22 * 30) / area)
    assert float(found["CSF"] + found["grey"] + found["white"]) == pytest.approx(1)
    assert float(found["symmetry"]) == 1


def test_symmetry_sees_one_sided_heads_and_not_where_they_lie():
    moved = _head().roll((3, 5), (1, 2))
    assert float(anatomy(moved)["symmetry"]) == 1
    one_sided = _head()
    one_sided[:, 36:40, 29:35] = 1
    assert float(anatomy(one_sided)["symmetry"]) < 0.95
    nothing = anatomy(torch.zeros((1, 64, 64), dtype=torch.long))
    assert nothing["brain"] == 0
    assert all(nothing[name].isnan() for name in nothing if name != "brain")


def test_anatomy_of_the_segmentation_is_that_of_the_true_masks(phantoms):
    images = to_unit_range(load_slices(phantoms.test, 64))
    found = anatomy(segment(images, load_segmenter()))
    truth = anatomy(load_masks(phantoms.folder("test", masks=True), 64))
    for name, values in truth.items():
        assert (found[name] - values).abs().mean() < 0.02 * (100 if name == "brain" else 1), name
        assert values.isfinite().all()


def test_distances_of_anatomy_are_in_deviations():
    values = _points(4000)[:, 0].double()
    found = anatomy_distances({"brain": values}, {"brain": values + 0.5 * values.std()})
    assert found["brain"] == pytest.approx(0.5, rel=0.02)
    # JSON knows no infinity: what is not there is None
    assert anatomy_distances({"brain": values}, {"brain": values * float("nan")}) == {"brain": None}
    assert anatomy_distances({"brain": values * 0}, {"brain": values}) == {"brain": None}


# ---- copies ---------------------------------------------------------------------------------------


def test_copies_are_caught_and_others_are_not():
    train, held_out, unseen, fresh = (_points(400, seed=seed, dimensions=8) for seed in range(4))
    copies = train[::4] + 0.05 * _points(100, seed=9, dimensions=8)
    assert memorisation(copies, train, held_out, unseen).share > 0.95
    innocent = memorisation(fresh, train, held_out, unseen, expected=0.05)
    assert innocent.share == pytest.approx(0.05, abs=0.04)
    found = memorisation(torch.cat([fresh, copies]), train, held_out, unseen)
    assert torch.equal(found.nearest[400:], torch.arange(0, 400, 4))
    assert found.flagged[400:].float().mean() > 0.95
    with pytest.raises(ValueError, match="at least 100"):
        memorisation(fresh, train, held_out, unseen[:50])


def test_the_nearest_is_found_over_several_parts():
    among, images = _points(30), _points(600, seed=1)
    distance, index = nearest_images(images, among)
    all_distances = (images.double()[:, None] - among.double()).norm(dim=2)
    assert torch.equal(index, all_distances.argmin(1))
    assert torch.allclose(distance.double(), all_distances.min(1).values)


# ---- all of it --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def splits(phantoms):
    """Three splits with enough slices: those of the small set, over and over with a little noise."""

    def many(folder, seed):
        images = load_split(folder, network).images.repeat(25, 1, 1, 1)[:100]
        images = (
            images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        ).clamp(-1, 1)
        return Split(images, embed(images, network), [i % 4 for i in range(len(images))])

    network = load_segmenter()
    return [
        many(f, seed) for seed, f in enumerate((phantoms.train, phantoms.validate, phantoms.test))
    ], network


def test_a_report_has_floor_and_ceiling_and_catches_copies(splits):
    (train, validate, test), network = splits
    copied = train.images.roll(1, 3)
    copied[:30] = train.images[:30]
    found = evaluate(copied, train, validate, test, network, rounds=5)
    assert list(found.rows) == ["generated", "held-out slices", "mean of training", "noise"]
    kids = {name: row["KID"] for name, row in found.rows.items()}
    assert kids["noise"] > 5 * kids["generated"]
    assert kids["generated"] == kid(validate.features, embed(copied, network))[0]
    assert all(row["KID, low"] < row["KID, high"] for row in found.rows.values())
    assert found.rows["generated"]["FID"] is None  # 100 images, 256 dimensions
    assert found.rows["mean of training"]["MS-SSIM of pairs"] == pytest.approx(1, abs=1e-3)
    for kind in ("images", "features"):
        shares = {name: row[f"nearer to training, {kind}"] for name, row in found.rows.items()}
        assert shares["generated"] >= 0.3
        assert shares["held-out slices"] < 0.05
    assert torch.equal(found.anatomy["real"]["brain"], anatomy(segment(validate.images, network))["brain"])
    assert found.searched == 4
    assert len(found.pairs) == 8
    for generated, nearest in found.pairs:
        assert torch.equal(generated, nearest)


def test_cases_of_unlike_size_can_be_drawn_again(splits):
    # 90 slices of one case and 10 of others: most draws of three cases have fewer than 100 slices.
    (train, validate, test), network = splits
    unlike = Split(validate.images, validate.features, [0] * 90 + [1] * 5 + [2] * 5)
    found = evaluate(train.images, train, unlike, test, network, rounds=5)
    assert all(row["KID, low"] <= row["KID, high"] for row in found.rows.values())


def test_images_of_another_size_are_scaled():
    assert torch.equal(resize_for_segmenter(_images(2)), _images(2))
    ramp = torch.arange(32.0).expand(2, 1, 32, 32) / 16 - 1
    larger = resize_for_segmenter(ramp)
    assert larger.shape == (2, 1, 64, 64)
    halves = (torch.arange(64) - 0.5) / 32 - 1  # the ramp at the middle of each half of its pixels
    assert torch.allclose(larger[..., 1:-1], halves[1:-1].expand(2, 1, 64, 62), atol=1e-6)
    assert torch.equal(resize_for_segmenter(3 * _images(2)), (3 * _images(2)).clamp(-1, 1))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (_images(20), "20 images are too few"),
        (torch.zeros(200, 3, 64, 64), "give \\(B, 1, H, W\\)"),
        (_images(200) * float("nan"), "NaN"),
        (-torch.ones(200, 1, 64, 64), "200 of 200 images are constant"),
    ],
)
def test_samples_that_cannot_be_judged_are_refused(splits, images, message):
    sets, network = splits
    with pytest.raises(ValueError, match=message):
        evaluate(images, *sets, network)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (_points(150, dimensions=5), "4, 5 dimensions: they come from different networks"),
        (_points(150) * float("nan"), "NaN"),
        (_points(150).long(), "int64"),
        (_images(150), "shape \\(150, 1, 64, 64\\)"),
    ],
)
@pytest.mark.parametrize("distance", [kid, fid, precision_recall])
def test_features_that_do_not_belong_together_are_refused(distance, features, message):
    with pytest.raises(ValueError, match=message):
        distance(_points(150), features)


def test_copies_are_not_searched_among_other_features():
    sets = [_points(150) for _ in range(3)]
    with pytest.raises(ValueError, match="different networks"):
        memorisation(_points(150, dimensions=3), *sets)


@pytest.mark.parametrize(
    ("cases", "message"),
    [
        ([1, 2] * 49, "the test split has 98 slices of 2 cases: a report needs 100"),
        ([1] * 120, "120 slices of 1 cases: a report needs 100, and for each of them 5 of other cases"),
        ([1] * 116 + [2] * 4, "120 slices of 2 cases"),
    ],
)
def test_too_few_slices_to_compare_with_are_refused(splits, cases, message):
    (_, validate, _), _ = splits
    check_splits(validate, validate)
    with pytest.raises(ValueError, match=message):
        check_splits(validate, Split(validate.images, validate.features, cases))


@pytest.mark.parametrize(
    ("kind", "learned_from", "judge", "said"),
    [
        ("phantoms", "phantoms: 302 cases, recipe 2", "phantoms", ["36 training cases of the 302 that"]),
        ("oasis", "oasis: 302 cases", "oasis", ["36 training cases of the 302 that"]),
        ("oasis", "", "oasis", ["36 training cases; the weights do not say how many they saw"]),
        ("oasis", "phantoms: 302 cases", "phantoms, 302 training cases",
         ["saw none of them: they learned from phantoms: 302 cases", "phantoms and judges other data"]),
    ],
)  # fmt: skip
def test_a_report_says_how_far_it_searched_and_whether_its_judge_fits(
    tmp_path, kind, learned_from, judge, said
):
    report, location = Evaluation({}, {}, [], 36), DataLocation(tmp_path, kind)
    found = notes(report, {"data": learned_from} if learned_from else {}, location, {"data": judge})
    assert len(found) == len(said)
    assert all(part in line for part, line in zip(said, found)), found


# ---- the command --------------------------------------------------------------------------------------


@pytest.fixture
def command(splits, tmp_path, monkeypatch):
    """``evaluate`` on a folder that holds no phantoms, with small weights, ready to run."""
    found = dict(zip(("train", "validate", "test"), splits[0]))
    monkeypatch.setattr(evaluation, "load_split", lambda folder, _: found[folder.name.rsplit("_")[-1]])
    monkeypatch.setattr(evaluation, "evaluate", partial(evaluate, rounds=2))
    (tmp_path / "data" / "keras_png_slices_train").mkdir(parents=True)
    config = TrainConfig().replace(
        image_size=16, base_channels=8, channel_mult=(1, 2), attention_levels=(), T=20
    )
    weights = tmp_path / "small.safetensors"
    save_weights(weights, config.make_network(), config, {"data": "oasis: 302 cases"})
    return ["evaluate", str(weights), "--data", str(tmp_path / "data"), "--number", "100", "--steps", "2"]


def _not_json(word):
    raise AssertionError(f"{word} is no JSON")


def test_the_command_writes_a_report_and_overwrites_none(command, tmp_path, capsys):
    out = tmp_path / "new" / "report.v1"
    assert command_line.main([*command, "--out", str(out)]) == 0
    table, picture = out.with_name("report.v1.json"), out.with_name("report.v1.png")
    assert sorted(out.parent.iterdir()) == [table, picture]
    report = json.loads(table.read_text(encoding="utf-8"), parse_constant=_not_json)
    assert report["setting"] == "small.safetensors: 100 samples, ddim, 2 steps, seed 0; OASIS, 0 cases"
    assert list(report["rows"]) == ["generated", "held-out slices", "mean of training", "noise"]
    assert report["rows"]["generated"]["FID"] is None
    assert report["rows"]["held-out slices"]["KID"] < report["rows"]["generated"]["KID"]
    assert [note.split(":")[0] for note in report["notes"]] == [
        "copies were searched for among 4 training cases of the 302 that the weights saw",
        "the segmenter learned from phantoms and judges other data",
    ]
    printed = capsys.readouterr()
    assert [line for line in printed.err.splitlines() if line.startswith("note: ")] == [
        f"note: {note}" for note in report["notes"]
    ]
    assert f"generated         KID {report['rows']['generated']['KID']:8.3f}" in printed.out
    assert Image.open(picture).size == (1100, 1050)
    before = table.read_bytes(), picture.read_bytes()
    assert command_line.main([*command, "--out", str(out)]) == 1
    assert "nothing is overwritten" in capsys.readouterr().err
    assert (table.read_bytes(), picture.read_bytes()) == before


def test_a_segmenter_of_ones_own_judges(command, tmp_path, monkeypatch, capsys):
    save_segmenter(tmp_path / "s.safetensors", load_segmenter(), {"data": "oasis: 302 cases"})
    monkeypatch.setattr(command_line, "_draw", lambda *_: _images(100))
    row = {"KID": 0.0, "KID, low": 0.0, "KID, high": 1.0, "FID": None}
    bodies = dict.fromkeys(("ventricles", "CSF", "grey", "symmetry"), torch.rand(9))
    report = Evaluation({"generated": row}, {"real": bodies}, [], 36)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: report)
    own = [*command, "--segmenter", str(tmp_path / "s.safetensors"), "--out", str(tmp_path / "r")]
    assert command_line.main(own) == 0
    assert len(json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["notes"]) == 1  # no warning
    assert "note: the segmenter" not in capsys.readouterr().err


def test_what_cannot_be_judged_is_said_before_anything_is_drawn(
    command, phantoms, tmp_path, monkeypatch, capsys
):
    def drawn(*_):
        raise AssertionError("it was drawn first")

    monkeypatch.setattr(command_line, "_draw", drawn)
    for more, message in (
        (["--number", "99"], "--number 99: give at least 100"),
        (["--out", str(tmp_path)], f"{tmp_path} is a folder"),
        (["--out", f"{tmp_path}/small.safetensors/r"], "small.safetensors is a file, not a folder"),
        (["--seed", "-1"], "seed is -1"),
        (["--steps", "21"], "--steps 21: give 1 to 20"),
        (["--segmenter", str(tmp_path / "small.safetensors")], "holds no segmenter"),
        (["--data", str(tmp_path / "nowhere")], "nowhere does not exist"),
    ):
        assert command_line.main([*command, "--out", str(tmp_path / "r"), *more]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    monkeypatch.setattr(evaluation, "load_split", load_split)
    assert command_line.main([*command, "--out", str(tmp_path / "r"), "--data", str(phantoms.root)]) == 1
    assert "the validate split has 4 slices of 1 cases" in capsys.readouterr().err
    shutil.copytree(phantoms.train, tmp_path / "data" / phantoms.train.name, dirs_exist_ok=True)
    assert command_line.main([*command, "--out", str(tmp_path / "r")]) == 1
    assert "keras_png_slices_validate" in capsys.readouterr().err
