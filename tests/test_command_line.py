import subprocess
import sys

import pytest
from PIL import Image

from oasis_helpers.__main__ import main


def test_help_of_every_command():
    for command in ([], ["phantoms"], ["check"], ["train"], ["sample"], ["evaluate"]):
        result = subprocess.run(
            [sys.executable, "-m", "oasis_helpers", *command, "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "usage: python -m oasis_helpers" in result.stdout


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
    monkeypatch.setattr("oasis_helpers.intake.phantoms.make_phantoms", lambda out, workers: phantoms)
    assert main(["phantoms"]) == 0
    assert "phantoms, 4 cases" in capsys.readouterr().out


def test_train_interrupted_resumed_and_sampled(phantoms, tmp_path, monkeypatch, capsys):
    from dataclasses import replace

    from oasis_helpers import training

    tiny = replace(
        training.PROFILES["quick"],
        image_size=16,
        base_channels=8,
        channel_mult=(1, 2),
        attention_levels=(),
        T=20,
    )
    monkeypatch.setitem(training.PROFILES, "quick", tiny)
    out = tmp_path / "w.safetensors"
    train = ["train", "--data", str(phantoms.root), "--out", str(out), "--every", "2", "--set", "steps=4"]
    original = training.save_checkpoint

    def stop_after_saving(path, state):
        original(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_checkpoint", stop_after_saving)
    assert main(train) == 130
    assert not out.exists()
    assert main(train) == 1
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(training, "save_checkpoint", original)
    assert main([*train, "--resume"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.csv", "w.safetensors"]
    assert main([*train, "--resume"]) == 1
    picture = tmp_path / "s.png"
    sample = ["sample", "--weights", str(out), "--out", str(picture), "--number", "2", "--steps", "3"]
    assert main(sample) == 0
    assert Image.open(picture).width > 100
    assert main(sample) == 1
    assert "nothing is overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "no/such/place"], "does not exist"),
        (["train", "--data", "no/such/place", "--out", "no/w"], "does not exist"),
        (["sample", "--weights", "no.safetensors", "--out", "no.png"], "does not exist"),
        (["phantoms", "no/place", "--slices", "0"], "1 to 32"),
        (["train", "--set", "stepz=3"], "one of the keys image_size"),
        (["train", "--set", "steps=many"], "steps is now 200; give a value of the same kind"),
        (["train", "--set", "loss=l3"], "choose one of l2, l1, huber"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    result = subprocess.run(
        [sys.executable, "-m", "oasis_helpers", *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stderr
