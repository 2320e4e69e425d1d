import pytest
import torch

from oasis_helpers.data import load_masks, load_slices, to_unit_range
from oasis_helpers.evaluation import (
    Segmenter,
    check_images,
    dice,
    embed,
    kid,
    load_segmenter,
    save_segmenter,
    segment,
    train_segmenter,
)
from oasis_helpers.training import WEIGHTS


def _images(count=4, seed=0):
    return torch.rand((count, 1, 64, 64), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _masks_folder(split_folder):
    return split_folder.parent / split_folder.name.replace("slices_", "slices_seg_")


def test_dice_by_hand():
    predicted, truth = torch.tensor([[[0, 1], [1, 2]]]), torch.tensor([[[0, 1], [2, 2]]])
    found = dice(predicted, truth)
    assert torch.allclose(found[:3], torch.tensor([1.0, 2 / 3, 2 / 3]))
    assert found[3].isnan()  # class 3 is in neither


def test_masks_are_cut_and_scaled_like_slices(phantoms):
    slices, masks = load_slices(phantoms.train, 64), load_masks(_masks_folder(phantoms.train), 64)
    assert masks.shape == (8, 64, 64)
    assert masks.dtype == torch.uint8
    assert set(masks.unique().tolist()) == {0, 1, 2, 3}
    brightness = [float(slices[:, 0][masks == tissue].float().mean()) for tissue in (1, 2, 3)]
    assert brightness == sorted(brightness)  # CSF, grey, white
    assert len(load_masks(_masks_folder(phantoms.train), 64, cases=1)) == 4


def test_the_shipped_segmenter_finds_the_tissues(phantoms):
    images = to_unit_range(load_slices(phantoms.test, 64))
    found = dice(segment(images, load_segmenter()), load_masks(_masks_folder(phantoms.test), 64))
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
    with pytest.raises(ValueError, match="subset_size"):
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


def test_a_segmenter_learns_repeatably_and_comes_back(phantoms, tmp_path):
    slices, masks = load_slices(phantoms.train, 64), load_masks(_masks_folder(phantoms.train), 64)
    runs = [list(train_segmenter(slices, masks, steps=12, batch_size=4)) for _ in range(2)]
    losses = [[loss for _, loss, _ in run] for run in runs]
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.9 * losses[0][0]
    model = runs[0][-1][2]
    images = to_unit_range(slices)
    features = embed(images, model)
    assert torch.allclose(features.mean(0), torch.zeros(model.num_features), atol=1e-4)
    save_segmenter(tmp_path / "s.safetensors", model, data="phantoms")
    assert torch.equal(embed(images, load_segmenter(tmp_path / "s.safetensors")), features)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_segmenter(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="holds no segmenter"):
        load_segmenter(WEIGHTS)


def test_features_do_not_depend_on_the_batch():
    model, images = Segmenter().eval(), _images(70)
    assert torch.allclose(embed(images, model)[:3], embed(images[:3], model), atol=1e-5)
