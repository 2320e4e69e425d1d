import json
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from oasis_helpers import training
from oasis_helpers.diffusion import NoiseSchedule, diffusion_loss
from oasis_helpers.training import (
    EMA,
    PROFILES,
    TrainConfig,
    learning_rate,
    load_weights,
    pick_device,
    save_checkpoint,
    save_weights,
    train,
    validation_loss,
)
from oasis_helpers.unet import count_parameters

TINY = TrainConfig(
    image_size=16, base_channels=8, channel_mult=(1, 2), attention_levels=(1,), T=50,
    steps=6, batch_size=4, warmup=2, ema_decay=0.9,
)  # fmt: skip
SLICES = torch.randint(0, 256, (10, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _run(config=TINY, **settings):
    return list(train(config, SLICES, device="cpu", **settings))


def _weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_learns_and_reports():
    config = replace(TINY, steps=60, lr=5e-3, prediction="epsilon")
    states = _run(config)
    assert [s.step for s in states] == list(range(1, 61))
    first, last = (sum(s.loss for s in part) / 10 for part in (states[:10], states[-10:]))
    assert last < 0.9 * first
    assert states[0].lr == learning_rate(0, config)
    assert all(s.grad_norm > 0 and s.images_per_second > 0 for s in states)


def test_a_network_of_ones_own_is_trained_in_its_place():
    own = replace(TINY, seed=5).make_model()
    assert torch.equal(_weights(_run(model=own)[-1].model), _weights(own))
    assert not torch.equal(_weights(_run()[-1].model), _weights(own))


def test_the_seed_decides_and_global_state_is_left_alone():
    before = torch.random.get_rng_state()
    a, b = _run()[-1], _run()[-1]
    assert torch.equal(_weights(a.model), _weights(b.model))
    assert torch.equal(before, torch.random.get_rng_state())
    other = _run(replace(TINY, seed=1))[-1]
    assert not torch.equal(_weights(a.model), _weights(other.model))


def test_every_image_is_seen_once_an_epoch():
    seen = torch.cat([training._batch_indices(10, TINY, step) for step in range(5)])  # 20 = two epochs
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_resume_is_bit_equal(tmp_path, prediction):
    config = replace(TINY, prediction=prediction)
    straight = _run(config)[-1]
    for state in train(config, SLICES, device="cpu"):
        if state.step == 3:
            save_checkpoint(tmp_path / "c.safetensors", state)
            break
    resumed = _run(config, resume=tmp_path / "c.safetensors")
    assert [s.step for s in resumed] == [4, 5, 6]
    assert torch.equal(_weights(resumed[-1].model), _weights(straight.model))
    assert torch.equal(_weights(resumed[-1].ema.model), _weights(straight.ema.model))
    assert resumed[-1].loss == straight.loss


def test_weights_come_back_with_their_configuration(tmp_path):
    state = _run()[-1]
    save_weights(tmp_path / "new" / "w.safetensors", state.ema.model, TINY, data="noise")
    model, config = load_weights(tmp_path / "new" / "w.safetensors")
    assert config == TINY
    assert torch.equal(_weights(model), _weights(state.ema.model))
    assert not model.training
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["w.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(path, TINY.make_model(), TINY)
    before = path.read_bytes()

    def full_disk(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(training, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_weights(path, TINY.make_model(), TINY)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_ema_is_the_average_it_says():
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
    expected = 1.0
    for n in range(5):
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * 3.0
        assert float(ema.model.weight.detach()) == pytest.approx(expected, rel=1e-6)


def test_learning_rate_rises_and_falls_to_zero():
    config = replace(TINY, steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0)


def test_gradients_are_clipped(monkeypatch):
    seen = []
    original = torch.nn.utils.clip_grad_norm_

    def spy(parameters, limit):
        parameters = list(parameters)
        norm = original(parameters, limit)
        seen.append(float(torch.cat([p.grad.flatten() for p in parameters]).norm()))
        return norm

    monkeypatch.setattr(training.nn.utils, "clip_grad_norm_", spy)
    states = _run(replace(TINY, grad_clip=1e-3))
    assert max(seen) <= 1e-3 * 1.001
    assert max(s.grad_norm for s in states) > 1e-3


def test_validation_buckets_are_ordered_and_repeatable():
    model = TINY.make_model()
    config = replace(TINY, prediction="epsilon")
    losses = validation_loss(model, config, SLICES, buckets=5)
    assert losses.shape == (5,)
    torch.testing.assert_close(losses, torch.ones(5), atol=0.2, rtol=0)  # a fresh network outputs 0
    assert torch.equal(losses, validation_loss(model, config, SLICES, buckets=5))


def test_bf16_stays_near_fp32():
    a, b = _run(replace(TINY, precision="bf16")), _run()
    assert a[0].loss == pytest.approx(b[0].loss, rel=0.02)
    assert next(a[-1].model.parameters()).dtype == torch.float32


def test_a_loss_that_explodes_is_reported():
    with pytest.raises(FloatingPointError, match="at step"):
        _run(replace(TINY, lr=1e30, warmup=0, steps=20))


def test_shipped_weights_fit_their_profile():
    model, config = load_weights()
    assert config == replace(PROFILES["laptop"], steps=config.steps)
    assert training.WEIGHTS.stat().st_size < 20e6
    assert 15e6 < count_parameters(PROFILES["full"].make_model()) < 25e6
    assert count_parameters(model) < 5e6


def test_device_is_one_that_works():
    assert torch.ones(1, device=pick_device()).item() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"precision": "fp16"}, "fp32, bf16, auto"),
        ({"prediction": "noise"}, "v_prediction"),
    ],
)
def test_configuration_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_wrong_images_are_named():
    with pytest.raises(ValueError, match="load_slices\\(root, 16\\)"):
        next(train(TINY, torch.zeros(4, 1, 32, 32, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="uint8"):
        next(train(TINY, torch.zeros(4, 1, 16, 16)))


def test_wrong_files_are_named(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(FileNotFoundError, match="Train it first"):
        load_weights(path)
    with pytest.raises(FileNotFoundError, match="save_checkpoint"):
        _run(resume=path)
    save_weights(path, TINY.make_model(), TINY)
    with pytest.raises(ValueError, match="weights only"):
        _run(resume=path)
    whole = path.read_bytes()
    for damaged in (b"", b"not safetensors at all", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a whole"):
            load_weights(path)
        with pytest.raises(ValueError, match="not a whole"):
            _run(resume=path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no configuration"):
        load_weights(path)
    config = json.dumps(asdict(TINY))
    save_file({"a": torch.zeros(1)}, path, {"config": config, "format": "1"})
    with pytest.raises(ValueError, match="another architecture"):
        load_weights(path)
    save_file({"a": torch.zeros(1)}, path, {"config": config, "format": "99"})
    with pytest.raises(ValueError, match="update oasis_helpers"):
        load_weights(path)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    state = next(train(TINY, SLICES, device="cpu"))
    save_checkpoint(tmp_path / "c", state)
    with pytest.raises(ValueError, match=r"lr 0.001 ≠ 0.5"):
        _run(replace(TINY, lr=0.5), resume=tmp_path / "c")


# ---- choices of a run -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_every_loss_trains(loss, gamma):
    states = _run(replace(TINY, loss=loss, min_snr_gamma=gamma, steps=60, lr=5e-3, prediction="epsilon"))
    assert sum(s.loss for s in states[-10:]) < 0.95 * sum(s.loss for s in states[:10])


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weighs_the_error_of_the_image(prediction):
    # Whatever is predicted, the weighted loss is min(SNR, γ) times the squared error of x₀.
    schedule = NoiseSchedule.cosine(50)
    generator = torch.Generator().manual_seed(0)
    x0, noise, wrong = torch.randn((3, 7, 1, 8, 8), generator=generator)
    t = torch.tensor([0, 3, 10, 20, 30, 40, 48])

    def model(x, t, y):
        return schedule.target(x0, noise, t, prediction) + wrong

    weighted = diffusion_loss(model, schedule, x0, t, noise, prediction, min_snr_gamma=5.0)
    x_t = schedule.q_sample(x0, t, noise)
    guess = schedule.predict_x0(x_t, t, model(x_t, t, None), prediction)
    snr = schedule.snr()[t]
    assert torch.allclose(
        weighted, (snr.clamp(max=5) * (guess - x0).square().flatten(1).mean(1)).float(), rtol=1e-3
    )


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_learning_rate_schedules(name):
    config = replace(TINY, steps=12, warmup=2, lr=1.0, lr_schedule=name)
    rates = [learning_rate(n, config) for n in range(13)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[7] == pytest.approx({"cosine": 0.5, "linear": 0.5, "constant": 1.0}[name])
    assert rates[12] == pytest.approx(0.0 if name != "constant" else 1.0)


def test_parts_of_a_batch_give_the_whole(monkeypatch):
    whole, parts = _run(), _run(replace(TINY, accumulate=4))
    assert [s.loss for s in whole] == pytest.approx([s.loss for s in parts], rel=1e-4)
    assert [s.grad_norm for s in whole] == pytest.approx([s.grad_norm for s in parts], rel=1e-3)
    with pytest.raises(ValueError, match="does not fit 1 processes in 3 parts"):
        _run(replace(TINY, accumulate=3))

    original = training.diffusion_loss

    def small_memory(model, schedule, x0, *rest, **more):
        if len(x0) > 1:
            raise torch.OutOfMemoryError("no room")
        return original(model, schedule, x0, *rest, **more)

    monkeypatch.setattr(training, "diffusion_loss", small_memory)
    short = _run()[-1]
    assert short.config.accumulate == 4
    assert torch.allclose(_weights(short.model), _weights(parts[-1].model), atol=1e-6)
    monkeypatch.setattr(training, "diffusion_loss", lambda *a, **k: small_memory(None, None, range(2)))
    with pytest.raises(MemoryError, match="1 images of 16×16 at once do not fit"):
        _run()


def test_auto_precision_is_measured_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "faster_precision", lambda model, config: "bf16")
    config = replace(TINY, precision="auto")
    states = train(config, SLICES, device="cpu")
    state = next(states)
    assert state.config.precision == "bf16"
    save_checkpoint(tmp_path / "c.safetensors", state)
    resumed = _run(config, resume=tmp_path / "c.safetensors")
    assert resumed[0].step == 2
    assert resumed[0].config.precision == "bf16"


def test_faster_precision_is_one_of_the_two():
    model = TINY.make_model()
    assert training.faster_precision(model, TINY) in ("fp32", "bf16")
    assert all(p.grad is None for p in model.parameters())


def test_channels_last_gives_the_same():
    a, b = _run()[-1], _run(replace(TINY, channels_last=True))[-1]
    assert torch.allclose(_weights(a.model), _weights(b.model), atol=1e-4)


# ---- the files of a run -------------------------------------------------------------------------------


def test_a_run_with_files(tmp_path):
    out = tmp_path / "run.safetensors"
    states = training.train_to(out, TINY, SLICES, device="cpu", every=1, keep=2, data="test")
    for state in states:
        assert [p.name for p in training.checkpoints(out)] == [
            f"run.step{n:07d}.checkpoint.safetensors" for n in range(max(1, state.step - 1), state.step + 1)
        ]
    assert training.checkpoints(out) == []
    model, config = load_weights(out)
    assert config == TINY
    assert torch.equal(_weights(model), _weights(_run()[-1].ema.model))
    lines = (tmp_path / "run.csv").read_text().splitlines()
    assert lines[0] == "step,loss,lr,grad_norm,images_per_second"
    assert [line.split(",")[0] for line in lines[1:]] == list("123456")
    with pytest.raises(FileExistsError, match="that run is finished"):
        next(training.train_to(out, TINY, SLICES))


def test_a_run_that_was_cut_goes_on_from_what_is_whole(tmp_path):
    out = tmp_path / "run.safetensors"
    states = training.train_to(out, TINY, SLICES, device="cpu", every=2)
    for state in states:
        if state.step == 5:
            break
    states.close()
    newest = training.checkpoints(out)[-1]
    newest.write_bytes(newest.read_bytes()[:1000])  # step 4 is cut, step 2 is whole
    with pytest.raises(FileExistsError, match="resume"):
        next(training.train_to(out, TINY, SLICES))
    steps = [s.step for s in training.train_to(out, TINY, SLICES, device="cpu", every=2, resume=True)]
    assert steps == [3, 4, 5, 6]
    assert torch.equal(_weights(load_weights(out)[0]), _weights(_run()[-1].ema.model))
    lines = (tmp_path / "run.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == list("123456")
    with pytest.raises(FileNotFoundError, match=r"no whole checkpoint beside it \(0 found\)"):
        next(training.train_to(tmp_path / "no.safetensors", TINY, SLICES, resume=True))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    out, original = tmp_path / "run.safetensors", training.save_file

    def full(tensors, path, metadata):
        if metadata["step"] == "4":
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, path, metadata)

    monkeypatch.setattr(training, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        list(training.train_to(out, TINY, SLICES, device="cpu", every=2))
    assert [p.name for p in tmp_path.iterdir() if "step" in p.name] == [
        "run.step0000002.checkpoint.safetensors"
    ]


def test_a_loss_that_explodes_names_the_last_checkpoint(tmp_path):
    config = replace(TINY, lr=1e30, warmup=0, grad_clip=1e30, steps=50)
    with pytest.raises(
        FloatingPointError, match=r"resume from the last checkpoint\. The last is .*step0000001"
    ):
        list(training.train_to(tmp_path / "run.safetensors", config, SLICES, device="cpu", every=1))


@pytest.fixture
def foreground():
    """Ctrl-C raises, as in a terminal: a test run in the background would ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_the_background_is_ignored(tmp_path, foreground):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for state in training.train_to(tmp_path / "run.safetensors", TINY, SLICES, device="cpu"):
        if state.step == 2:
            signal.raise_signal(signal.SIGINT)
    assert state.step == TINY.steps


def test_ctrl_c_ends_after_the_step_with_a_checkpoint(tmp_path, foreground):
    out = tmp_path / "run.safetensors"
    seen = []

    def interrupt_at_2(states):
        for state in states:
            seen.append(state.step)
            if state.step == 2:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 2; .*step0000002\..* has all to go on"):
        interrupt_at_2(training.train_to(out, TINY, SLICES, device="cpu"))
    assert seen == [1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    list(training.train_to(out, TINY, SLICES, device="cpu", resume=True))
    assert torch.equal(_weights(load_weights(out)[0]), _weights(_run()[-1].ema.model))


def test_two_processes_train_as_one(phantoms, tmp_path):
    settings = ["image_size=16", "base_channels=8", "channel_mult=(1,2)", "attention_levels=(1,)"]
    settings += ["T=50", "steps=4", "batch_size=4"]
    command = ["-m", "oasis_helpers", "train", "--data", str(phantoms.root), "--set", *settings, "--out"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    for name, start in (("one", []), ("two", launch)):
        arguments = [*start, *command, str(tmp_path / f"{name}.safetensors")]
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_weights(tmp_path / f"{name}.safetensors")[0] for name in ("one", "two"))
    assert torch.allclose(_weights(one), _weights(two), atol=1e-5)
    logs = [(tmp_path / f"{name}.csv").read_text().splitlines()[1:] for name in ("one", "two")]
    for a, b in zip(*logs, strict=True):
        assert float(a.split(",")[1]) == pytest.approx(float(b.split(",")[1]), rel=1e-4)
