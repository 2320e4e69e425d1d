import errno
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import joblib
import pytest
import torch
from PIL import Image

from oasis_helpers import checkout, evaluation, exercises, plots, training
from oasis_helpers.__main__ import _draw, _parser, _with_settings, main
from oasis_helpers.autoencoder import LATENT, Autoencoding, load_stable_diffusion
from oasis_helpers.layout import DataLocation, image_name
from oasis_helpers.sampling import clipped, sample_images
from oasis_helpers.training import (
    PROFILES,
    WEIGHTS,
    LatentDenoising,
    TrainConfig,
    load_weights,
    save_weights,
)

TINY = TrainConfig(steps=4, batch_size=4).replace(
    image_size=16, base_channels=8, channel_mult=(1, 2), attention_levels=(), T=20
)
COMMANDS = (
    "lab",
    "test",
    "progress",
    "course",
    "phantoms",
    "convert",
    "check",
    "train",
    "sample",
    "evaluate",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Weights of a tiny network."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, TINY.make_network(), TINY, {"data": "oasis: 36 cases"})
    return path


@pytest.fixture
def undrawn(monkeypatch):
    """To draw samples fails the test."""

    def draw(args, denoise, y=None):
        raise AssertionError("samples were drawn")

    monkeypatch.setattr("oasis_helpers.__main__._draw", draw)


def _fails(arguments, message, capsys):
    """The command fails with one line that holds ``message``."""
    assert main([str(argument) for argument in arguments]) == 1
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert printed.out == ""


def test_help_of_every_command(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert f"usage: python -m oasis_helpers {command}" in shown
        assert "default: None" not in shown
        assert ") (default" not in shown


def test_help_names_the_defaults_in_effect():
    (actions,) = (a for a in _parser()._actions if a.choices)
    for command in ("train", "sample", "evaluate"):
        parser = actions.choices[command]
        shown = " ".join(parser.format_help().split())
        for option, default in vars(parser.parse_args([])).items():
            if isinstance(default, str | int) and not isinstance(default, bool):
                assert f"(default: {default})" in shown, f"{command} --{option}"


def test_phantoms_then_check(tmp_path, capsys):
    out = str(tmp_path / "p")
    assert main(["phantoms", out, "--cases", "1", "0", "1", "--slices", "1", "--workers", "1"]) == 0
    assert "phantoms, 2 cases" in capsys.readouterr().out
    assert main(["check", out]) == 0
    assert "phantoms: ok" in capsys.readouterr().out
    (tmp_path / "p" / "keras_png_slices_test" / "case_441_slice_0.nii.png").write_bytes(b"")
    assert main(["check", out]) == 1
    assert "corrupt: 1" in capsys.readouterr().out


def test_default_phantoms_go_to_the_cache(monkeypatch, phantoms, capsys):
    from oasis_helpers.intake.phantoms import phantom_cache

    asked = []
    monkeypatch.setattr(
        "oasis_helpers.intake.phantoms.make_phantoms", lambda out, workers: asked.append(out) or phantoms
    )
    assert main(["phantoms"]) == 0
    assert "phantoms, 4 cases" in capsys.readouterr().out
    assert asked == [phantom_cache()]


# ---- train ----------------------------------------------------------------------------------------


@pytest.fixture
def train(monkeypatch, phantoms, tmp_path):
    """A command that trains a tiny network for four steps with a checkpoint every two."""
    monkeypatch.setitem(training.PROFILES, "quick", TINY)
    out = tmp_path / "w.safetensors"
    return ["train", "--data", str(phantoms.root), "--out", str(out), "--every", "2"], out


def test_train_interrupted_resumed_and_sampled(train, tmp_path, monkeypatch, capsys):
    command, out = train
    with monkeypatch.context() as patched:

        def stop_after_saving(path, state):
            training.save_checkpoint(path, state)
            raise KeyboardInterrupt

        patched.setattr("oasis_helpers.training.run.save_checkpoint", stop_after_saving)
        assert main(command) == 130
    assert not out.exists()
    printed = capsys.readouterr()
    assert "phantoms, 4 cases; quick profile, 4 steps on " in printed.out
    assert "weights in" not in printed.out
    _fails_after_its_first_line(command, "resume (--resume) to go on with that run", capsys)
    assert main([*command, "--resume"]) == 0
    assert f"weights in {out}" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.safetensors", "w.safetensors.run"]
    assert {p.name for p in training.run_folder(out).iterdir()} <= {"metrics.csv", "tensorboard"}
    rows = (training.run_folder(out) / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2", "3", "4"]
    assert training.read_header(out).card["data"] == "phantoms: 2 cases"
    _fails_after_its_first_line([*command, "--resume"], "that run is finished", capsys)

    picture = tmp_path / "s.png"
    sample = ["sample", "--weights", out, "--out", picture, "--number", "2", "--steps", "3"]
    assert main([str(argument) for argument in sample]) == 0
    assert f"2 samples in {picture}" in capsys.readouterr().out
    with Image.open(picture) as shown:
        assert shown.format == "PNG"
        assert shown.width > 100


def test_train_with_what_is_known_of_phantoms_and_people(phantoms, tmp_path, monkeypatch, capsys):
    tiny = PROFILES["guided"].replace(
        steps=4, batch_size=4, precision="fp32", image_size=16, base_channels=8, channel_mult=(1, 2),
        attention_levels=(1,), T=50,
    )  # fmt: skip
    monkeypatch.setitem(training.PROFILES, "guided", tiny)
    people = shutil.copytree(phantoms.root, tmp_path / "people")
    (people / "phantoms.json").unlink()
    for root, names in (
        (phantoms.root, ["height", "atrophy", "head"]),
        (people, ["height", "age", "sex", "cdr"]),
    ):
        out = tmp_path / f"{root.name}.safetensors"
        command = ["train", "--profile", "guided", "--data", str(root), "--out", str(out), "--every", "2"]
        if root == people:
            _fails_after_its_first_line(
                command, "has no subjects.csv, so nothing is known of its cases", capsys
            )
            assert not training.run_folder(out).exists()
            (people / "subjects.csv").write_text("ID,M/F,Age,CDR\nOAS1_0001_MR1,F,74,0.5\n")
        with monkeypatch.context() as patched:
            patched.setattr("oasis_helpers.training.run.save_weights", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                main(command)
        training.checkpoints(out)[-1].unlink()  # as if it had been stopped after step 2
        assert main([*command, "--resume"]) == 0
        assert f"told {', '.join(names)}" in capsys.readouterr().out
        assert list(load_weights(out).network.conditions) == names


def test_an_autoencoder_and_a_model_of_its_latents(phantoms, tmp_path, monkeypatch, capsys):
    small = Autoencoding(64, encoder_widths=(8, 8), decoder_widths=(8, 8), encoder_blocks=1, decoder_blocks=1)
    monkeypatch.setitem(training.PROFILES, "autoencoder", TrainConfig(small, steps=2, batch_size=2))
    latent = TrainConfig(LatentDenoising(image_size=8), steps=2, batch_size=4).replace(
        base_channels=8, channel_mult=(1, 2), attention_levels=(), reading_steps=2
    )
    monkeypatch.setitem(training.PROFILES, "latent", latent)
    first, second = (tmp_path / f"{name}.safetensors" for name in ("a", "l"))
    command = ["train", "--data", str(phantoms.root), "--every", "1", "--profile"]
    pixels = [*command, "quick", "--autoencoder", str(first)]
    _fails_after_its_first_line(pixels, "--autoencoder is for --profile latent", capsys)
    latent = [*command, "latent", "--autoencoder", str(first), "--out", str(second)]
    _fails_after_its_first_line(latent, f"{first} does not exist. Train it first", capsys)
    assert main([*command, "autoencoder", "--out", str(first), "--set", "latent_channels=3"]) == 0
    assert main(latent) == 0
    denoise, _ = load_stable_diffusion(second, first)
    assert denoise.shape == (3, 8, 8)  # of as many channels as the autoencoder has


def test_a_head_for_a_prompt(tmp_path, capsys):
    """By the weights that ship: the size of the picture, and that another phrase gives another head."""
    out = [tmp_path / f"{name}.png" for name in ("a", "b", "again")]
    for path, prompt in zip(out, ("marked atrophy", "no atrophy", "Marked atrophy,")):
        command = ["sample", "--prompt", prompt, "--number", "1", "--method", "dpm_solver", "--steps", "2"]
        assert main([*command, "--out", str(path)]) == 0
    first, other, again = (
        [*Image.open(path).convert("L").crop((30, 80, 290, 290)).getdata()] for path in out
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("marked atrofy", "the word 'atrofy' is unknown: the nearest known are 'atrophy'"),
        ("", "the prompt is empty"),
        ("atrophy 0.65", "atrophy 0.65 cannot be said"),
        ("mild atrophy, no atrophy", "says atrophy twice"),
    ],
)
def test_a_prompt_that_cannot_be_read(prompt, message, tmp_path, undrawn, capsys):
    _fails(["sample", "--prompt", prompt, "--out", tmp_path / "new" / "x.png"], message, capsys)
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_kind_are_named(tmp_path, undrawn, capsys):
    out = tmp_path / "x.png"
    for command in (["sample", "--weights", LATENT], ["evaluate", LATENT, "--number", "100"]):
        _fails([*command, "--out", out], "makes latents of 4×32×32, not pictures", capsys)
    pixels = ["sample", "--prompt", "no atrophy", "--weights", WEIGHTS, "--out", out]
    _fails(pixels, "is of kind 'denoiser', not a denoiser of latents", capsys)
    assert list(tmp_path.iterdir()) == []


def _fails_after_its_first_line(command, message, capsys):
    assert main(command) == 1
    printed = capsys.readouterr()
    assert message in printed.err.splitlines()[-1]
    assert "weights in" not in printed.out


def test_a_run_that_died_before_its_weights_is_finished(train, monkeypatch, capsys):
    command, out = train
    with monkeypatch.context() as patched:

        def die(*args):
            raise KeyboardInterrupt

        patched.setattr("oasis_helpers.training.run.save_weights", die)
        assert main(command) == 130
    assert [p.name for p in training.checkpoints(out)] == [
        "step-0000002.safetensors",
        "step-0000004.safetensors",
    ]
    _fails_after_its_first_line([*command, "--resume", "--set", "steps=3"], "give steps of at least", capsys)
    assert not out.exists()
    assert main([*command, "--resume"]) == 0
    assert f"weights in {out}" in capsys.readouterr().out
    assert load_weights(out).shape == (1, 16, 16)
    assert training.checkpoints(out) == []


def test_no_weights_are_announced_where_none_were_written(train, monkeypatch, capsys):
    command, out = train
    monkeypatch.setattr(training, "train_to", lambda *args, **more: iter(()))
    main(command)
    assert not out.exists()
    assert "weights in" not in capsys.readouterr().out


def test_checkpoints_every_0_steps_are_refused(train, tmp_path, capsys):
    command, _ = train
    _fails_after_its_first_line([*command[:-1], "0"], "every is 0: give 1 or more.", capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("profile", ["quick", "laptop"])  # without one, and with one
def test_min_snr_gamma_is_a_number_or_none(profile, capsys):
    settings = [f"min_snr_gamma={value}" for value in (None, 5, 2.5)]
    # an offset to no weight would be refused
    found = [
        _with_settings(PROFILES[profile], [one, "snr_offset=0"]).objective.min_snr_gamma for one in settings
    ]
    assert found == [None, 5, 2.5]
    for wrong in ("abc", "True", "(5,)"):
        _fails(["train", "--profile", profile, "--set", f"min_snr_gamma={wrong}"], "same kind", capsys)


def test_snr_offset_is_a_number_beside_gamma(capsys):
    config = _with_settings(PROFILES["quick"], ["min_snr_gamma=5", "snr_offset=1"])
    assert config.objective.snr_offset == 1
    _fails(["train", "--set", "snr_offset=1"], "give min_snr_gamma as well", capsys)
    _fails(["train", "--set", "snr_offset=None"], "same kind", capsys)


def test_settings_go_where_they_belong():
    config = _with_settings(
        PROFILES["quick"], ["steps=7", "lr=1", "channel_mult=(1,2)", "schedule=linear", "channels_last=True"]
    )
    assert (config.steps, config.lr, config.channels_last) == (7, 1, True)
    assert config.objective.schedule == "linear"
    assert config.objective.network["channel_mult"] == (1, 2)
    assert config.objective.network["base_channels"] == PROFILES["quick"].objective.network["base_channels"]


# ---- sample ---------------------------------------------------------------------------------------


def test_sample_makes_the_folder(tiny, tmp_path):
    out = tmp_path / "new" / "deep" / "x.PNG"
    assert main(["sample", "--weights", str(tiny), "--out", str(out), "--number", "1", "--steps", "2"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_ddpm_takes_all_steps_whatever_their_number(tiny, tmp_path, monkeypatch):
    """20 of them here, whatever --steps says."""
    drawn = []
    monkeypatch.setattr(plots, "grid", lambda images, **more: drawn.extend(images) or plots.Figure())
    command = ["sample", "--weights", str(tiny), "--number", "1", "--method", "ddpm", "--steps", "99"]
    assert main([*command, "--out", str(tmp_path / "x.png")]) == 0
    assert torch.equal(drawn[0], sample_images(clipped(load_weights(tiny)), 1, method="ddpm")[0])


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EROFS, "cannot be opened or made (Read-only file system). Choose another folder"),
        (errno.EACCES, "cannot be opened or made (Permission denied). Choose another folder"),
        (errno.ENOSPC, "the disk is full. Make room"),
    ],
)
def test_what_the_system_refuses_is_said_with_what_to_do(number, advice, tmp_path, monkeypatch, capsys):
    def refuse(*args, **settings):
        raise OSError(number, os.strerror(number), str(tmp_path / "out"))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(["phantoms", str(tmp_path / "out"), "--cases", "1", "1", "1"]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert str(tmp_path / "out") in said
    assert advice in said


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("samples", "give a name that ends in .png"),
        ("samples.jpg", "give a name that ends in .png"),
        ("there.png", "there.png exists. Give another --out: nothing is overwritten."),
        ("there.png/x.png", "there.png is a file, not a folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_drawing(
    out, message, tiny, tmp_path, capsys, undrawn
):
    (tmp_path / "there.png").write_bytes(b"mine")
    _fails(["sample", "--weights", tiny, "--out", tmp_path / out, "--steps", 2], message, capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["there.png"]
    assert (tmp_path / "there.png").read_bytes() == b"mine"


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--number", 0, "--number 0: "),
        ("--number", -1, "--number -1: "),
        ("--steps", 0, "--steps 0: give 1 to 20."),
        ("--steps", 21, "--steps 21: give 1 to 20."),
        ("--seed", -1, "seed is -1: give a whole number from 0"),
        ("--seed", 2**31, "give a whole number from 0 to 2,147,483,647."),
    ],
)
def test_numbers_out_of_range_are_refused_before_drawing(
    command, option, value, message, tiny, phantoms, tmp_path, capsys, undrawn
):
    more = ["--weights", tiny] if command == "sample" else [tiny, "--data", phantoms.root]
    _fails([command, *more, "--out", tmp_path / "x.png", option, value], message, capsys)
    assert list(tmp_path.iterdir()) == []


def _drawn(tiny, number, seed=0, method="ddim"):
    how = Namespace(number=number, method=method, steps=3, seed=seed)
    return _draw(how, clipped(load_weights(tiny)))


def test_many_samples_are_drawn_in_batches_and_none_comes_twice(tiny):
    many, few = _drawn(tiny, 70), _drawn(tiny, 64)
    assert many.shape == (70, 1, 16, 16)
    assert torch.equal(many[:64], few)
    assert len(many.unique(dim=0)) == 70
    # and the second batch of a seed is not the first of the next one
    others = torch.cat([many, *(_drawn(tiny, 6, seed) for seed in (1, 2, 3))])
    assert len(others.unique(dim=0)) == len(others)


# ---- evaluate -------------------------------------------------------------------------------------


def _set(phantoms, root, validate=25, test=50):
    """The small set with its held-out slices under the numbers of so many cases each."""
    for split, cases in (("train", None), ("validate", validate), ("test", test)):
        folder = DataLocation(root, "oasis").folder(split)
        if cases is None:
            shutil.copytree(phantoms.folder(split), folder)
            continue
        folder.mkdir()
        for case in range(402, 402 + cases):
            for index, path in enumerate(sorted(phantoms.folder(split).iterdir())):
                shutil.copy(path, folder / image_name(case, index))
    return root


def _strictly(constant):
    raise AssertionError(f"{constant} is no JSON")


@pytest.mark.parametrize("ending", ["json", "png"])
def test_a_report_that_is_there_is_refused_before_drawing(ending, tiny, phantoms, tmp_path, capsys, undrawn):
    there = tmp_path / f"r.{ending}"
    there.write_bytes(b"mine")
    command = ["evaluate", tiny, "--data", phantoms.root, "--steps", 2, "--out", tmp_path / "r"]
    _fails(command, f"{there} exists. Give another --out: nothing is overwritten.", capsys)
    assert list(tmp_path.iterdir()) == [there]
    assert there.read_bytes() == b"mine"


def test_evaluate_with_a_segmenter_of_ones_own_where_figures_are_undefined(
    tiny, phantoms, tmp_path, monkeypatch
):
    segmenter, out = tmp_path / "own.safetensors", tmp_path / "new" / "report"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = evaluation.Segmenter()  # has learned nothing and finds no brain anywhere
    evaluation.save_segmenter(segmenter, network, {"data": "oasis: 36 cases"})
    images = torch.rand((100, 1, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr("oasis_helpers.__main__._draw", lambda args, denoise, y=None: images)
    monkeypatch.setattr(evaluation, "evaluate", partial(evaluation.evaluate, rounds=2))
    (tmp_path / "data").mkdir()
    data = _set(phantoms, tmp_path / "data")
    command = ["evaluate", tiny, "--data", data, "--out", out, "--segmenter", segmenter]
    assert main([str(a) for a in [*command, "--number", "100", "--method", "ddpm"]]) == 0
    report = json.loads(out.with_suffix(".json").read_text(), parse_constant=_strictly)
    assert (
        report["setting"]
        == "tiny.safetensors: 100 samples, ddpm, seed 0; OASIS, 77 cases; compared with 25 other heads"
    )
    first, *failed = report["notes"]
    assert first == "copies were searched for among 2 training cases of the 36 that the weights saw"
    assert all(note.startswith("a control failed: ") for note in failed)
    for row in report["rows"].values():
        assert {name for name, value in row.items() if value is None} >= {"FID", "anatomy: symmetry"}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"test": 49}, "half of the test split, has 96 slices of 24 cases: a report needs 100"),
        ({"validate": 24}, "the validate split, has 96 slices of 24 cases: a report needs 100"),
        ({"validate": 0}, "keras_png_slices_validate"),
    ],
)
def test_a_set_too_small_to_judge_by_is_refused_before_drawing(
    sizes, message, phantoms, tmp_path, capsys, undrawn
):
    data = _set(phantoms, tmp_path, **sizes)
    if sizes.get("validate") == 0:
        DataLocation(data, "oasis").validate.rmdir()
    _fails(["evaluate", "--data", data, "--out", tmp_path / "r"], message, capsys)
    assert not list(tmp_path.glob("r.*"))


def test_weights_are_no_segmenter(phantoms, tiny, tmp_path, capsys, undrawn):
    command = ["evaluate", "--data", phantoms.root, "--out", tmp_path / "r", "--segmenter", tiny, tiny]
    _fails([*command, "--steps", "5"], f"{tiny} holds no segmenter", capsys)


# ---- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "no/such/place"], "does not exist"),
        (["train", "--data", "no/such/place", "--out", "no/w"], "does not exist"),
        (["sample", "--weights", "no.safetensors", "--out", "no.png"], "does not exist"),
        (["evaluate", "--data", "no/such/place"], "does not exist"),
        (["evaluate", "--number", "99"], "--number 99: give at least 100."),
        (["phantoms", "no/place", "--slices", "0"], "1 to 32"),
        (
            ["phantoms", "--seed", "1", "--slices", "1"],
            "--slices, --seed: the default set has its own",
        ),
        (["train", "--set", "stepz=3"], "--set stepz=3: give key=value with one of the keys "),
        (["train", "--set", "steps"], "--set steps: give key=value with one of the keys "),
        (["train", "--set", "steps=many"], "steps is now 200; give a value of the same kind"),
        (["train", "--set", "steps=True"], "steps is now 200; give a value of the same kind"),
        (["train", "--set", "lr=True"], "lr is now 0.002; give a value of the same kind"),
        (["train", "--set", "steps=0"], "steps is 0: give a number above 0"),
        (["train", "--set", "seed=-1"], "seed is -1: give a whole number from 0"),
        (["train", "--set", "loss=l3"], "choose one of l2, l1, huber"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys, undrawn):
    _fails(arguments, message, capsys)


def test_a_mistake_leaves_a_shell_one_line_and_an_exit_code():
    result = subprocess.run(
        [sys.executable, "-m", "oasis_helpers", "check", "no/such/place"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: no")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("there", "there is a folder: give a name for the two files"),
        ("mine.txt/deep/report", "mine.txt is a file, not a folder"),
    ],
)
def test_a_report_without_a_place_is_refused_before_data_is_sought(
    out, message, tiny, tmp_path, capsys, undrawn
):
    (tmp_path / "there").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    command = ["evaluate", tiny, "--steps", 2, "--data", tmp_path / "nowhere"]
    _fails([*command, "--out", tmp_path / out], message, capsys)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mine.txt", "there"]


# ---- the course ---------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch):
    """What is started instead of being run, with its environment."""
    calls = []

    def run(command, cwd, env, check):
        calls.append((command[1:], env))
        return subprocess.CompletedProcess(command, len(calls) if "fail" in env else 0)

    monkeypatch.setattr(checkout.subprocess, "run", run)
    for name in ("make_phantoms", "fresh_heads"):
        monkeypatch.setattr(checkout, name, lambda *args: None)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_lab_opens_notebook_1_with_all_cores(started):
    assert main(["lab", "--port", "8889", "--headless"]) == 0
    ((command, environment),) = started
    assert command[:2] == ["-m", "jupyter"]
    assert {"lab", "--port=8889", "--no-browser", "notebooks/01_data_exploration.ipynb"} <= set(command)
    assert environment["OMP_NUM_THREADS"] == str(joblib.cpu_count())


def test_test_runs_units_and_notebooks_with_one_thread_each(started):
    assert main(["test"]) == 0
    ((command, environment),) = started
    assert command[:2] == ["-m", "pytest"]
    assert {"tests", "notebooks", "--nbval"} <= set(command)
    assert environment["OMP_NUM_THREADS"] == "1"


def test_test_says_that_something_failed_and_leaves_the_users_threads(started, monkeypatch):
    monkeypatch.setenv("fail", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert main(["test"]) == 1
    ((_, environment),) = started
    assert environment["OMP_NUM_THREADS"] == "2"


def test_without_a_checkout_the_course_commands_say_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(checkout, "NOTEBOOKS", tmp_path)
    for command in (["lab"], ["test"], ["course", str(tmp_path / "out")]):
        assert main(command) == 1
        assert "this command needs a checkout of the project" in capsys.readouterr().err


def test_progress_lists_what_passed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(exercises, "progress_file", lambda: tmp_path / "progress.json")
    keys = [*exercises.exercises()]
    (tmp_path / "progress.json").write_text(json.dumps([keys[0], "99.9"]))
    assert main(["progress"]) == 0
    printed = capsys.readouterr().out
    assert f"✓ {keys[0]}" in printed
    assert f"· {keys[1]}" in printed
    assert f"1 of {len(keys)} exercises pass" in printed
