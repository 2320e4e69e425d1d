"""The recorded measurements are whole, and the tables of README and the model cards say what they say."""

import json
import re
import statistics
import sys

import pytest
from notebook_tools import ROOT

from oasis_helpers.evaluation import SEGMENTER
from oasis_helpers.training import PROFILES, WEIGHTS, read_header

BENCHMARKS = ROOT / "benchmarks"
README, CARD = ROOT / "README.md", WEIGHTS.with_suffix(".md")


def _recorded(name):
    return json.loads((BENCHMARKS / f"{name}.json").read_text())


@pytest.fixture
def module(monkeypatch):
    """A benchmark's script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield __import__
    for name in set(sys.modules) - before:
        if (BENCHMARKS / f"{name}.py").exists():
            del sys.modules[name]


def _row(path, name, count):
    """The ``count`` cells after the first of the one table row that has so many and begins with ``name``."""
    lines = [line.strip() for line in path.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    (cells,) = (row[1:] for row in rows if row[0] == name and len(row) == count + 1)
    return cells


def _says(cell, *values):
    """``cell`` holds these numbers and no other, each rounded as it is written there; else what it holds."""
    written = re.findall(r"\d[\d,]*(?:\.\d+)?", cell)
    assert len(written) == len(values), f"{cell!r} has {len(written)} numbers, not those of {values}"
    for text, value in zip(written, values):
        half = 0.5 * 10 ** -len(text.partition(".")[2])
        assert abs(float(text.replace(",", "")) - value) <= half + 1e-9, f"{cell!r} says {text}, not {value}"


def test_a_cell_is_compared_by_its_own_digits():
    _says("0.21 (0.09 to 0.78)", 0.2068, 0.0936, 0.7794)
    _says("14,822 steps", 14822)
    for cell, values in (("0.21", [0.2168]), ("0.21", [0.1]), ("0.21 ± 0.01", [0.21]), ("–", [0.21])):
        with pytest.raises(AssertionError):
            _says(cell, *values)


def test_every_script_fits_the_package(module):
    for script in BENCHMARKS.glob("*.py"):
        module(script.stem)


def test_ablations_are_whole(module):
    ablations, result = module("ablations"), _recorded("ablations")
    assert result["table"] == ablations.rows(result["runs"])
    now = json.loads(json.dumps(ablations.BASE.settings()))
    assert result["base"] == {name: now[name] for name in result["base"]}  # but for settings that came later
    settings = [(choice, setting) for choice, found in ablations.CHOICES.items() for setting in found]
    assert [(row["choice"], row["setting"]) for row in result["table"]] == settings
    assert all(len(row["kid"]) == len(ablations.SEEDS) for row in result["table"])
    assert result["floor"] < min(row["mean"] for row in result["table"])


def test_the_weights_that_ship_are_those_of_the_longest_run(module):
    minutes, result = module("minutes"), _recorded("minutes")
    assert list(result["runs"]) == [str(m) for m in minutes.MINUTES]
    for time, run in result["runs"].items():
        assert run["steps"] == int(60 * int(time) * result["steps per second"])
    distances = [run["KID"] for run in result["runs"].values()]
    assert distances == sorted(distances, reverse=True)
    steps = result["runs"][str(minutes.MINUTES[-1])]["steps"]
    header, laptop = read_header(WEIGHTS), PROFILES["laptop"]
    # "auto" was bf16 on the processor that trained them
    assert header.training == laptop.replace(steps=steps, precision="bf16").loop()
    theirs = json.loads(json.dumps(laptop.objective.settings()))
    assert header.settings == {name: theirs[name] for name in header.settings}
    (shorter,) = _row(CARD, "the same profile for 5 minutes, 2 minutes, 1 minute", 1)
    _says(shorter, *reversed(distances[:-1]))
    found = re.search(r"60 minutes samples reach (.*?) \(\[", " ".join(README.read_text().split()))
    _says(found[1], *distances)


def test_samplers_are_whole(module):
    samplers, result = module("samplers"), _recorded("samplers")
    assert [(r["method"], r["steps"], r["spacing"]) for r in result["rows"]] == samplers.WAYS
    assert all(row["low"] < row["high"] for row in [result["floor"], *result["rows"]])
    assert result["trained steps"] == str(read_header(WEIGHTS).training["steps"])
    (floor,) = _row(CARD, "slices of 17 other heads", 1)
    _says(floor, result["floor"]["KID"])
    found = {(row["method"], row["steps"]): row for row in result["rows"]}
    for name, way in (("DDIM", ("ddim", 20)), ("DPM-Solver++", ("dpm_solver", 10)), ("DDPM", ("ddpm", 1000))):
        row = found[way]
        (cell,) = _row(CARD, f"this network, {row['samples']} samples, {name}, {row['steps']:,} steps", 1)
        _says(cell, row["KID"])


# a row of the model card → the figures of a column of it
CARD_ROWS = {
    "KID (95 % interval by case)": lambda f: (f["KID"], f["KID, low"], f["KID, high"]),
    "FID (segmenter's features)": lambda f: (f["FID"],),
    "precision, recall (neighbours in other heads)": lambda f: (f["precision"], f["recall"]),
    "density, coverage": lambda f: (f["density"], f["coverage"]),
    "MS-SSIM of pairs": lambda f: (f["MS-SSIM of pairs"],),
    "nearer to training than the limit: pixels, features": lambda f: (
        100 * f["nearer to training, images"],
        100 * f["nearer to training, features"],
    ),
    "Wasserstein distance (deviations): ventricles, symmetry": lambda f: (
        f["anatomy: ventricles"],
        f["anatomy: symmetry"],
    ),
}


@pytest.mark.parametrize("name", CARD_ROWS)
def test_the_card_says_what_the_report_found(name):
    rows, figures = _recorded("evaluation")["rows"], CARD_ROWS[name]
    columns = ("weights that ship", "held-out slices", "mean of training", "noise")
    for column, cell in zip(columns, _row(CARD, name, 4)):
        values = figures(rows[column])
        _says(cell, *(values if "," in name or "(" in cell else values[:1]))  # the KID of noise stands alone


def test_the_card_has_the_loss_by_t():
    losses = _recorded("evaluation")["loss by t"]
    for name in ("held out", "training"):
        for cell, value in zip(_row(CARD, name, 11), [*losses[name], statistics.mean(losses[name])]):
            _says(cell, value)


def test_the_report_judges_what_ships_between_floor_and_ceiling():
    rows = _recorded("evaluation")["rows"]
    kid = {name: row["KID"] for name, row in rows.items()}
    assert kid["weights that ship"] < kid["5 minutes"] < kid["mean of training"] < kid["noise"]
    copies = {name: row["nearer to training, features"] for name, row in rows.items()}
    assert copies["weights that ship"] < 0.05 < 0.5 < copies["learned by heart"]
    words = r"(\S+ %) of the samples are nearer .*?heart, (\S+ %) are"
    found = re.search(words, README.read_text(), re.DOTALL)
    _says(found[1], 100 * copies["weights that ship"])
    _says(found[2], 100 * copies["learned by heart"])


def test_the_segmenters_card_has_its_dice():
    result = _recorded("segmenter")
    for split in ("validate", "test"):
        dice = result[f"Dice, {split}"].values()
        for cell, value in zip(_row(SEGMENTER.with_suffix(".md"), split, 4), dice):
            _says(cell, value)


# a row of README's tables → the network in the measurements
NETWORKS = {
    "this U-Net": "oasis_helpers",
    "diffusers `UNet2DModel`": "diffusers",
    "MONAI `DiffusionModelUNet`": "MONAI",
    "denoising-diffusion-pytorch `Unet`": "denoising-diffusion-pytorch",
}
RACED = ("KID", "FID", "precision", "coverage", "ventricles", "symmetry")


def test_every_network_had_the_same_minutes(module):
    race, result = module("time_to_quality"), _recorded("time_to_quality")
    names = list(module("networks").NETWORKS)
    assert sorted(result["runs"]) == sorted(result["parameters"]) == sorted(names)
    sizes = list(result["parameters"].values())
    assert max(sizes) < 1.1 * min(sizes)
    for name, runs in result["runs"].items():
        assert sorted(map(int, runs)) == list(race.SEEDS)
        assert {run["steps"] for run in runs.values()} == {int(300 * result["steps per second"][name])}


def test_readme_has_the_speeds():
    result = _recorded("networks")
    for name, network in NETWORKS.items():
        speeds = [
            result[precision][network][f"{what}, times the best peer"]
            for what in ("training", "sampling")
            for precision in ("fp32", "bf16")
        ]
        for cell, speed in zip(_row(README, name, 4), speeds):
            _says(cell, speed)


def test_this_network_is_ahead_in_the_mean_after_the_same_minutes():
    """README says so; more cannot be said of three runs with one order of slices and one noise."""
    race = _recorded("time_to_quality")["runs"]
    means = {
        name: {column: statistics.mean(run[column] for run in runs.values()) for column in RACED}
        for name, runs in race.items()
    }
    ours = means.pop("oasis_helpers")
    for column in ("KID", "FID", "ventricles", "symmetry"):
        assert ours[column] < min(found[column] for found in means.values()), column
    for column in ("precision", "coverage"):
        assert ours[column] > max(found[column] for found in means.values()), column


def test_readme_has_the_race():
    result = _recorded("time_to_quality")
    for name, network in NETWORKS.items():
        runs = list(result["runs"][network].values())
        steps, *cells = _row(README, name, 7)
        _says(steps, runs[0]["steps"])
        for column, cell in zip(RACED, cells):
            values = [run[column] for run in runs]
            _says(cell, statistics.mean(values), statistics.stdev(values))
    for column, cell in zip(RACED, _row(README, "slices of other heads", 7)[1:]):
        _says(cell, result["floor"][column])
