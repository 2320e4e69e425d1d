"""What is known of a data set reaches a network: the tables of phantoms and people as conditions."""

import shutil

import numpy as np
import pytest
import torch

from oasis_helpers.conditions import (
    HEADS,
    PHANTOM_CONDITIONS,
    ConditionedSlices,
    Factor,
    Label,
    load_conditioned,
)
from oasis_helpers.data import find_data, load_factors, load_slices
from oasis_helpers.intake.phantoms import _Causes
from oasis_helpers.seeds import generator
from oasis_helpers.training import PROFILES, Denoising, fingerprint

TABLE = "ID,M/F,Age,CDR\nOAS1_0001_MR1,F,74,0.5\nOAS1_0002_MR1,M,21,\n"


@pytest.fixture
def people(phantoms, tmp_path):
    """The phantoms as if they were people, without a table yet."""
    root = shutil.copytree(phantoms.root, tmp_path / "people")
    (root / "phantoms.json").unlink()
    (root / "phantoms.csv").unlink()
    return root


def test_phantoms_have_height_atrophy_and_head(phantoms):
    data, factors = load_conditioned(phantoms, 64), load_factors(phantoms)
    assert data.conditions == PHANTOM_CONDITIONS == dict(PROFILES["guided"].objective.conditions)
    assert torch.equal(data.images, load_slices(phantoms.train, 64))
    assert data.y["height"].tolist() == [0, 1, 2, 3] * 2
    wanted = [factors[case].atrophy for case in (1, 2) for _ in range(4)]
    assert data.y["atrophy"].tolist() == pytest.approx(wanted, abs=1e-6)
    scales = [factors[case].head_scale for case in (1, 2)]
    sizes = [sum(scale > bound for bound in (0.9755, 0.9885)) for scale in scales]
    assert data.y["head"].tolist() == [sizes[0]] * 4 + [sizes[1]] * 4
    held_out = load_conditioned(phantoms, 64, "test")
    assert held_out.y["atrophy"].tolist() == pytest.approx([factors[441].atrophy] * 4, abs=1e-6)


def test_a_third_of_all_phantoms_has_each_size_of_head():
    scales = [_Causes.draw(np.random.default_rng([0, case])).scale for case in range(600)]
    sizes = torch.tensor([sum(s > bound for bound in (0.9755, 0.9885)) for s in scales])
    shares = sizes.bincount(minlength=len(HEADS)) / len(sizes)
    assert shares.min() > 0.27
    assert shares.max() < 0.40


def test_people_have_what_their_table_says(people):
    (people / "subjects.csv").write_text(TABLE)
    data = load_conditioned(find_data(people), 64)
    assert list(data.conditions) == ["height", "age", "sex", "cdr"]
    assert data.y["height"].tolist() == [0, 1, 2, 3] * 2
    assert data.y["age"].tolist() == [74.0] * 4 + [21.0] * 4
    assert data.y["sex"].tolist() == [0] * 4 + [1] * 4
    assert data.y["cdr"].tolist() == [1] * 4 + [-1] * 4  # 0.5, and not rated
    (people / "subjects.csv").write_text(TABLE.rpartition("OAS1")[0])
    without = load_conditioned(find_data(people), 64)
    assert without.y["height"].tolist() == [0, 1, 2, 3] * 2
    assert without.y["age"][4:].isnan().all()
    assert without.y["sex"].tolist() == [0] * 4 + [-1] * 4


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "has no subjects.csv, so nothing is known of its cases. Convert OASIS with --subjects"),
        ("ID,M/F,Age,CDR\nOAS1_0077_MR1,F,74,0.5\n", "says nothing of case 1 or any other that is here"),
        (TABLE.replace("74", "7"), "age runs from 7 to 21: this network knows 18 to 98"),
    ],
)
def test_a_table_that_does_not_fit_is_named(people, table, message):
    if table:
        (people / "subjects.csv").write_text(table)
    with pytest.raises(ValueError, match=message):
        load_conditioned(find_data(people), 64)


def test_phantoms_without_their_table(phantoms, tmp_path):
    root = shutil.copytree(phantoms.root, tmp_path / "copy")
    (root / "phantoms.csv").unlink()
    with pytest.raises(ValueError, match=r"has no phantoms.csv, so nothing is known"):
        load_conditioned(find_data(root), 64)


def test_rows_of_images_and_conditions_stay_together():
    y = {"height": torch.arange(10.0), "head": torch.arange(10) % 3}
    conditions = {"height": Factor(0, 31), "head": Label(3)}
    images = torch.arange(10, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    data = ConditionedSlices(images, y, conditions)
    picked, told = data[torch.tensor([7, 2])]
    assert picked.flatten().tolist() == told["height"].tolist() == [7, 2]
    assert told["head"].tolist() == [1, 2]
    assert len(data) == 10
    moved = ConditionedSlices(images, y | {"height": y["height"].flip(0)}, conditions)
    assert fingerprint(data).startswith("10 images, sha256")
    assert fingerprint(moved) != fingerprint(data)  # a run is not gone on with under other conditions


def test_conditions_are_dropped_together_and_each_alone():
    count, drop = 20_000, 0.2
    images = torch.zeros(count, 1, 1, 1)
    told = {"height": torch.ones(count), "head": torch.ones(count, dtype=torch.long)}
    objective = Denoising(image_size=1, conditions=PHANTOM_CONDITIONS, drop=drop)

    def dropped(*names):
        y = objective.draw((images, {name: told[name] for name in names}), generator(0))["y"]
        found = {"height": lambda v: v.isnan(), "head": lambda v: v < 0}
        return [found[name](y[name]) for name in names]

    (alone,) = dropped("head")
    assert alone.float().mean() == pytest.approx(drop, abs=0.02)
    height, head = dropped("height", "head")
    assert height.float().mean() == pytest.approx(1 - (1 - drop) ** 2, abs=0.02)
    assert (height & ~head).float().mean() == pytest.approx((1 - drop) ** 2 * drop, abs=0.02)
    assert (height & head).float().mean() == pytest.approx(drop + (1 - drop) * drop**2, abs=0.02)
    assert (told["height"] == 1).all()  # the data stays as it was
