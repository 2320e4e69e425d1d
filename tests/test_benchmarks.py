"""The recorded measurements are whole, and the tables of README and the model cards say what they say."""

import json
import re
import statistics
import sys
from zlib import crc32

import numpy as np
import pytest
import torch
from notebook_tools import ROOT

from oasis_helpers.autoencoder import load_autoencoder, load_stable_diffusion
from oasis_helpers.evaluation import PIXEL, SEGMENTER, load_segmenter
from oasis_helpers.training import (
    GUIDED,
    PROFILES,
    WEIGHTS,
    TrainConfig,
    load_weights,
    read_header,
    save_weights,
    train,
)
from oasis_helpers.training.loop import draw_step

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
    written = re.findall(r"[-−]?\d[\d,]*(?:\.\d+)?", cell)
    assert len(written) == len(values), f"{cell!r} has {len(written)} numbers, not those of {values}"
    for text, value in zip(written, values):
        half = 0.5 * 10 ** -len(text.partition(".")[2])
        assert abs(float(text.replace(",", "").replace("−", "-")) - value) <= half + 1e-9, (
            f"{cell!r} says {text}, not {value}"
        )


def test_a_cell_is_compared_by_its_own_digits():
    _says("0.21 (0.09 to 0.78)", 0.2068, 0.0936, 0.7794)
    _says("14,822 steps", 14822)
    _says("−0.02 (−0.11 to 0.07)", -0.0213, -0.1052, 0.0701)
    for cell, values in (
        ("0.21", [0.2168]),
        ("0.21", [0.1]),
        ("0.21 ± 0.01", [0.21]),
        ("–", [0.21]),
        ("0.21", [-0.21]),
    ):
        with pytest.raises(AssertionError):
            _says(cell, *values)


def test_every_script_fits_the_package(module):
    for script in BENCHMARKS.glob("*.py"):
        module(script.stem)


# ---- many runs at once --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"min_snr_gamma": 5.0, "snr_offset": 1.0},
        {"prediction": "epsilon", "loss": "huber", "lr_schedule": "constant", "weight_decay": 0.1},
    ],
)
def test_a_step_to_be_recorded_is_a_step_of_the_loop(module, settings):
    """Without a GPU it is played unrecorded; what it draws, weights and averages is the same."""
    runs, count = module("runs"), 5
    config = TrainConfig(steps=count, lr=2e-3, warmup=2, ema_decay=0.9, batch_size=4).replace(
        image_size=16, base_channels=8, channel_mult=(1, 2), attention_levels=(1,), **settings
    )
    images = torch.randint(
        0, 256, (10, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    *_, state = train(config, images, device="cpu")
    step = runs.Step(config, config.make_network(), torch.device("cpu"))
    for number in range(count):
        step.play(draw_step(config, images, config.objective, number), number)
    fresh = config.make_network().state_dict()
    for ours, theirs in ((step.network, state.model), (step.ema.model, state.ema.model)):
        found, wanted = ours.state_dict(), theirs.state_dict()
        assert any((wanted[name] - fresh[name]).abs().max() > 1e-3 for name in wanted)  # it has moved
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=2e-5)


def test_runs_end_in_the_same_weights_however_they_are_started(module, tmp_path):
    runs = module("runs")
    config = TrainConfig(steps=3, batch_size=4).replace(
        image_size=16, base_channels=8, channel_mult=(1,), attention_levels=()
    )
    images = torch.randint(
        0, 256, (10, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    (found,) = runs.in_parallel(runs.trained, [(config, images)], 1)
    runs.trained_to(tmp_path / "weights.safetensors", config, images, {"data": "noise"})
    stored = load_weights(tmp_path / "weights.safetensors").network.state_dict()
    for name, tensor in found.average.state_dict().items():
        torch.testing.assert_close(stored[name], tensor)
    before = (tmp_path / "weights.safetensors").read_bytes()
    runs.trained_to(tmp_path / "weights.safetensors", config, images, {})  # it is there
    assert (tmp_path / "weights.safetensors").read_bytes() == before


def test_half_the_size_is_the_same_network(module, tmp_path):
    config = PROFILES["autoencoder"].replace(encoder_widths=(8, 8), decoder_widths=(8, 8))
    whole, half = (tmp_path / f"{name}.safetensors" for name in ("whole", "half"))
    save_weights(whole, config.make_network(), config, {"data": "phantoms"})
    module("half").halve(whole, half)
    assert half.stat().st_size < 0.7 * whole.stat().st_size  # with as large a header
    a, b = (load_autoencoder(path).state_dict() for path in (whole, half))
    assert all(torch.allclose(a[name], b[name], rtol=1e-3, atol=1e-6) for name in a)
    first, second = read_header(whole), read_header(half)
    assert second.card == first.card | {"stored": "float16"}
    assert (second.settings, second.training) == (first.settings, first.training)


def test_the_latent_model_is_trained_on_the_autoencoder_as_it_ships(module, phantoms, tmp_path, monkeypatch):
    latent = module("latent")
    tiny = {
        "autoencoder": PROFILES["autoencoder"].replace(
            image_size=64, encoder_widths=(8, 8), decoder_widths=(8, 8), batch_size=2
        ),
        "latent": PROFILES["latent"].replace(
            image_size=8,
            base_channels=8,
            channel_mult=(1,),
            attention_levels=(),
            batch_size=2,
            reading_steps=2,
        ),
    }
    monkeypatch.setattr(latent, "PROFILES", tiny)
    command = [
        "latent.py",
        str(phantoms.root),
        str(tmp_path),
        "--autoencoder-steps",
        "2",
        "--latent-steps",
        "3",
    ]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    latent.main()
    files = [tmp_path / f"{name}-256.safetensors" for name in ("autoencoder", "latent")]
    denoise, _ = load_stable_diffusion(files[1], files[0])
    assert denoise.shape == (4, 8, 8)
    for path, steps in zip(files, (2, 3)):
        card = read_header(path).card
        assert (card["steps"], card["stored"], card["data"]) == (
            steps,
            "float16",
            "phantoms: 2 cases, recipe 3, seed 0",
        )
        assert card["seconds"] > 0
    before = [path.read_bytes() for path in files]
    latent.main()  # they are there
    assert [path.read_bytes() for path in files] == before
    assert not list(tmp_path.glob("*fp32.safetensors"))


# ---- the protocol -------------------------------------------------------------------------------


@pytest.fixture
def judge(module):
    return module("judge")


def test_holm_corrects_as_by_hand(judge):
    # In order 0.01, 0.02, 0.03, 0.04: times 4, 3, 2, 1 is 0.04, 0.06, 0.06, 0.04, which may not fall.
    np.testing.assert_allclose(judge.holm([0.03, 0.01, 0.04, 0.02]), [0.06, 0.04, 0.06, 0.06])
    assert judge.holm([0.9, 0.6]) == [1.0, 1.0]
    assert judge.holm([]) == []


def test_an_interval_over_seeds_is_students(judge):
    # mean 2, standard error 1/√3; 4.303 is the 97.5 % point of Student's t with two degrees of freedom
    found = judge.over_seeds([1.0, 2.0, 3.0])
    assert found["mean"] == 2
    assert [found["low"], found["high"]] == pytest.approx([2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5], abs=1e-3)


def test_seeds_are_compared_in_pairs(judge):
    base = [0.0, 10.0, 20.0, 30.0]  # a wide spread that pairs do not feel
    found = judge.paired([1.0, 11.1, 20.9, 31.0], base)
    assert found["mean"] == pytest.approx(1.0)
    assert found["low"] > 0.8
    assert found["p"] < 0.001
    assert judge.paired([1.0, 9.0, 21.0, 29.0], base)["p"] > 0.9


class _Noise:
    """A denoiser that counts, and answers beyond the range."""

    def __init__(self):
        from oasis_helpers.diffusion import NoiseSchedule

        self.schedule, self.shape, self.device, self.batches = NoiseSchedule.cosine(10), (1, 2, 2), "cpu", []

    def __call__(self, x, t, y=None):
        self.batches.append(len(x))
        return 3 * x


def test_samples_are_drawn_in_batches_with_a_seed_each(judge):
    denoise = _Noise()
    images = judge.draw(denoise, judge.BATCH + 3, steps=1)
    assert denoise.batches == [judge.BATCH, 3]
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert not torch.equal(images[: len(images) - judge.BATCH], images[judge.BATCH :])  # from one seed
    assert torch.equal(judge.draw(denoise, judge.BATCH + 3, steps=1), images)
    assert not torch.equal(judge.draw(denoise, judge.BATCH + 3, seed=1, steps=1), images)


@pytest.fixture
def toy_judge(judge, monkeypatch):
    """A judge whose features are the pixels, with a reference of normal noise."""
    monkeypatch.setattr(judge, "embed", lambda images, segmenter: images.flatten(1)[:, ::512])
    monkeypatch.setattr(judge, "segment", lambda images, segmenter: (images[:, 0] > 0).long())
    drawn = torch.Generator().manual_seed(0)
    sets = (torch.randn((n, 1, 64, 64), generator=drawn).clamp(-1, 1) for n in (60, 10, 40))
    splits = [judge.Split(x, judge.embed(x, None), list(range(1000, 1000 + len(x)))) for x in sets]
    return judge.Judge(None, judge.Real(*splits))


def test_the_judge_finds_what_differs(toy_judge):
    images = toy_judge.real.others.images
    perfect, worse = toy_judge.perfect(), toy_judge.figures((images + 0.5).clamp(-1, 1))
    assert perfect["KID, low"] < 0 < perfect["KID, high"]
    assert 0 < worse["KID, low"] < worse["KID"] < worse["KID, high"]
    assert worse["KID, jackknife error"] > 0
    assert worse["FID"] > perfect["FID"]
    assert worse["coverage"] < perfect["coverage"]
    assert worse["anatomy: brain"] > perfect["anatomy: brain"]


def test_a_difference_is_that_of_the_distances_and_sharper_than_their_intervals(toy_judge):
    images = toy_judge.real.others.images
    shifted = (images + 0.1).clamp(-1, 1)
    found = toy_judge.difference(shifted, images)
    a, b = (toy_judge.distance(x) for x in (shifted, images))
    assert found["difference"] == pytest.approx(a["KID"] - b["KID"], abs=1e-9)
    assert found["low"] < found["difference"] < found["high"]
    assert found["high"] - found["low"] < 0.7 * (a["KID, high"] - a["KID, low"])
    nothing = toy_judge.difference(images, images)
    assert nothing == {"difference": 0, "low": 0, "high": 0}
    with pytest.raises(ValueError, match="pairs"):
        toy_judge.difference(images, images[:-1])


# ---- spoilt images ------------------------------------------------------------------------------


@pytest.fixture
def heads():
    """Four heads of 64×64 as discs: brain, dark bone, bright scalp, grey air; and their masks."""
    x, y = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    radius = torch.hypot(x - 31.5, y - 31.5)
    image = torch.full((64, 64), -0.95)
    image[radius < 28], image[radius < 25], image[radius < 22] = 0.8, -0.9, 0.0
    shades = torch.linspace(0, 0.3, 4).reshape(-1, 1, 1, 1)
    images = torch.where(image == 0.0, image + shades, image)
    return images, (radius < 22).long().expand(4, 64, 64)


def test_every_spoiler_keeps_form_and_range(module, heads):
    images, masks = heads
    kept = images.clone()
    for name, spoil in module("evaluation").SPOILERS.items():
        found = spoil(images, masks)
        assert found.shape == images.shape, name
        assert found.dtype == images.dtype, name
        assert found.abs().max() <= 1, name
        assert torch.equal(images, kept), name
        assert not torch.equal(found, images) or "exchanged" in name, name  # these heads are symmetric


def test_blur_spreads_a_point_as_far_as_it_says(judge):
    point = torch.full((1, 1, 33, 33), -1.0)
    point[..., 16, 16] = 1.0
    for sigma in (0.5, 1.0):
        share = (judge.blurred(point, sigma) + 1)[0, 0] / 2
        rows = torch.arange(33.0) - 16
        assert float(share.sum()) == pytest.approx(1, abs=1e-3)
        assert float((share.sum(1) * rows**2).sum()) == pytest.approx(
            sigma**2, rel=0.12
        )  # of a sampled Gaussian


def test_grain_has_its_size_and_darkness_its_share(judge):
    flat = torch.zeros(4, 1, 64, 64)
    assert float(judge.grainy(flat, 8).std()) == pytest.approx(8 / 127.5, rel=0.03)
    dark = judge.darker(torch.tensor([-1.0, 0.0, 1.0]), 0.1)
    torch.testing.assert_close(dark, torch.tensor([-1.0, -0.1, 0.8]))


def test_the_scalp_goes_and_the_brain_stays(judge, heads):
    images, masks = heads
    found = judge.without_scalp(images, masks)
    inside = masks[:, None] > 0
    assert torch.equal(found[inside], images[inside])
    assert float(found[~inside].max()) < -0.85
    wide = judge.without_scalp(
        images, masks, beyond=5 * PIXEL
    )  # into the scalp, which lies 3 to 6 pixels out
    assert float(wide[~inside].max()) == pytest.approx(0.8)


def test_halves_are_exchanged_in_pairs(judge):
    images = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 4, 4)
    found = judge.swapped_halves(images)
    assert found[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert found[:, 0, -1, 0].tolist() == [1, 0, 3, 2]
    assert torch.equal(judge.swapped_halves(found), images)
    rows = torch.arange(4.0).reshape(1, 1, 4, 1)
    assert judge.mirrored(rows).flatten().tolist() == [3, 2, 1, 0]


# ---- the networks of the race -------------------------------------------------------------------


def test_folding_changes_nothing_but_what_a_network_sees(module):
    race, seen = module("time_to_quality"), []

    class Identity(torch.nn.Module):
        def forward(self, x, t):
            seen.append(tuple(x.shape))
            return x

    images = torch.randn(2, 1, 64, 64)
    assert torch.equal(race.Folded(Identity())(images, torch.zeros(2)), images)
    assert seen == [(2, 4, 32, 32)]


def test_every_network_folded_or_not_answers_in_the_images_shape(module):
    race = module("time_to_quality")
    makers = race.builders()
    assert "oasis_helpers, folded" not in makers
    for name, make in makers.items():
        with torch.no_grad():
            found = make(16)(torch.randn(2, 1, 64, 64), torch.tensor([3, 900]))
        assert found.shape == (2, 1, 64, 64), name


def test_the_same_steps_are_those_of_the_peer_unfolded(module):
    race = module("time_to_quality")
    steps = race.plan({"oasis_helpers": 6.0, "diffusers": 2.0, "diffusers, folded": 5.0}, 5)
    assert steps["same minutes"] == {"oasis_helpers": 1800, "diffusers": 600, "diffusers, folded": 1500}
    assert set(steps["same steps"].values()) == {600}


def test_networks_are_compared_with_ours_seed_by_seed(module):
    race = module("time_to_quality")
    runs = {"oasis_helpers": [0.1, 0.2, 0.3], "diffusers": [0.6, 0.71, 0.79], "MONAI": [0.3, 0.1, 0.35]}
    found = race.differences({n: {str(i): {"KID": v} for i, v in enumerate(x)} for n, x in runs.items()})
    assert list(found) == ["diffusers", "MONAI"]
    assert found["diffusers"]["mean"] == pytest.approx(0.5)
    assert found["diffusers"]["p"] < 0.01 < found["MONAI"]["p"]


# ---- what was recorded --------------------------------------------------------------------------


def _same_numbers(recorded, computed):
    """The same names and texts, and numbers that differ by no more than the last bits."""
    if isinstance(computed, dict):
        return recorded.keys() == computed.keys() and all(
            _same_numbers(recorded[k], computed[k]) for k in computed
        )
    if isinstance(computed, list):
        return len(recorded) == len(computed) and all(map(_same_numbers, recorded, computed))
    return recorded == (pytest.approx(computed, abs=1e-9) if isinstance(computed, float) else computed)


SECONDS = {"16": 0.1, "4": 0.05, "64": 0.4}


def test_ablations_compare_with_the_first_setting_of_each_choice(module):
    ablations = module("ablations")
    runs = {}
    for settings in ablations.choices(SECONDS).values():
        for changes in settings.values():
            for seed in ablations.SEEDS:
                name = ablations.key(ablations.BASE.replace(seed=seed, **changes))
                worse = 0.5 * ("epsilon" in name) + 5e-5 * (crc32(name.encode()) % 100)  # no two alike
                runs[name] = {"average": 1 + worse + 0.01 * seed, "last step": 2 + 0.013 * seed**2}
    rows = {(row["choice"], row["setting"]): row for row in ablations.rows(runs, SECONDS)}
    assert rows["prediction", "v"]["difference"] is None
    assert rows["prediction", "v"]["kid"] == pytest.approx(
        [1 + 0.01 * seed for seed in ablations.SEEDS], abs=0.007
    )
    assert rows["prediction", "noise"]["difference"]["mean"] == pytest.approx(0.5, abs=0.007)
    assert rows["prediction", "noise"]["difference"]["p"] < 0.001
    last = statistics.mean(1 + 0.013 * seed**2 - 0.01 * seed for seed in ablations.SEEDS)
    assert rows["average, rate falls", "last step"]["difference"]["mean"] == pytest.approx(last, abs=0.007)
    compared = [row for row in rows.values() if row["difference"]]
    assert len(compared) == len(rows) - len(ablations.choices(SECONDS))


def test_batches_of_the_same_time_take_it(module):
    ablations = module("ablations")
    settings = ablations.choices(SECONDS)["batch (same time)"]
    assert {name: s.get("steps", ablations.BASE.steps) for name, s in settings.items()} == {
        "16": 500,
        "4": 1000,
        "64": 125,
    }


def test_the_weighting_of_the_laptop_profile_is_one_of_those_compared(module):
    weightings = module("weightings")
    assert weightings.SHIPPED == "min-SNR 5 of SNR + 1"
    configurations = [weightings.configuration(name, 0, 500) for name in weightings.WEIGHTINGS]
    assert len({repr(config) for config in configurations}) == 3
    assert all(config.objective.prediction == "v_prediction" for config in configurations)


def test_the_first_step_of_the_best_estimate_is_no_step_away(module):
    weightings = module("weightings")
    mean = torch.rand(1, 1, 8, 8)

    class Best(_Noise):
        def __call__(self, x, t, y=None):
            assert t == self.schedule.T - 1
            return mean.expand_as(x)

    best = Best()
    best.shape = (1, 8, 8)
    assert weightings.first_step(best, mean) == 0
    assert weightings.first_step(best, mean + 0.1) == pytest.approx(12.75, rel=1e-4)


def test_the_weights_that_ship_are_those_of_the_longest_run(module):
    minutes, result = module("minutes"), _recorded("minutes")
    assert list(result["runs"]) == [str(m) for m in minutes.MINUTES]
    for time, run in result["runs"].items():
        assert run["steps"] == int(60 * int(time) * result["steps per second"])
    distances = [run["KID"] for run in result["runs"].values()]
    assert distances == sorted(distances, reverse=True)
    assert all(run["KID, low"] < run["KID"] < run["KID, high"] for run in result["runs"].values())
    assert 0.4 < result["mean symmetry of real heads"] < 1
    longest = result["runs"][str(minutes.MINUTES[-1])]
    header, laptop = read_header(WEIGHTS), PROFILES["laptop"]
    # "auto" was fp32 on the processor that trained them
    assert header.training == laptop.replace(steps=longest["steps"], precision="fp32").loop()
    theirs = json.loads(json.dumps(laptop.objective.settings()))
    assert header.settings == {name: theirs[name] for name in header.settings}
    assert header.card["data"] in result["setting"]
    (shorter,) = _row(CARD, "the same profile for 5 minutes, 2 minutes, 1 minute", 1)
    _says(shorter, *reversed(distances[:-1]))
    words = rf"{minutes.MINUTES[-1]} minutes samples reach (.*?) \(\["
    found = re.search(words, " ".join(README.read_text().split()))
    _says(found[1], *distances)


def test_one_distance_of_the_weights_that_ship_stands_everywhere(module):
    judge = module("judge")
    *_, minutes = (run["KID"] for run in _recorded("minutes")["runs"].values())
    rows = {(row["method"], row["steps"]): row["KID"] for row in _recorded("samplers")["rows"]}
    assert _recorded("evaluation")["rows"]["weights that ship"]["KID"] == pytest.approx(minutes, abs=2e-3)
    assert rows[judge.METHOD, judge.STEPS] == pytest.approx(minutes, abs=2e-3)


def test_samplers_are_whole(module):
    samplers, result = module("samplers"), _recorded("samplers")
    assert [(r["method"], r["steps"], r["spacing"]) for r in result["rows"]] == samplers.WAYS
    assert all(row["low"] < row["high"] for row in [result["perfect generator"], *result["rows"]])
    for row in result["rows"]:
        is_base = (row["method"], row["steps"], row["spacing"]) == samplers.BASE
        assert is_base == ("difference" not in row)
        assert is_base or row["difference, low"] <= row["difference"] <= row["difference, high"]
    assert result["trained steps"] == read_header(WEIGHTS).training["steps"]
    (perfect,) = _row(CARD, "a perfect generator: other fresh heads", 1)
    _says(perfect, result["perfect generator"]["KID"])
    found = {(row["method"], row["steps"]): row for row in result["rows"]}
    for name, way in (("DDIM", ("ddim", 20)), ("DPM-Solver++", ("dpm_solver", 10))):
        row = found[way]
        (cell,) = _row(CARD, f"this network, {row['samples']} samples, {name}, {row['steps']:,} steps", 1)
        _says(cell, row["KID"])


def test_what_readme_says_of_samplers():
    words = " ".join(README.read_text().split())
    found = re.search(r"not told apart from fifty by DDIM \((.*?)\); ten calls come out (.*?) above", words)
    rows = {(row["method"], row["steps"]): row for row in _recorded("samplers")["rows"]}
    for text, way in zip(found.groups(), (("dpm_solver", 20), ("dpm_solver", 10))):
        _says(text, *(rows[way][f"difference{end}"] for end in ("", ", low", ", high")))
    assert rows["dpm_solver", 20]["difference, low"] < 0 < rows["dpm_solver", 20]["difference, high"]


# a row of the model card → the figures of a column of it
CARD_ROWS = {
    "KID (95 % interval by head)": lambda f: (f["KID"], f["KID, low"], f["KID, high"]),
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
    columns = ("weights that ship", "perfect generator", "mean of training", "noise")
    for column, cell in zip(columns, _row(CARD, name, 4)):
        values = figures(rows[column])
        _says(cell, *(values if "," in name or "(" in cell else values[:1]))  # the KID of noise stands alone


def test_the_card_has_the_loss_by_t():
    losses = _recorded("evaluation")["loss by t"]
    for name in ("held out", "training"):
        for cell, value in zip(_row(CARD, name, 11), [*losses[name], statistics.mean(losses[name])]):
            _says(cell, value)


def test_the_report_judges_what_ships_between_its_controls():
    rows = _recorded("evaluation")["rows"]
    controls = ["perfect generator", "by heart", "mean of training", "noise"]
    assert list(rows) == ["weights that ship", "5 minutes", "learned by heart", *controls]
    kid = {name: row["KID"] for name, row in rows.items()}
    assert kid["weights that ship"] < kid["5 minutes"] < kid["mean of training"] < kid["noise"]
    perfect = rows["perfect generator"]
    assert perfect["KID, low"] < 0 < perfect["KID, high"]
    assert perfect["KID above perfect"] is None
    copies = {name: row["nearer to training, features"] for name, row in rows.items()}
    assert copies["weights that ship"] < 0.05 < 0.5 < copies["learned by heart"]
    assert copies["by heart"] > 0.5
    words = r"(\S+ %) of the samples are nearer .*?heart, (\S+ %) are"
    found = re.search(words, README.read_text(), re.DOTALL)
    _says(found[1], 100 * copies["weights that ship"])
    _says(found[2], 100 * copies["learned by heart"])


def test_what_the_distance_does_not_see_is_recorded(module):
    blind = _recorded("evaluation")["blind"]
    assert list(blind) == list(module("evaluation").SPOILERS)
    assert all(row["low"] <= row["difference"] <= row["high"] for row in blind.values())
    assert blind["blur, one pixel"]["difference"] > blind["blur, half a pixel"]["difference"]


def test_the_tables_of_a_card_are_filled_by_name_and_width(module):
    fill = module("card").fill
    card = "# Card\n\n| training | long story |\n| training | – | – |\ntraining\n"
    assert fill(card, {"training": ["1", "2"]}) == card.replace("– | –", "1 | 2")
    with pytest.raises(ValueError, match="no row 'data'"):
        fill(card, {"data": ["1"]})


def test_the_cards_are_as_their_script_would_write_them(module):
    script = module("card")
    cards = ((WEIGHTS, script.weights_rows()), (SEGMENTER, script.segmenter_rows()))
    for weights, rows in (*cards, (GUIDED, script.guided_rows())):
        card = weights.with_suffix(".md").read_text()
        assert script.fill(card, rows) == card


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
RACED = ("FID", "precision", "coverage", "anatomy: ventricles", "anatomy: symmetry")


def _readme_name(network):
    """What README's tables call a network of the race."""
    name, folded, _ = network.partition(", folded")
    (shown,) = (shown for shown, plain in NETWORKS.items() if plain == name)
    return shown + folded


def test_every_network_made_its_steps_in_both_races(module):
    race, result = module("time_to_quality"), _recorded("time_to_quality")
    peers = [name for name in module("networks").NETWORKS if name != race.OURS]
    names = [race.OURS, *peers, *(f"{name}, folded" for name in peers)]
    assert sorted(result["parameters"]) == sorted(names)
    sizes = list(result["parameters"].values())
    assert max(sizes) < 1.1 * min(sizes)
    steps = race.plan(result["steps per second"], result["minutes"])
    for kind in race.RACES:
        assert sorted(result[kind]) == sorted(names)
        for name, runs in result[kind].items():
            assert {run["steps"] for run in runs.values()} == {steps[kind][name]}
        assert race.common(result[kind]) == ["0", "1", "2"]
        assert _same_numbers(result["KID above ours"][kind], race.differences(result[kind]))


def test_a_race_shows_the_seeds_that_all_networks_have(module):
    race = module("time_to_quality")
    kid = {"KID": 0.5, "KID, low": 0.4, "KID, high": 0.6}
    runs = {"a": {"0": kid, "1": kid}, "b": {"1": kid, "2": kid}}
    assert race.common(runs) == ["1"]
    assert race.cells([kid], "KID") == "0.50 (0.40 to 0.60)"
    assert race.cells([kid, kid | {"KID": 0.7}], "KID") == "0.60 ± 0.14"


def test_what_readme_says_of_the_race():
    """Behind the same folding a peer is not told apart in the same minutes; step for step two are better."""
    result = _recorded("time_to_quality")
    minutes, steps = (result["KID above ours"][race] for race in ("same minutes", "same steps"))
    assert minutes["diffusers, folded"]["low"] < 0 < minutes["diffusers, folded"]["high"]
    shown = [{name for name, d in race.items() if d["p"] < 0.05} for race in (minutes, steps)]
    assert shown == [{"diffusers"}, {"diffusers", "MONAI"}]
    words = " ".join(README.read_text().split())
    text = re.search(r"So this U-Net is no better than its peers\. (.*?) Folding wins the minutes", words)[1]
    found = re.findall(r"[+−]\d\.\d\d \([+−]\d\.\d\d to [+−]\d\.\d\d\)", text)
    named = (minutes["diffusers, folded"], minutes["diffusers"], steps["diffusers"], steps["MONAI"])
    for cell, difference in zip(found, named, strict=True):
        _says(cell, difference["mean"], difference["low"], difference["high"])


def test_ablations_are_whole(module):
    ablations, result = module("ablations"), _recorded("ablations")
    assert _same_numbers(result["table"], ablations.rows(result["runs"], result["seconds per step"]))
    assert result["setting"] == ablations.SETTING
    now = json.loads(json.dumps(ablations.BASE.settings()))
    assert result["base"] == {name: now[name] for name in result["base"]}  # but for settings that came later
    choices = ablations.choices(result["seconds per step"])
    settings = [(choice, setting) for choice, found in choices.items() for setting in found]
    assert [(row["choice"], row["setting"]) for row in result["table"]] == settings
    assert all(len(row["kid"]) == len(ablations.SEEDS) for row in result["table"])
    assert result["perfect generator"]["KID"] < min(row["mean"] for row in result["table"])
    shown = {
        (row["choice"], row["setting"]): row["difference"]["mean"] < 0
        for row in result["table"]
        if row["difference"] and row["difference"]["p"] < 0.05
    }
    batches = {(f"batch (same {of})", size): size == "4" for of in ("images", "time") for size in ("4", "64")}
    assert shown == batches | {
        ("learning rate", "5e-4"): False,
        ("schedule", "sigmoid"): True,
        ("schedule", "linear"): False,
        ("weighting", "min-SNR 5 of SNR + 1"): True,
        ("prediction", "noise"): False,
        ("prediction, min-SNR 5", "noise"): False,
    }  # as README says


def test_weightings_are_whole(module):
    weightings, result = module("weightings"), _recorded("weightings")
    assert list(result["weightings"]) == list(result["runs"]) == list(weightings.WEIGHTINGS)
    assert result["ships"] == weightings.SHIPPED
    seeds = min(len(runs) for runs in result["runs"].values())
    assert seeds == 5
    assert f"{seeds} seeds" in result["setting"]
    summary = weightings.summary(result["runs"], seeds)
    assert _same_numbers({name: result[name] for name in summary}, summary)
    for name, row in result["weightings"].items():
        columns = (row[what] for what in ("KID", "first step, grey levels"))
        for cell, found in zip(_row(README, name, 2), columns):
            _says(cell, found["mean"], found["low"], found["high"])
    assert all(d["low"] < 0 < d["high"] for d in result["KID above the one that ships"].values())


@pytest.mark.parametrize(("recorded", "where"), [("networks", ""), ("networks_gpu", ", H100")])
def test_readme_has_the_speeds(recorded, where):
    result = _recorded(recorded)
    for name, network in NETWORKS.items():
        speeds = [
            result[precision][network][f"{what}, times the best peer"]
            for what in ("training", "sampling")
            for precision in ("fp32", "bf16")
        ]
        for cell, speed in zip(_row(README, f"{name}{where}", 4), speeds, strict=True):
            _says(cell, speed)


def test_readme_says_what_the_full_profile_reached():
    result, words = _recorded("full"), " ".join(README.read_text().split())
    said = re.search(
        r"was tried for (.*?) of its (.*?) steps on an H100.*?: (.*?) s and (.*?) GB a step", words
    )
    reached = re.search(r"GB a step, and samples at a KID of (.*?\))", words)[1]
    _says(said[1], result["steps"])
    _says(said[2], PROFILES["full"].steps)
    _says(said[3], result["seconds per step"])
    _says(said[4], result["peak memory, GB"])
    _says(reached, result["KID"], result["KID, low"], result["KID, high"])
    first, last = result["loss of the first and the last steps"]
    assert last < first / 10


def test_readme_has_the_race():
    """Steps are a column after the same minutes, and not after the same steps."""
    result = _recorded("time_to_quality")
    for race, extra in (("same minutes", 1), ("same steps", 0)):
        for name, runs in result[race].items():
            cells = _row(README, _readme_name(name), 1 + len(RACED) + extra)
            if extra:
                _says(cells[0], runs["0"]["steps"])
            for column, cell in zip(("KID", *RACED), cells[extra:], strict=True):
                values = [run[column] for run in runs.values()]
                _says(cell, statistics.mean(values), statistics.stdev(values))
        perfect = result["perfect generator"]
        distance, *rest = _row(README, "a perfect generator", 1 + len(RACED) + extra)[extra:]
        _says(distance, perfect["KID"], perfect["KID, low"], perfect["KID, high"])
        for column, cell in zip(RACED, rest, strict=True):
            _says(cell, perfect[column])


def test_recipe_3_is_as_near_to_a_real_slice_as_readme_says():
    result = _recorded("realism")
    for name, row in result["recipe 3"].items():
        cells = _row(README, name, 3)
        _says(cells[0], result["real"][name])
        for cell, recipe in zip(cells[1:], ("recipe 2", "recipe 3")):
            _says(cell, result[recipe][name]["mean"], result[recipe][name]["sd"])
        assert abs(row["z"]) < 1.5, name


def test_the_networks_of_guidance_are_trained_and_gone_on_with(module, phantoms, tmp_path, monkeypatch):
    guided = module("guided")
    tiny = PROFILES["guided"].replace(
        steps=20, batch_size=4, warmup=0, precision="fp32", image_size=16, base_channels=16,
        channel_mult=(1, 2), attention_levels=(1,), T=50,
    )  # fmt: skip
    monkeypatch.setitem(guided.PROFILES, "guided", tiny)
    monkeypatch.setattr(sys, "argv", ["guided.py", str(phantoms.root), str(tmp_path)])
    with monkeypatch.context() as patched:
        patched.setattr(guided, "halve", lambda *args: 1 / 0)  # killed before the halves are written
        with pytest.raises(ZeroDivisionError):
            guided.main()
    guided.main()
    found = {path.stem: read_header(path) for path in tmp_path.glob("*.safetensors")}
    steps = {"guided-64": 20, "guided-64-early": 2, "guided-64-small": 2}
    assert {name: header.card["steps"] for name, header in found.items()} == steps
    assert {header.card["stored"] for header in found.values()} == {"float16"}
    assert {header.card["data"] for header in found.values()} == {"phantoms: 2 cases, recipe 3, seed 0"}
    widths = [found[name].settings["network"]["base_channels"] for name in steps]
    assert widths == [16, 16, 8]
    networks = [load_weights(tmp_path / f"{name}.safetensors") for name in ("guided-64", "guided-64-early")]
    a, b = (torch.cat([p.flatten() for p in d.network.parameters()]) for d in networks)
    assert (a - b).norm() > 0.01 * a.norm()  # the early one is early

    early, ended = tmp_path / "guided-64-early.safetensors", tmp_path / "ended" / "guided-64.safetensors"
    monkeypatch.setattr(sys, "argv", ["guided.py", str(phantoms.root), str(ended.parent), "3", str(early)])
    guided.main()
    header = read_header(ended)
    assert header.card["began"]["steps"] == 2
    assert header.training["steps"] == 3
    c = torch.cat([p.flatten() for p in load_weights(ended).network.parameters()])
    assert 0 < (c - b).norm() < 0.1 * b.norm()  # it went on from there


# ---- obedience ----------------------------------------------------------------------------------


def test_obedience_is_a_line_and_an_error(module):
    found = module("obedience").obedience(
        torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([1.0, 1.5, 2.0, 2.5])
    )
    assert found == pytest.approx({"r": 1.0, "slope": 0.5, "error": (1 + 0.5 + 0 + 0.5) / 4})
    shuffled = module("obedience").obedience(torch.arange(4.0), torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert shuffled["r"] == pytest.approx(0, abs=1e-9)
    assert shuffled["slope"] == pytest.approx(0, abs=1e-9)


def test_spread_leaves_out_what_was_asked_for(module):
    drawn = torch.Generator().manual_seed(0)
    asked = torch.rand((400, 3), generator=drawn)
    noise = torch.randn((400, 5), generator=drawn)
    of_wish = 10 * asked[:, :1] - 20 * asked[:, :1] * asked[:, 1:2] + 7 * asked[:, 2:] ** 2
    spread = module("obedience").spread
    assert spread(noise + of_wish, asked) == pytest.approx(float(noise.var(0).mean()), rel=0.1)
    assert spread(noise + of_wish, asked.flip(0)) > 5
    assert spread(0.5 * noise + of_wish, asked) == pytest.approx(0.25 * spread(noise, asked))
    found = module("obedience").recentred({"spread": 5.0, "spread, low": 4.0, "spread, high": 4.6})
    assert found == {"spread": 5.0, "spread, low": 4.7, "spread, high": 5.3}


def test_a_size_is_right_in_the_third_of_fresh_heads_asked_for(module):
    obedience = module("obedience")
    drawn = torch.Generator().manual_seed(0)
    asked = torch.stack(
        [torch.arange(90.0) % 32, torch.rand(90, generator=drawn), torch.arange(90.0) // 30], 1
    )
    shrunk = 1 + 0.2 * (asked - 1) + 0.001 * torch.rand(asked.shape, generator=drawn)  # a careful regression
    found = obedience.summary(asked, shrunk, shrunk)["head"]
    assert found["right"] == pytest.approx(1, abs=0.03)
    assert found["error above fresh"] == 0
    assert obedience.summary(asked, shrunk.flip(0), shrunk)["head"]["right"] < 0.4


def test_the_measurer_reads_what_it_was_shown(module):
    """Brightness of a patch is the wish: heads that were not shown are read as well, in a mirror too."""
    obedience, drawn = module("obedience"), torch.Generator().manual_seed(0)
    wanted = torch.rand((80, 3), generator=drawn, dtype=torch.double)
    images = -torch.ones(80, 1, 64, 64)
    images[:, :, 20:44, 8:56] = 0.1 * torch.randn((80, 1, 24, 48), generator=drawn)
    images[:, :, 26:38, 24:40] += wanted[:, 0].float().reshape(-1, 1, 1, 1)
    measurer = obedience.Measurer(load_segmenter(), images[:60], wanted[:60])
    read = measurer(images[60:])
    assert obedience.obedience(wanted[60:, 0], read[:, 0])["r"] > 0.8
    assert abs(obedience.obedience(wanted[60:, 1], read[:, 1])["r"]) < 0.6  # it is not in the picture
    torch.testing.assert_close(measurer(images[60:].flip(-2)), read)


def test_obedience_is_recorded_whole_and_follows_from_what_was_measured(module):
    obedience, recorded = module("obedience"), _recorded("obedience")
    asked, *measured = (
        torch.tensor([values[name] for name in obedience.FACTORS], dtype=torch.double).T
        for values in (recorded["asked"], *(row["measured"] for row in recorded["rows"].values()))
    )
    assert len(asked) == obedience.COUNT
    assert len(asked[:, 0].unique()) >= 20
    assert len(asked[:, 1].unique()) >= 20
    names = ["fresh heads", *(f"s = {s}" for s in obedience.SCALES)]
    assert [*recorded["rows"]][: len(names)] == names
    for row, found in zip(recorded["rows"].values(), measured):
        for name, figures in obedience.summary(asked, found, measured[0]).items():
            assert row[name] == pytest.approx(figures, abs=2e-3), name
        assert row["KID, low"] <= row["KID"] <= row["KID, high"]
        assert row["spread, low"] < row["spread"] < row["spread, high"]


def test_the_guided_network_obeys_where_it_is_told_to():
    rows = _recorded("obedience")["rows"]
    for factor in ("height", "atrophy"):
        assert abs(rows["s = 0"][factor]["r"]) < 0.3
        assert rows["s = 1"][factor]["r, low"] > rows["s = 0"][factor]["r, high"]
    assert rows["s = 4"]["atrophy"]["slope, low"] > rows["s = 1"]["atrophy"]["slope, high"]  # exaggerated
    assert rows["s = 4"]["KID, low"] > rows["s = 1"]["KID, high"]  # the price


@pytest.mark.parametrize("name", ["fresh heads", "s = 1", "s = 2", "s = 4", "s = 4, t = 200 … 700"])
def test_readme_says_how_the_network_obeys(name):
    row = _recorded("obedience")["rows"][name]
    height, atrophy = row["height"], row["atrophy"]
    wanted = [height["r"], height["error"], atrophy["r"], atrophy["slope"], row["KID"]]
    for cell, value in zip(_row(README, name, 5), wanted):
        _says(cell, value)


def test_the_guided_networks_card_says_how_it_was_trained():
    header, card = read_header(GUIDED), GUIDED.with_suffix(".md")
    parameters = sum(p.numel() for p in load_weights(GUIDED).parameters())
    assert f"{parameters:,} parameters" in _row(card, "network", 1)[0]
    assert header.card["stored"] == "float16"
    began, (steps,) = header.card["began"], _row(card, "steps", 1)
    assert steps.startswith(f"{began['steps']:,} of 16 slices")
    assert f"then {header.training['steps']:,} of 8 slices" in steps
    assert f"then {header.card['seconds'] / 60:.0f} minutes" in _row(card, "time", 1)[0]
    early = read_header(GUIDED.with_stem(f"{GUIDED.stem}-early"))
    assert early.card["steps"] == began["steps"]
    assert early.shapes == header.shapes


# ---- Stable Diffusion in miniature ---------------------------------------------------------------

LATENT_CARD, AUTOENCODER_CARD = (WEIGHTS.with_name(f"{name}-256.md") for name in ("latent", "autoencoder"))


def test_words_and_numbers_of_a_slot_are_found_by_value(module):
    prompts = module("prompts")
    height, atrophy = prompts.SLOTS[:2]
    values = torch.tensor([3.0, 8.0, 9.0, 30.0], dtype=torch.double)
    assert prompts.words_at(height, values).tolist() == [0, -1, -1, 3]
    assert prompts.nearest_words(height, values).tolist() == [0, 0, 1, 3]
    numbers = prompts.nearest_numbers(atrophy, torch.tensor([0.04, 0.37, 1.04, 1.2], dtype=torch.double))
    assert numbers[:3].tolist() == pytest.approx([0.0, 0.4, 1.0])
    assert numbers[3].isnan()


def test_a_prompt_says_what_is_true_and_is_understood(module):
    from oasis_helpers.prompts import read

    prompts = module("prompts")
    row = torch.tensor([12.0, 0.62, 44.0, 600.0, 5.4, 4.1])
    text = prompts.together(row)
    assert read(text) == {
        "height": "12", "atrophy": "0.6", "ventricles": "45", "head": "large", "skull": "thin",
    }  # fmt: skip
    assert prompts.said(prompts.SLOTS[4], 5.4, False) == ""  # between two words
    assert prompts.said(prompts.SLOTS[3], 600.0, True) == ""  # no number can be said


def test_an_interval_of_prompts_draws_whole_heads(module):
    prompts = module("prompts")
    values, cases = torch.tensor([0.0, 0.0, 1.0, 1.0]), [1, 1, 2, 2]
    found = prompts.with_intervals(lambda rows: {"mean": float(values[rows].mean())}, cases)
    assert (found["mean"], found["mean, low"], found["mean, high"], found["asked"]) == (0.5, 0.0, 1.0, 4)


def test_the_finest_sulci_are_those_that_an_opening_takes(module):
    first_stage = module("first_stage")
    mask, image = np.full((32, 32), 3), np.zeros((32, 32))
    mask[4:12, 4:12] = 1  # a lake: not thin
    mask[20, 3:29] = 1  # a line
    image[20, 3:29] = -0.5
    image[4:12, 4:12] = -5.0
    assert first_stage.sulcus_contrast(image, mask) == pytest.approx(0.5)
    assert np.isnan(first_stage.sulcus_contrast(image, np.full((32, 32), 3)))
    assert float(first_stage.psnr(torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.02))) == pytest.approx(
        40
    )


def test_a_reader_reads_an_image_and_its_mirror_image_alike(module):
    reader = module("reader").Reader().eval()
    images = torch.randn((2, 1, 256, 256), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(reader(images), reader(images.flip(-2)), atol=1e-4)
    assert reader.features(images).shape == (2, 512)
    assert reader(images).shape == (2, 6)


def test_readme_says_the_work_that_notebook_8_counts():
    times = r"(\d+) times less work than one of the same class on the pixels"
    found = re.search(times, " ".join(README.read_text().split()))[1]
    notebook = README.with_name("notebooks") / "08_stable_diffusion.ipynb"
    assert f": {found} times" in notebook.read_text(encoding="utf-8")


def test_prompts_are_obeyed_as_readme_and_card_say(module):
    prompts, result = module("prompts"), _recorded("prompts")
    names = [slot.name for slot in prompts.SLOTS]
    rows = {"slices through the autoencoder": "the slices themselves, after the autoencoder"}
    rows |= {f"s = {s}": f"s = {s}" for s in (0, *prompts.SCALES)}
    for key, shown in rows.items():
        slots, distance = result["together"][key], result["distances"][key]
        for page in (README, LATENT_CARD):
            cells = _row(page, shown, 10)
            for slot, cell in zip(names[:3], cells[:3]):
                _says(cell, slots[slot]["number"]["r"], slots[slot]["number"]["slope"])
            for slot, cell in zip(names, cells[3:9], strict=True):
                _says(cell, 100 * slots[slot]["word"]["right"])
            _says(cells[9], distance["KID"], distance["KID 128"])
    guess, reader = (result["together"][name] for name in ("s = 0", "slices"))
    for slot in names:  # both controls: a prompt that is not heard, and slices that are what is asked for
        assert guess[slot]["word"]["right, high"] < reader[slot]["word"]["right, low"]
    assert result["distances"]["slices"]["KID, low"] < 0 < result["distances"]["slices"]["KID, high"]
    words = " ".join(README.read_text().split())
    for slot, pattern in (
        ("scalp", r"right of the scalp, by (.*?\)) points"),
        ("skull", r"of the skull, by (.*?\)),"),
        ("atrophy", r"less often of atrophy, by (.*?\))\."),
    ):
        row = result["beside"]["s = 2"][slot]
        found = [100 * row[f"more right{end}"] for end in ("", ", low", ", high")]
        if slot == "atrophy":  # said as what is less
            found = [-found[0], -found[2], -found[1]]
        _says(re.search(pattern, words)[1], *found)


def test_who_is_more_often_right_is_counted_slice_by_slice(module):
    prompts = module("prompts")
    known = torch.tensor([[12.0, 0.05, 20.0, 600.0, 4.0, 6.0], [12.0, 0.9, 60.0, 600.0, 4.0, 6.0]])
    wrong = known.clone()
    wrong[1, 5] = 4.0  # a skull that is thin and not thick
    found = prompts.more_right(known, known, wrong, torch.tensor([1, 2]))
    assert (found["skull"]["more right"], found["scalp"]["more right"]) == (0.5, 0.0)
    assert prompts.more_right(known, wrong, known, torch.tensor([1, 2]))["skull"]["more right"] == -0.5


def test_what_the_autoencoder_keeps_is_on_its_card_and_in_readme():
    kept = _recorded("first_stage")["kept"]
    columns = [kept[name] for name in ("the slices themselves", "autoencoder", "shrunk to 64×64")]
    for shown in ("PSNR, dB", "MS-SSIM", "sulci kept", "Dice, CSF", "Dice, grey", "Dice, white"):
        name = shown.removesuffix(", dB")
        for cell, row in zip(_row(AUTOENCODER_CARD, shown, 3), columns):
            if name in row:
                _says(cell, row[name], row[f"{name}, low"], row[f"{name}, high"])
    words = " ".join(README.read_text().split())
    for name, pattern in (
        ("PSNR", r"a PSNR of (.*?) dB"),
        ("sulci kept", r"digits, and (.*?) of the contrast"),
    ):
        row = columns[1]
        _says(re.search(pattern, words)[1], row[name], row[f"{name}, low"], row[f"{name}, high"])


def test_the_autoencoders_card_has_the_terms_of_its_loss(module):
    terms = _recorded("first_stage")["terms"]
    assert list(terms) == list(module("first_stage").TERMS)
    for name, row in terms.items():
        cells = _row(AUTOENCODER_CARD, name, 6)
        for cell, column in zip(cells, ("PSNR", "sulci kept", "Dice, grey")):
            _says(cell, row[column], row[f"{column}, low"], row[f"{column}, high"])
        for cell, column in zip(cells[3:], ("FID", "KL", "deviation of latents"), strict=True):
            _says(cell, row[column])


def test_pixels_and_latents_had_the_same_time_and_readme_says_what_came(module):
    result, words = _recorded("pixel_or_latent"), " ".join(README.read_text().split())
    training = result["training"]
    halves = sum(training[name]["seconds"] for name in ("autoencoder", "latents"))
    assert training["pixels"]["seconds"] == pytest.approx(halves, rel=0.01)
    _says(re.search(r"the two halves took (.*?) s of an H100", words)[1], halves)
    for name, row in result["rows"].items():
        memory, near, sharp, *slots, skull = _row(README, name, 6)
        _says(memory, training[name.split(",")[0]]["memory, GB"])
        _says(near, row["KID"], row["KID, low"], row["KID, high"])
        _says(sharp, row["KID 128"], row["KID 128, low"], row["KID 128, high"])
        for slot, cell in zip(("atrophy", "ventricles"), slots, strict=True):
            _says(cell, row["read"][slot]["number"]["r"], row["read"][slot]["number"]["slope"])
        _says(skull, 100 * row["read"]["skull"]["word"]["right"])
    pixels, latents = (result["rows"][f"{name}, s = 1"] for name in ("pixels", "latents"))
    assert pixels["KID, low"] < 0 < pixels["KID, high"]
    assert latents["KID, low"] > 0
    seconds = [result["samples"][name]["seconds a sample"] for name in ("latents", "pixels")]
    _says(re.search(r"is the cheap call: (.*?) s a sample", words)[1], *seconds)


def test_pixels_are_trained_and_sampled_with_the_same_phrases(module):
    race = module("pixel_or_latent")
    objective, latents = race.PIXELS.objective, race.LATENTS.objective
    assert objective.shape == (1, 256, 256)
    assert objective.conditions == latents.conditions
    kept = {**latents.network, "in_channels": 1, "patch_size": 4}
    assert objective.network == kept, "nothing of the network differs but where it begins"
    data = race.Latents(torch.zeros(2, 1, 256, 256, dtype=torch.uint8), torch.full((2, 6), torch.nan), "")
    drawn = race.draw_step(race.PIXELS.replace(batch_size=2), data, objective, 0)
    assert objective(race.PIXELS.make_network(), drawn).isfinite().all()
