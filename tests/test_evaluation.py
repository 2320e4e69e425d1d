import json
import shutil
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image
from scipy.stats import mannwhitneyu
from torchmetrics.image.kid import KernelInceptionDistance

from oasis_helpers import __main__ as command_line
from oasis_helpers import evaluation
from oasis_helpers.data import load_masks, load_slices, to_unit_range
from oasis_helpers.evaluation import (
    PIXEL,
    Evaluation,
    Memorisation,
    Real,
    Segmenter,
    Split,
    anatomy,
    anatomy_distances,
    bootstrap,
    check_images,
    check_real,
    dice,
    embed,
    evaluate,
    fid,
    kid,
    kid_of,
    load_real,
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
from oasis_helpers.intake import phantoms as intake
from oasis_helpers.layout import SPLITS, DataLocation
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
    assert found.min() > 0.8  # a sulcus is thinner than a pixel here
    assert found[1:].mean() > 0.85


def test_the_shipped_features_tell_real_from_spoilt(phantoms):
    network = load_segmenter()
    images = to_unit_range(load_slices(phantoms.train, 64))
    features = embed(images, network)
    assert features.shape == (8, network.num_features)
    assert features.abs().mean() < 3  # standardised
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    assert (embed(blurred, network) - features).abs().mean() > 0.3


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


def test_kid_is_that_of_torchmetrics_where_every_image_is_its_own_head():
    x, y = _points(40, dimensions=6), _points(40, 0.5, seed=1, dimensions=6)
    network = torch.nn.Identity()
    network.num_features = 6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        metric = KernelInceptionDistance(network, subsets=1, subset_size=40)  # the subset is the whole
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert kid(x, y)[0] == pytest.approx(float(metric.compute()[0]), rel=1e-4)


def _kid_by_hand(x, y, heads):
    """Pair by pair, and again without each head."""

    def value(x, of_x, y, of_y):
        def kernel(a, b):
            return (float(a @ b) / len(a) + 1) ** 3

        def within(z, of):
            found = [kernel(a, b) for a, i in zip(z, of) for b, j in zip(z, of) if i != j]
            return sum(found) / len(found)

        return (
            within(x, of_x)
            + within(y, of_y)
            - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
        )

    of_x, of_y = map(torch.as_tensor, heads)
    variance = 0
    for of in (of_x, of_y):
        found = []
        for head in of.unique():
            i, j = (of_x != head, of_y == of_y) if of is of_x else (of_x == of_x, of_y != head)
            found.append(value(x[i], of_x[i], y[j], of_y[j]))
        found = torch.tensor(found, dtype=torch.double)
        variance += (len(found) - 1) * float(found.var(correction=0))
    return value(x, of_x, y, of_y), variance**0.5


def test_kid_and_its_error_leave_out_pairs_of_one_head():
    heads = [7, 7, 7, 3, 3, 9, 12], [1, 2, 2, 4, 4]
    x, y = _points(7).double(), _points(5, 0.5, seed=1).double()
    wanted = _kid_by_hand(x, y, heads)
    assert kid(x, y, cases=heads) == pytest.approx(wanted)
    assert kid(x, y)[0] != pytest.approx(wanted[0], rel=0.001)
    # a large set is summed in parts
    many = x.repeat(300, 1), y
    cases = [head + 100 * (i // 7) for i, head in enumerate(heads[0] * 300)], heads[1]
    indices = torch.arange(2100), torch.arange(5)
    assert kid_of(*many, cases=cases)(*indices) == pytest.approx(kid(*many, cases=cases)[0])


def _heads_of_two(seed, heads=40):
    """Two slices each of so many heads: (2 · heads, 4)."""
    return _points(heads, seed=seed).repeat_interleave(2, 0) + 0.3 * _points(2 * heads, seed=10_000 + seed)


def test_kid_of_one_distribution_is_zero_in_the_mean_and_its_error_is_its_spread():
    cases = torch.arange(40).repeat_interleave(2).tolist()
    found = [
        (kid(x, y, cases=(cases, cases)), kid(x, y)[0])
        for x, y in ((_heads_of_two(2 * n), _heads_of_two(2 * n + 1)) for n in range(300))
    ]
    left_out, all_pairs = torch.tensor([f[0][0] for f in found]), torch.tensor([f[1] for f in found])
    assert abs(left_out.mean()) < 3 * left_out.std() / 300**0.5
    assert all_pairs.mean() > 10 * all_pairs.std() / 300**0.5  # what two slices of a head do to it
    error = torch.tensor([f[0][1] for f in found]).mean()
    assert left_out.std() < error < 2 * left_out.std()  # √2 too large at 0, as the jackknife is there


def test_the_error_of_kid_is_its_spread_where_sets_differ():
    cases = torch.arange(40).repeat_interleave(2).tolist()
    found = torch.tensor(
        [kid(_heads_of_two(2 * n), 0.7 + _heads_of_two(2 * n + 1), cases=(cases, cases)) for n in range(200)]
    )
    assert found[:, 1].mean() == pytest.approx(float(found[:, 0].std()), rel=0.25)
    assert found[:, 0].min() > 0


def test_kid_of_too_few_heads_is_refused():
    with pytest.raises(ValueError, match="50 real images of 2 heads and 9 generated of 9 are too few"):
        kid(_points(50), _points(9), cases=([1, 2] * 25, range(9)))
    with pytest.raises(ValueError, match="there are 50 images and 49 cases"):
        kid(_points(50), _points(9), cases=(range(49), range(9)))


def test_kid_of_a_resample_leaves_out_a_head_that_meets_itself():
    x, y = _points(6).double(), _points(4, 1, seed=1).double()
    cases = [0, 0, 1, 1, 2, 2], range(4)
    distance = kid_of(x, y, cases=cases)
    assert distance(torch.arange(6), torch.arange(4)) == pytest.approx(kid(x, y, cases=cases)[0])
    i, j = torch.tensor([0, 1, 0, 1, 4, 5, 2, 3]), torch.tensor([3, 0, 3, 2])
    drawn = [cases[0][k] for k in i.tolist()], j.tolist()
    assert distance(i, j) == pytest.approx(kid(x[i], y[j], cases=drawn)[0])
    nothing = distance(torch.tensor([0, 1, 0, 1]), j)
    assert nothing != nothing  # NaN: one head has no pair
    low, high = bootstrap(distance, *cases, rounds=50)  # and is no draw that counts
    assert low < high


def test_the_interval_of_kid_holds_zero_for_one_distribution():
    x, y, cases = _heads_of_two(0), _heads_of_two(1), torch.arange(40).repeat_interleave(2).tolist()
    low, high = bootstrap(kid_of(x, y, cases=(cases, cases)), cases, cases)
    assert low < 0 < high
    low, high = bootstrap(kid_of(x, y + 1, cases=(cases, cases)), cases, cases)
    assert 0 < low < high


def test_a_difference_is_narrower_with_one_reference():
    real, a, b = _points(60), _points(60, 0.6, seed=1), _points(60, 0.6, seed=2)
    first, second, alone = kid_of(real, a), kid_of(real, b), range(60)
    low, high = bootstrap(lambda i, j, k: first(i, j) - second(i, k), alone, alone, alone)
    assert low < 0 < high
    apart = bootstrap(lambda i, j, i2, k: first(i, j) - second(i2, k), alone, alone, alone, alone)
    assert high - low < 0.9 * (apart[1] - apart[0])


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
        assert (found[name] - values).abs().mean() < 0.03 * (100 if name == "brain" else 1), name
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
    train, reference, unseen, fresh = (_points(400, seed=seed, dimensions=8) for seed in range(4))
    copies = train[::4] + 0.05 * _points(100, seed=9, dimensions=8)
    caught = memorisation(copies, train, reference, unseen)
    assert caught.share > 0.95
    assert caught.interval()[0] > 0.9
    assert caught.closer > 0.95
    innocent = memorisation(fresh, train, reference, unseen)
    for value, (low, high) in (
        (innocent.expected, innocent.interval()),
        (0.5, innocent.closer_interval()),
    ):
        assert low < value < high < value + 0.1
    assert innocent.closer_interval()[0] < innocent.closer < innocent.closer_interval()[1]
    found = memorisation(torch.cat([fresh, copies]), train, reference, unseen)
    assert torch.equal(found.nearest[400:], torch.arange(0, 400, 4))
    assert found.flagged[400:].float().mean() > 0.95
    with pytest.raises(ValueError, match="at least 100"):
        memorisation(fresh, train, reference, unseen[:50])


def test_every_image_a_little_nearer_is_heard_where_none_is_a_copy():
    train, reference, unseen = (_points(400, seed=seed, dimensions=8) for seed in range(3))
    leaning = train[:200] + 0.7 * _points(200, seed=9, dimensions=8)
    found = memorisation(leaning, train, reference, unseen)
    assert found.share < 0.6
    assert found.closer > 0.65
    assert found.closer_interval()[0] > 0.6


def test_closer_is_the_statistic_of_mann_and_whitney():
    ratio, unseen = (_points(n, seed=n, dimensions=1)[:, 0].round(decimals=1) for n in (30, 40))  # with ties
    found = Memorisation(ratio, torch.zeros(30).long(), unseen, (range(30), range(40)))
    assert found.closer == pytest.approx(mannwhitneyu(unseen.numpy(), ratio.numpy()).statistic / (30 * 40))


def _searches(heads, slices, rounds):
    """What searches find where nothing was copied; half the variance of a ratio is its head's."""
    for seed in range(rounds):
        drawn = torch.Generator().manual_seed(seed)
        sets = [
            torch.randn((n, 1), generator=drawn) + torch.randn((n, slices), generator=drawn) for n in heads
        ]
        cases = [torch.arange(n).repeat_interleave(slices) for n in heads]
        ratio, unseen = (s.flatten().double() for s in sets)
        yield Memorisation(ratio, torch.zeros(len(ratio)).long(), unseen, cases)


def test_the_rate_of_copies_is_the_nominal_one_and_in_its_interval():
    """Also with many images, where the threshold is what is uncertain, and with several slices of a head."""
    found = list(_searches((2000, 300), 1, 300))
    shares = torch.tensor([f.share for f in found])
    assert shares.mean() == pytest.approx(0.01, abs=3 * float(shares.std()) / 300**0.5)
    assert sum(low <= 0.01 <= high for low, high in (f.interval() for f in found)) > 0.92 * 300
    several = [f.interval() for f in _searches((30, 20), 8, 200)]
    assert sum(low <= 0.01 <= high for low, high in several) > 0.92 * 200


def test_the_nearest_is_found_over_several_parts():
    among, images = _points(30), _points(600, seed=1)
    distance, index = nearest_images(images, among)
    all_distances = (images.double()[:, None] - among.double()).norm(dim=2)
    assert torch.equal(index, all_distances.argmin(1))
    assert torch.allclose(distance.double(), all_distances.min(1).values)


# ---- all of it --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(phantoms):
    """Training and the three real sets: blends of two slices of the small set, two images a head."""
    network = load_segmenter()
    slices = torch.cat([to_unit_range(load_slices(phantoms.folder(s), 64)) for s in SPLITS])

    def heads(seed, count):
        drawn = torch.Generator().manual_seed(seed)
        first, second = torch.randint(0, len(slices), (2, count), generator=drawn)
        share = torch.rand((count, 1, 1, 1), generator=drawn)
        images = (share * slices[first] + (1 - share) * slices[second]).repeat_interleave(2, 0)
        images = (images + 0.05 * torch.randn(images.shape, generator=drawn)).clamp(-1, 1)
        cases = torch.arange(count).repeat_interleave(2).tolist()
        return Split(images, embed(images, network), cases)

    return heads(0, 60), Real(heads(1, 60), heads(2, 50), heads(3, 50)), network


@pytest.fixture
def quick(monkeypatch):
    """A report without its slow figures, for tests that do not look at them."""
    report = "oasis_helpers.evaluation.report"
    monkeypatch.setattr(f"{report}.segment", lambda images, _: torch.zeros(len(images), 64, 64).long())
    monkeypatch.setattr(f"{report}.ms_ssim", lambda _: 0.5)


ROWS = ["generated", "perfect generator", "by heart", "mean of training", "noise"]


def test_a_report_passes_its_controls_and_catches_copies(sets):
    train, real, network = sets
    copied = real.others.images.roll(1, 3)
    copied[:40] = train.images[:40]
    found = evaluate(copied, train, real, network, rounds=40)
    assert list(found.rows) == ROWS
    generated, perfect, by_heart, mean, noise = found.rows.values()
    assert noise["KID"] > 5 * generated["KID"]
    alone = real.reference.cases, range(len(copied))
    assert generated["KID"] == kid(real.reference.features, embed(copied, network), cases=alone)[0]
    assert perfect["KID, low"] < 0 < perfect["KID, high"]
    assert perfect["KID above perfect"] is perfect["KID above perfect, low"] is None
    assert mean["KID above perfect"] == pytest.approx(mean["KID"] - perfect["KID"])
    assert 0 < noise["KID above perfect, low"] < noise["KID above perfect"] < noise["KID above perfect, high"]
    assert generated["FID"] is None  # 100 images, 256 dimensions
    assert mean["MS-SSIM of pairs"] == pytest.approx(1, abs=1e-3)
    assert perfect["recall"] > by_heart["recall"] + 0.2
    for kind in ("images", "features"):
        name = f"nearer to training, {kind}"
        assert perfect[name] < 0.15
        assert perfect[f"closer than unseen, {kind}"] == pytest.approx(0.5, abs=0.15)
        assert by_heart[f"{name}, low"] > 0.8
        assert by_heart[f"closer than unseen, {kind}, low"] > 0.9
        assert generated[name] > 0.3
        assert generated[f"{name}, low"] > 0.01
    first = anatomy(segment(real.reference.images[:1], network))["brain"]
    assert found.anatomy["real"]["brain"][0] == first[0]
    assert found.searched == 60
    assert len(found.pairs) == 8
    for picture, nearest in found.pairs:
        assert torch.equal(picture, nearest)
    said = " ".join(notes(found, {}, DataLocation(None, "phantoms"), {}))
    assert "KID" not in said
    assert "not caught" not in said


def test_every_row_counts_equally_many_images(sets, quick, monkeypatch):
    train, real, network = sets
    seen = []

    def counted(real, generated, *_, cases):
        seen.append((len(real), len(generated), *map(len, cases)))
        return {}

    monkeypatch.setattr("oasis_helpers.evaluation.report.precision_recall", counted)
    found = evaluate(train.images.roll(1, 3), train, real, network, rounds=2)
    assert seen == [(100,) * 4] * len(ROWS)  # 120 samples and a reference of 120, but 100 of other heads
    assert all(len(values["brain"]) == 100 for values in found.anatomy.values())


def test_cases_of_unlike_size_can_be_drawn_again(sets, quick):
    train, real, network = sets
    unlike = Split(real.reference.images, real.reference.features, [0] * 100 + [1] * 10 + [2] * 10)
    found = evaluate(train.images, train, Real(unlike, real.unseen, real.others), network, rounds=5)
    assert all(row["KID, low"] <= row["KID, high"] for row in found.rows.values())


def test_an_index_takes_rows_of_a_whole_split(sets):
    train = sets[0]
    picked = train[torch.tensor([5, 2])]
    assert torch.equal(picked.images, train.images[[5, 2]])
    assert torch.equal(picked.features, train.features[[5, 2]])
    assert picked.cases == [2, 1]


@pytest.mark.parametrize("kind", ["phantoms", "oasis"])
def test_the_real_sets_share_no_head(kind, phantoms, monkeypatch):
    held_out = {"validate": [1, 1, 2], "test": [4, 5, 5, 6, 7, 7, 8, 9]}
    monkeypatch.setattr(intake, "fresh_heads", lambda: phantoms)

    def load(folder, _):
        cases = held_out[folder.name.rsplit("_")[-1]]
        return Split(torch.tensor(cases)[:, None], torch.tensor(cases)[:, None], cases)

    monkeypatch.setattr("oasis_helpers.evaluation.report.load_split", load)
    real = load_real(DataLocation(phantoms.root, kind), None)
    wanted = ([4, 5, 5, 6], [7, 7], [8, 9]) if kind == "phantoms" else ([1, 1, 2], [4, 5, 5, 6], [7, 7, 8, 9])
    assert tuple(split.cases for split in vars(real).values()) == wanted
    for split in vars(real).values():
        assert split.images[:, 0].tolist() == split.features[:, 0].tolist() == split.cases


def test_a_control_that_failed_is_said():
    perfect = {"KID": 0.2, "KID, low": 0.1, "KID, high": 0.3}
    by_heart = {}
    for kind in ("images", "features"):
        perfect |= dict(
            zip((f"nearer to training, {kind}{e}" for e in ("", ", low", ", high")), (0.01, 0, 0.03))
        )
        by_heart |= {f"nearer to training, {kind}, low": 0.9}

    def said(of_perfect=(), of_by_heart=()):
        rows = {
            "perfect generator": perfect | dict(of_perfect),
            "by heart": by_heart | dict(of_by_heart),
        }
        return notes(Evaluation(rows, {}, [], 36), {}, DataLocation(None, "oasis"), {})[1:]

    assert said({"KID, low": -0.1}) == []
    (line,) = said()
    assert "a perfect generator, have a KID of 0.2 (95 %: 0.1 to 0.3) and should have 0" in line
    (_, line) = said({"nearer to training, images": 0.05, "nearer to training, images, low": 0.02})
    assert "by images, the share of a perfect generator's slices nearer to training is 0.05" in line
    (_, line) = said((), {"nearer to training, features, low": 0.005})
    assert "by features, a network that learned 8 training slices by heart is not caught" in line
    assert said({"KID, low": None}) == []  # no interval, no verdict


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
def test_samples_that_cannot_be_judged_are_refused(sets, images, message):
    with pytest.raises(ValueError, match=message):
        evaluate(images, *sets)


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
        ([1, 2, 3] * 33, "99 slices of 3 cases: a report needs 100 of 3 cases"),
        ([1, 2] * 60, "120 slices of 2 cases"),
        ([1] * 116 + [2, 2, 3, 3], "120 slices of 3 cases: .* and for each of them 5 of other cases"),
    ],
)
@pytest.mark.parametrize(
    ("name", "place"), [("reference", "validate split"), ("unseen", "test split"), ("others", "test split")]
)
def test_too_few_slices_to_compare_with_are_refused(sets, cases, message, name, place):
    real = sets[1]
    check_real(real)
    with pytest.raises(ValueError, match=f"{place}, has {message}"):
        check_real(replace(real, **{name: Split(real.others.images, real.others.features, cases)}))


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
def command(sets, quick, tmp_path, monkeypatch):
    """``evaluate`` on a folder that holds no phantoms, with small weights, ready to run."""
    train, real, _ = sets
    monkeypatch.setattr(evaluation, "load_split", lambda *_: train)
    monkeypatch.setattr(evaluation, "load_real", lambda *_: real)
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
    assert report["setting"] == (
        "small.safetensors: 100 samples, dpm_solver, 2 steps, seed 0; OASIS, 0 cases; "
        "compared with 60 other heads"
    )
    assert list(report["rows"]) == ROWS
    assert report["rows"]["generated"]["FID"] is None
    assert report["rows"]["perfect generator"]["KID"] < report["rows"]["generated"]["KID"]
    searched, judge, *failed = report["notes"]
    assert searched == "copies were searched for among 60 training cases of the 302 that the weights saw"
    assert judge.startswith("the segmenter learned from phantoms and judges other data")
    assert all(note.startswith("a control failed: ") for note in failed)
    printed = capsys.readouterr()
    assert [line for line in printed.err.splitlines() if line.startswith("note: ")] == [
        f"note: {note}" for note in report["notes"]
    ]
    assert f"generated         KID {report['rows']['generated']['KID']:8.3f}" in printed.out
    assert Image.open(picture).size == (1870, 2150)
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
    monkeypatch.setattr(evaluation, "load_real", load_real)
    monkeypatch.setattr(intake, "fresh_heads", lambda: phantoms)
    assert command_line.main([*command, "--out", str(tmp_path / "r"), "--data", str(phantoms.root)]) == 1
    assert "has 0 slices of 0 cases: a report needs 100" in capsys.readouterr().err
    shutil.copytree(phantoms.train, tmp_path / "data" / phantoms.train.name, dirs_exist_ok=True)
    assert command_line.main([*command, "--out", str(tmp_path / "r")]) == 1
    assert "keras_png_slices_validate" in capsys.readouterr().err
