"""The recorded measurements are whole, and say what their own runs say."""

import json
import statistics
import sys
from dataclasses import asdict, replace

import pytest
from notebook_tools import ROOT

from oasis_helpers.training import PROFILES, WEIGHTS, load_weights

BENCHMARKS = ROOT / "benchmarks"


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


def test_ablations_are_whole(module):
    ablations, result = module("ablations"), _recorded("ablations")
    assert result["table"] == ablations.rows(result["runs"])
    assert result["base"] == json.loads(json.dumps(asdict(ablations.BASE)))
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
    assert distances[-1] < distances[0]
    config = load_weights(WEIGHTS)[1]
    assert config.steps == result["runs"][str(minutes.MINUTES[-1])]["steps"]
    assert config == replace(PROFILES["laptop"], steps=config.steps)


def test_samplers_are_whole(module):
    samplers, result = module("samplers"), _recorded("samplers")
    assert [(r["method"], r["steps"], r["spacing"]) for r in result["rows"]] == samplers.WAYS
    assert all(row["low"] < row["high"] for row in [result["floor"], *result["rows"]])
    assert str(load_weights(WEIGHTS)[1].steps) == result["trained steps"]


def test_the_report_judges_what_ships_between_floor_and_ceiling(module):
    module("evaluation")  # imports: the script still fits the package
    rows = _recorded("evaluation")["rows"]
    kid = {name: row["KID"] for name, row in rows.items()}
    assert kid["weights that ship"] < kid["5 minutes"] < kid["mean of training"] < kid["noise"]
    copies = {name: row["nearer to training, features"] for name, row in rows.items()}
    assert copies["weights that ship"] < 0.05 < 0.5 < copies["learned by heart"]
    card = WEIGHTS.with_suffix(".md").read_text()
    assert f"{kid['weights that ship']:.2f}" in card
    assert f"{kid['held-out slices']:.2f}" in card


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
    race, readme = _recorded("time_to_quality")["runs"], (ROOT / "README.md").read_text()
    ours = race["oasis_helpers"].values()
    others = [run for name, runs in race.items() if name != "oasis_helpers" for run in runs.values()]
    for column in ("KID", "FID", "ventricles", "symmetry"):
        assert max(run[column] for run in ours) < min(run[column] for run in others), column
    for column in ("precision", "coverage"):
        assert min(run[column] for run in ours) > max(run[column] for run in others), column
    for runs in race.values():
        assert f"| {statistics.mean(run['KID'] for run in runs.values()):.2f} ± " in readme
