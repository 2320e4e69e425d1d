"""The parts fit together: a conditional model of discs by the same loop, files and samplers."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import oasis_helpers
from oasis_helpers.conditions import Factor, Label, Tokens
from oasis_helpers.sampling import clipped, guided, sample_images
from oasis_helpers.training import TrainConfig, load_weights, save_weights, train

SIZE = 16
CONDITIONS = {"bright": Label(2), "radius": Factor(2, 6), "where": Tokens(vocabulary=4, length=2, layers=1)}
SHIFT = torch.tensor([-2, 2, -2, 2])  # words: up, down, left, right


class Discs:
    """A disc on black: its brightness a label, its radius a number, its place two words."""

    fingerprint = "512 discs"

    def __init__(self, count=512):
        drawn = torch.Generator().manual_seed(0)
        self.y = {
            "bright": torch.randint(0, 2, (count,), generator=drawn),
            "radius": 2 + 4 * torch.rand(count, generator=drawn),
            "where": torch.randint(0, 2, (count, 2), generator=drawn) + torch.tensor([0, 2]),
        }
        row, column = (SHIFT[self.y["where"][:, i]].reshape(-1, 1, 1) for i in (0, 1))
        place = torch.arange(SIZE) - (SIZE - 1) / 2
        distance = ((place[:, None] - row) ** 2 + (place - column) ** 2).sqrt()
        inside = (self.y["radius"].reshape(-1, 1, 1) - distance + 0.5).clamp(0, 1)
        self.images = (2 * inside * (0.4 + 0.6 * self.y["bright"].reshape(-1, 1, 1)) - 1)[:, None]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, picked):
        return self.images[picked], {name: values[picked] for name, values in self.y.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = TrainConfig(steps=300, batch_size=32, lr=3e-3, warmup=20, ema_decay=0.98).replace(
        image_size=SIZE, base_channels=16, channel_mult=(1, 2), attention_levels=(1,), conditions=CONDITIONS
    )
    *_, state = train(config, Discs(), device="cpu")
    path = tmp_path_factory.mktemp("discs") / "discs.safetensors"
    save_weights(path, state.ema.model, config)
    return load_weights(path)


def test_discs_come_as_asked_for(trained):
    bright, radius, down = (v.flatten() for v in torch.meshgrid(*[torch.arange(2)] * 3, indexing="ij"))
    words = torch.stack([down, 3 - down], 1)  # up and right, or down and left
    y = {"bright": bright, "radius": 3.0 + 2 * radius, "where": words}
    images = sample_images(clipped(guided(trained, 2.0)), 8, method="dpm_solver", steps=15, y=y)[:, 0]
    light = (images + 1) / 2
    area, peak = (light > 0.2).float().sum((1, 2)), light.flatten(1).quantile(0.97, dim=1)
    centre = (light * torch.arange(SIZE)[:, None]).sum((1, 2)) / light.sum((1, 2)) - (SIZE - 1) / 2
    assert peak[bright == 1].min() > peak[bright == 0].max() + 0.15  # true: 1 and 0.4
    assert area[radius == 1].min() > area[radius == 0].max()
    assert centre[down == 1].min() > 0.4 > -0.4 > centre[down == 0].max()  # true: 2 and −2
    some = sample_images(clipped(guided(trained, 2.0)), 8, method="ddim", steps=15, y={"radius": y["radius"]})
    assert some.isfinite().all()  # what is left out is "nothing"


# ---- the house ----------------------------------------------------------------------------------

# The order of the notebooks: no module imports one of a later notebook.
COURSE = ("data", "diffusion", "unet", "conditions", "training", "sampling", "evaluation")


def _imports():
    """Module → the modules of the package that it needs to be imported, by name."""
    root, found = Path(oasis_helpers.__file__).parent, {}
    for path in root.rglob("*.py"):
        place = list(path.relative_to(root).with_suffix("").parts)
        package = place[:-1]
        name = ".".join(package if place[-1] == "__init__" else place)
        needed = found.setdefault(name, set())
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # at the top, not in functions
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
                needed.add(".".join(part for part in base if part))
    return found


def test_imports_run_in_no_circle():
    found = _imports()
    known = {name: {n for n in needed if n in found and n != name} for name, needed in found.items()}
    order = list(TopologicalSorter(known).static_order())  # CycleError if there is one
    assert len(order) == len(found) > 25


def test_no_module_imports_one_of_a_later_notebook():
    for name, needed in _imports().items():
        own = name.split(".")[0]
        if own in COURSE:
            tops = {n.split(".")[0] for n in needed} & set(COURSE)
            later = {n for n in tops if COURSE.index(n) > COURSE.index(own)}
            assert not later, f"{name} imports {later}"
