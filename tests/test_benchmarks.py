"""The recorded measurements are whole, and say what their own runs say."""

import json
import statistics
import sys

import pytest
from notebook_tools import ROOT

from oasis_helpers.training import PROFILES, WEIGHTS, read_header

BENCHMARKS = ROOT / "benchmarks"
README = (ROOT / "README.md").read_text(encoding="utf-8")
CARD = WEIGHTS.with_suffix(".md").read_text(encoding="utf-8")


def _recorded(name):
    return json.loads((BENCHMARKS / f"{name}.json").read_text())


def _table(text, header):
    """Row → column → cell of the one Markdown table in ``text`` whose first line begins with ``header``."""
    lines = text.splitlines()
    (start,) = (number for number, line in enumerate(lines) if line.startswith(header))
    _, *columns = _cells(lines[start])
    table = {}
    for line in lines[start + 2 :]:  # below the rule
        if not line.startswith("|"):
            break
        name, *cells = _cells(line)
        table[name] = dict(zip(columns, cells, strict=True))
    return table


def _cells(line):
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def test_a_cell_is_found_by_its_names():
    text = "| a | b | c |\n|---|---|---|\n| x | 1 | 2 |\n| y |  | 3 |\n\n| z | 4 | 5 |"
    assert _table(text, "| a |") == {"x": {"b": "1", "c": "2"}, "y": {"b": "", "c": "3"}}
    with pytest.raises(ValueError, match="not enough values"):
        _table(text, "| q |")


@pytest.fixture
def module(monkeypatch):
    """A benchmark's script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield __import__
    for name in set(sys.modules) - before:
        if (BENCHMARKS / f"{name}.py").exists():
            del sys.modules[name]


def test_ablations_are_whole(module):
    ablations, result = module("ablations"), _recorded("ablations")
    assert result["table"] == ablations.rows(result["runs"])
    base = json.loads(json.dumps(ablations.BASE.settings()))
    assert result["base"] == {name: base[name] for name in result["base"]}
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
    *short, last = (f"{distance:.2f}" for distance in distances)
    assert f"samples reach {', '.join(short)} and {last} (" in " ".join(README.split())
    shown = _table(CARD, "| KID of samples (segmenter's features, 35 held-out heads) |")
    assert shown["the same profile for 5 minutes, 2 minutes, 1 minute"][""] == ", ".join(reversed(short))
    header, laptop = read_header(WEIGHTS), PROFILES["laptop"]
    steps = result["runs"][str(minutes.MINUTES[-1])]["steps"]
    assert header.training == laptop.replace(steps=steps).loop()
    theirs = json.loads(json.dumps(laptop.objective.settings()))
    assert header.settings == {name: theirs[name] for name in header.settings}


def test_samplers_are_whole(module):
    samplers, result = module("samplers"), _recorded("samplers")
    assert [(r["method"], r["steps"], r["spacing"]) for r in result["rows"]] == samplers.WAYS
    assert all(row["low"] < row["high"] for row in [result["floor"], *result["rows"]])
    assert str(read_header(WEIGHTS).training["steps"]) == result["trained steps"]
    shown = _table(CARD, "| KID of samples (segmenter's features, 35 held-out heads) |")
    assert shown["slices of 17 other heads"][""] == f"{result['floor']['KID']:.2f}"
    kid = {(row["method"], row["steps"]): row["KID"] for row in result["rows"]}
    for row, way in (
        ("this network, 256 samples, DDIM, 20 steps", ("ddim", 20)),
        ("this network, 256 samples, DPM-Solver++, 10 steps", ("dpm_solver", 10)),
        ("this network, 128 samples, DDPM, 1,000 steps", ("ddpm", 1000)),
    ):
        assert shown[row][""] == f"{kid[way]:.2f}", row


def test_the_report_judges_what_ships_between_floor_and_ceiling(module):
    module("evaluation")  # imports: the script still fits the package
    rows = _recorded("evaluation")["rows"]
    kid = {name: row["KID"] for name, row in rows.items()}
    assert kid["weights that ship"] < kid["5 minutes"] < kid["mean of training"] < kid["noise"]
    copies = {name: row["nearer to training, features"] for name, row in rows.items()}
    assert copies["weights that ship"] < 0.05 < 0.5 < copies["learned by heart"]


def test_the_card_and_the_readme_say_what_the_report_says():
    rows, shown = _recorded("evaluation")["rows"], _table(CARD, "| | this network |")
    columns = {
        "this network": "weights that ship",
        "slices of 17 other heads": "held-out slices",
        "mean of training": "mean of training",
        "noise": "noise",
    }
    for column, name in columns.items():
        row = rows[name]
        cells = {
            "KID (95 % interval by case)": f"{row['KID']:.2f}",
            "FID (segmenter's features)": f"{row['FID']:.{1 if row['FID'] < 100 else 0}f}",
            "precision, recall (neighbours in other heads)": _two(row, "precision", "recall"),
            "density, coverage": _two(row, "density", "coverage"),
            "MS-SSIM of pairs": f"{row['MS-SSIM of pairs']:.2f}",
            "nearer to training than the limit: pixels, features": ", ".join(
                f"{100 * row[f'nearer to training, {of}']:.1f} %" if row[f"nearer to training, {of}"] else "0"
                for of in ("images", "features")
            ),
            "Wasserstein distance (deviations): ventricles, symmetry": _two(
                row, "anatomy: ventricles", "anatomy: symmetry"
            ),
        }
        if name in ("weights that ship", "held-out slices"):
            cells["KID (95 % interval by case)"] += f" ({row['KID, low']:.2f} to {row['KID, high']:.2f})"
        assert {line: shown[line][column] for line in cells} == cells, column
    words = " ".join(README.split())
    near = {name: 100 * row["nearer to training, features"] for name, row in rows.items()}
    assert f"{near['weights that ship']:.1f} % of the samples are nearer to training" in words
    assert f"eight slices by heart, {near['learned by heart']:.0f} % are" in words


def _two(row, *names):
    return ", ".join(f"{row[name]:.2f}" if row[name] else "0" for name in names)


def test_every_network_had_the_same_minutes(module):
    race, result = module("time_to_quality"), _recorded("time_to_quality")
    names = list(module("networks").NETWORKS)
    assert sorted(result["runs"]) == sorted(result["parameters"]) == sorted(names)
    sizes = list(result["parameters"].values())
    assert max(sizes) < 1.1 * min(sizes)
    for name, runs in result["runs"].items():
        assert sorted(map(int, runs)) == list(race.SEEDS)
        assert {run["steps"] for run in runs.values()} == {int(300 * result["steps per second"][name])}


def test_this_network_is_the_best_after_the_same_minutes():
    """README and notebook 6 claim it: its worst seed is better than the best seed of any other."""
    result = _recorded("time_to_quality")
    race, shown = result["runs"], _table(README, "| after five minutes, three seeds |")
    ours = race["oasis_helpers"].values()
    others = [run for name, runs in race.items() if name != "oasis_helpers" for run in runs.values()]
    for column in ("KID", "FID", "ventricles", "symmetry"):
        assert max(run[column] for run in ours) < min(run[column] for run in others), column
    for column in ("precision", "coverage"):
        assert min(run[column] for run in ours) > max(run[column] for run in others), column
    rows = {
        "this U-Net": "oasis_helpers",
        "diffusers `UNet2DModel`": "diffusers",
        "MONAI `DiffusionModelUNet`": "MONAI",
        "denoising-diffusion-pytorch `Unet`": "denoising-diffusion-pytorch",
    }
    assert sorted(rows.values()) == sorted(race)
    digits = {"KID": 2, "FID": 0, "precision": 2, "coverage": 2, "ventricles": 2, "symmetry": 2}
    for name, cells in shown.items():
        for column, places in digits.items():
            cell = cells.get(column) or cells[f"{column} off by"]
            if name == "slices of other heads":
                assert cell == f"{result['floor'][column]:.{places}f}", column
                continue
            found = [run[column] for run in race[rows[name]].values()]
            mean, spread = statistics.mean(found), statistics.stdev(found)
            assert cell == f"{mean:.{places}f} ± {spread:.{places}f}", (name, column)
        if name in rows:
            assert cells["steps"] == f"{race[rows[name]]['0']['steps']:,}"
    assert set(shown) == {*rows, "slices of other heads"}
