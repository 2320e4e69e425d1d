import csv
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from oasis_helpers import training
from oasis_helpers.diffusion import NoiseSchedule, diffusion_loss
from oasis_helpers.seeds import SEEDS, generator
from oasis_helpers.training import (
    EMA,
    PROFILES,
    Denoising,
    TrainConfig,
    draw_step,
    fingerprint,
    learning_rate,
    load_weights,
    loop,
    pick_device,
    read_header,
    run,
    save,
    save_checkpoint,
    save_weights,
    train,
    validation_loss,
    weights,
)
from oasis_helpers.unet import count_parameters

TINY = TrainConfig(steps=6, batch_size=4, warmup=2, ema_decay=0.9).replace(
    image_size=16, base_channels=8, channel_mult=(1, 2), attention_levels=(1,), T=50
)
SLICES = torch.randint(0, 256, (10, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _run(config=TINY, **settings):
    return list(train(config, SLICES, device="cpu", **settings))


def _weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_learns_and_reports():
    config = TINY.replace(steps=60, lr=5e-3, prediction="epsilon")
    states = _run(config)
    assert [s.step for s in states] == list(range(1, 61))
    first, last = (sum(s.loss for s in part) / 10 for part in (states[:10], states[-10:]))
    assert last < 0.9 * first
    assert states[0].lr == learning_rate(0, config)
    assert all(s.grad_norm > 0 and s.images_per_second > 0 for s in states)


def test_the_loop_is_algorithm_1():
    # One step by hand, with nothing of the loop's but what it draws: the same loss and the same weights.
    config = TINY.replace(steps=1, warmup=0, grad_clip=1e9)
    (state,) = _run(config)
    network, drawn = config.make_network(), draw_step(config, SLICES, config.objective, 0)
    x0 = drawn["images"].float() / 127.5 - 1
    a = NoiseSchedule.cosine(50).alphas_cumprod[drawn["t"]].float().reshape(-1, 1, 1, 1)
    output = network(a.sqrt() * x0 + (1 - a).sqrt() * drawn["noise"], drawn["t"])
    loss = (output - (a.sqrt() * drawn["noise"] - (1 - a).sqrt() * x0)).square().mean()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0, betas=(0.9, 0.99))
    loss.backward()
    optimizer.step()
    assert state.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert torch.allclose(_weights(state.model), _weights(network), atol=1e-6)


def test_a_network_of_ones_own_is_trained_in_its_place():
    own = TINY.replace(seed=5).make_network()
    assert torch.equal(_weights(_run(model=own)[-1].model), _weights(own))
    assert not torch.equal(_weights(_run()[-1].model), _weights(own))


def test_the_seed_decides_and_global_state_is_left_alone():
    before = torch.random.get_rng_state()
    a, b = _run()[-1], _run()[-1]
    assert torch.equal(_weights(a.model), _weights(b.model))
    assert torch.equal(before, torch.random.get_rng_state())
    other = _run(TINY.replace(seed=1))[-1]
    assert not torch.equal(_weights(a.model), _weights(other.model))


# ---- seeds ------------------------------------------------------------------------------------------


def test_two_seeds_draw_other_slices_times_and_noise():
    images = torch.arange(64, dtype=torch.uint8).reshape(64, 1, 1, 1).expand(64, 1, 16, 16)
    for step in (0, 1, 20):
        zero, one = (draw_step(TINY.replace(seed=s), images, TINY.objective, step) for s in (0, 1))
        for name in ("images", "t", "noise"):
            assert not torch.equal(zero[name], one[name]), name
        again = draw_step(TINY, images, TINY.objective, step)
        assert all(torch.equal(zero[name], again[name]) for name in ("images", "t", "noise"))


def test_seed_0_keeps_its_numbers():
    for step in (0, 7, 10**6):
        assert torch.equal(torch.rand(3, generator=generator(0, step)), _plain(step))
        assert torch.equal(torch.rand(3, generator=generator(0, step, "epoch")), _plain(2**31 + step))
    assert torch.equal(torch.rand(3, generator=generator(5)), _plain(5))


def _plain(seed):
    return torch.rand(3, generator=torch.Generator().manual_seed(seed))


def test_no_step_of_small_seeds_is_shared():
    starts = sorted(generator(seed, 0).initial_seed() for seed in range(1001))
    assert min(b - a for a, b in pairwise([*starts, starts[0] + SEEDS])) > 900_000
    for seed in (0, 1, 1000, SEEDS - 1):  # steps and epochs lie in halves of 32 bits
        assert generator(seed, SEEDS - 1).initial_seed() < SEEDS <= generator(seed, 0, "epoch").initial_seed()
        assert generator(seed, 123, "epoch").initial_seed() < 2**32


@pytest.mark.parametrize("seed", [-1, 2**31, 2**32, 0.5])
def test_a_seed_out_of_range_is_one_line(seed):
    with pytest.raises(ValueError, match=r"^seed is .*: give a whole number from 0 to 2,147,483,647\.$"):
        TINY.replace(seed=seed)
    with pytest.raises(ValueError, match="step -1 is not from 0"):
        generator(0, -1)


def test_every_image_is_seen_once_an_epoch():
    seen = torch.cat([loop._batch_indices(10, TINY, step) for step in range(5)])  # 20 = two epochs
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    other = torch.cat([loop._batch_indices(10, TINY.replace(seed=1), step) for step in range(5)])
    assert seen[:10].tolist() != other[:10].tolist()


# ---- configuration ----------------------------------------------------------------------------------


def test_a_setting_goes_where_it_belongs():
    config = PROFILES["quick"].replace(lr=0.5, T=20, base_channels=8, loss="l1")
    assert (config.lr, config.objective.T, config.objective.loss) == (0.5, 20, "l1")
    assert config.objective.network == {**PROFILES["quick"].objective.network, "base_channels": 8}
    assert PROFILES["quick"].objective.network["base_channels"] == 16
    assert config.settings()["base_channels"] == 8
    with pytest.raises(ValueError, match="no setting 'depth'"):
        config.replace(depth=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"precision": "fp16"}, "fp32, bf16, auto"),
        ({"prediction": "noise"}, "v_prediction"),
        ({"T": 10**9}, "T is 1000000000: give a number from 1 to 100,000"),
        ({"schedule": "straight"}, "cosine"),
        ({"loss": "l3"}, "l2, l1, huber"),
        ({"min_snr_gamma": -1.0}, "or None"),
        ({"min_snr_gamma": 5.0, "snr_offset": -1.0}, "snr_offset is -1.0: give 0 or more"),
        ({"snr_offset": 1.0}, "give min_snr_gamma as well"),
        ({"drop": 2.0}, "share from 0 to 1"),
    ],
)
def test_configuration_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        TINY.replace(**changes)


def test_wrong_images_are_named():
    with pytest.raises(ValueError, match="load_slices\\(root, 16\\)"):
        next(train(TINY, torch.zeros(4, 1, 32, 32, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="give uint8 from load_slices"):
        next(train(TINY, torch.zeros(4, 1, 16, 16, dtype=torch.long)))
    with pytest.raises(ValueError, match="data is empty"):
        next(train(TINY, SLICES[:0]))


# ---- going on where a run was -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"prediction": "epsilon"}, {"prediction": "sample"}, {}, {"channels_last": True}, {"seed": 3}],
)
def test_resume_is_bit_equal(tmp_path, changes):
    config = TINY.replace(**changes)
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


def test_moments_lie_in_memory_as_their_weights(tmp_path):
    # Stored contiguous beside channels-last weights they are silently wrong, or an error on CUDA; and a
    # mapped file cannot be deleted on Windows.
    config = TINY.replace(channels_last=True)
    save_checkpoint(tmp_path / "c", next(train(config, SLICES, device="cpu")))
    state = next(train(config, SLICES, device="cpu", resume=tmp_path / "c"))
    mapped = load_file(tmp_path / "c")
    for index, parameter in enumerate(state.model.parameters()):
        moments = state.optimizer.state[parameter]
        assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == parameter.stride()
        assert moments["exp_avg"].shape == mapped[f"optimizer.{index}.exp_avg"].shape


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    save_checkpoint(tmp_path / "c", next(train(TINY, SLICES, device="cpu")))
    with pytest.raises(ValueError, match=r"lr 0.001 ≠ 0.5"):
        _run(TINY.replace(lr=0.5), resume=tmp_path / "c")
    with pytest.raises(ValueError, match=r"base_channels 8 ≠ 16"):
        _run(TINY.replace(base_channels=16), resume=tmp_path / "c")
    save_checkpoint(tmp_path / "d", _run(TINY.replace(steps=2))[-1])
    with pytest.raises(ValueError, match="is at step 2: give steps of at least that"):
        _run(TINY.replace(steps=1), resume=tmp_path / "d")


def test_a_checkpoint_from_before_a_setting_had_its_default(tmp_path, monkeypatch):
    config = TINY.replace(min_snr_gamma=5.0)
    settings = config.objective.settings()
    older = {k: v for k, v in settings.items() if k != "snr_offset"}
    monkeypatch.setattr(Denoising, "settings", lambda self: older)
    save_checkpoint(tmp_path / "c", next(train(config, SLICES, device="cpu")))
    monkeypatch.undo()
    next(train(config, SLICES, device="cpu", resume=tmp_path / "c"))
    with pytest.raises(ValueError, match=r"snr_offset 0.0 ≠ 1.0"):
        next(train(config.replace(snr_offset=1.0), SLICES, device="cpu", resume=tmp_path / "c"))


def test_other_data_is_refused(tmp_path):
    save_checkpoint(tmp_path / "c", next(train(TINY, SLICES, device="cpu")))
    other = SLICES.clone()
    other[3, 0, 5, 5] ^= 1  # one pixel of one image
    with pytest.raises(ValueError, match="learned from other data"):
        next(train(TINY, other, device="cpu", resume=tmp_path / "c"))
    with pytest.raises(ValueError, match=r"10 images.*here are 9 images"):
        next(train(TINY, SLICES[:9], device="cpu", resume=tmp_path / "c"))


def test_fingerprints_tell_type_shape_and_content():
    found = [
        fingerprint(data)
        for data in (SLICES, SLICES.flip(0), SLICES.reshape(10, 1, 8, 32), SLICES.view(torch.int8))
    ]
    assert len(set(found)) == 4
    assert fingerprint(SLICES) == fingerprint(SLICES.clone())
    assert fingerprint(torch.utils.data.TensorDataset(SLICES)) == fingerprint(SLICES)


# ---- numbers that are none --------------------------------------------------------------------------


def test_a_loss_that_explodes_is_reported():
    with pytest.raises(FloatingPointError, match="at step"):
        _run(TINY.replace(lr=1e30, warmup=0, steps=20))


class _PoisonedGradient(Denoising):
    """The loss of step 2 is a number, its gradient is not: √0 has no slope."""

    def draw(self, batch, drawn):
        self.__dict__.setdefault("draws", []).append(1)
        return super().draw(batch, drawn) | {"poison": torch.full((len(batch),), float(len(self.draws) == 3))}

    def __call__(self, network, step):
        loss = super().__call__(network, step)
        if step["poison"][0]:
            loss = loss + (0 * sum(p.sum() for p in network.parameters())).abs().sqrt()
        return loss


@pytest.mark.parametrize("late", [False, True])
def test_a_gradient_that_is_no_number_leaves_the_weights_alone(late, monkeypatch, tmp_path):
    # ``late`` is how it goes on a GPU, where nobody waits for the number before the step is made.
    monkeypatch.setattr(loop, "_is_late", lambda device: late)
    objective = _PoisonedGradient(**{f: getattr(TINY.objective, f) for f in asdict(TINY.objective)})
    config, states = replace(TINY, objective=objective, steps=6), []
    running = train(config, SLICES, device="cpu")
    with pytest.raises(FloatingPointError, match=r"gradient is nan at step 2: .* still those of step 2\."):
        states.extend((state, _weights(state.model)) for state in running)
    state = states[-1][0]
    assert _weights(state.model).isfinite().all()
    assert _weights(state.ema.model).isfinite().all()
    assert torch.equal(_weights(state.model), states[1][1])  # of step 2, whoever looked
    if late:
        assert state.step == 3
        with pytest.raises(FloatingPointError):
            save_checkpoint(tmp_path / "c", state)
        assert not (tmp_path / "c").exists()


def test_late_numbers_change_nothing(monkeypatch):
    now = _run()
    monkeypatch.setattr(loop, "_is_late", lambda device: True)
    late = _run()
    assert [s.loss for s in now] == [s.loss for s in late]
    assert torch.equal(_weights(now[-1].model), _weights(late[-1].model))


def test_a_late_step_reads_nothing_from_the_device(monkeypatch):
    # Each such read is a wait for a GPU. What looks at t looks at it on the CPU only, so it is left out here.
    monkeypatch.setattr(loop, "_is_late", lambda device: True)
    monkeypatch.setattr(NoiseSchedule, "_pick", lambda self, values, t, dtype: values.to(dtype)[t])
    reads = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), settings=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                reads.append(function)
            return function(*arguments, **(settings or {}))

    states = train(TINY, SLICES, device="cpu")
    next(states)
    with Reads():
        next(states)
        assert reads == []
        float(torch.ones(1).sum())  # the count works
        assert len(reads) == 1


def test_the_next_batch_is_on_the_device_before_the_state_is_shown(monkeypatch):
    drawn, moved = [], []
    draw, move = loop.draw_step, loop._Alone.moved
    monkeypatch.setattr(loop, "draw_step", lambda *given: drawn.append(given[-1]) or draw(*given))
    monkeypatch.setattr(loop._Alone, "moved", lambda self, step: moved.append(drawn[-1]) or move(self, step))
    states = train(TINY, SLICES, device="cpu")
    next(states)
    assert drawn[-1] == 1  # step 0 is done; step 1 waits on the device
    assert moved[-1] == 1


def test_a_copy_to_a_gpu_runs_beside_the_network(monkeypatch):
    # No GPU is here: what CUDA is asked for, and in which order. The network's stream must wait for the copy,
    # and the copy's memory must not be given away while the network reads it.
    asked = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            asked.append(f"{self.name} waits for {other.name}")

    class Rows:
        def __init__(self, count):
            self.count = count

        def __len__(self):
            return self.count

        def __getitem__(self, rows):
            return Rows(len(range(self.count)[rows]))

        def pin_memory(self):
            asked.append("pinned")
            return self

        def to(self, device, non_blocking):
            asked.append(f"{self.count} copied to {device} on {on[-1]}, waiting: {not non_blocking}")
            return self

        def record_stream(self, stream):
            asked.append(f"kept for {stream.name}")

    on = ["network"]

    @contextmanager
    def stream(chosen):
        on.append(chosen.name)
        yield
        on.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("network"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    group = loop._Alone(torch.device("cuda", 0))
    assert group.moved({"images": Rows(4)})["images"].count == 4
    assert asked == [
        "pinned", "4 copied to cuda:0 on copies, waiting: False", "network waits for copies",
        "kept for network",
    ]  # fmt: skip


# ---- average ----------------------------------------------------------------------------------------


def test_ema_is_the_average_it_says():
    model = nn.Linear(1, 1, bias=False)
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


class _WithBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)

    def forward(self, x, t, y):
        return self.norm(self.conv(x))


def test_buffers_are_averaged_along_and_networks_train_in_training_mode():
    own = _WithBatchNorm().eval()
    for state in train(TINY, SLICES, device="cpu", model=own):
        assert state.model.training
        state.model.eval()  # as somebody does who samples meanwhile
    assert state.model.norm.num_batches_tracked == TINY.steps
    assert torch.equal(state.ema.model.norm.running_mean, own.norm.running_mean)
    assert not torch.equal(own.norm.running_var, torch.ones(1))


# ---- learning rate, gradients, losses ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_learning_rate_schedules(name):
    config = TINY.replace(steps=12, warmup=2, lr=1.0, lr_schedule=name)
    rates = [learning_rate(n, config) for n in range(13)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[7] == pytest.approx({"cosine": 0.5, "linear": 0.5, "constant": 1.0}[name])
    assert rates[12] == pytest.approx(0.0 if name != "constant" else 1.0)


def test_gradients_are_clipped(monkeypatch):
    seen = []
    original = nn.utils.clip_grad_norm_

    def spy(parameters, limit):
        parameters = list(parameters)
        norm = original(parameters, limit)
        seen.append(float(torch.cat([p.grad.flatten() for p in parameters]).norm()))
        return norm

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy)
    states = _run(TINY.replace(grad_clip=1e-3))
    assert max(seen) <= 1e-3 * 1.001
    assert max(s.grad_norm for s in states) > 1e-3


@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_every_loss_trains(loss, gamma):
    states = _run(TINY.replace(loss=loss, min_snr_gamma=gamma, steps=60, lr=5e-3, prediction="epsilon"))
    assert sum(s.loss for s in states[-10:]) < 0.95 * sum(s.loss for s in states[:10])


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weighs_the_error_of_the_image(prediction, offset):
    # Whatever is predicted, the weighted loss is min(SNR + offset, γ) times the squared error of x₀.
    schedule = NoiseSchedule.cosine(50)
    x0, noise, wrong = torch.randn((3, 7, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 3, 10, 20, 30, 40, 48])

    def network(x, t, y):
        return schedule.target(x0, noise, t, prediction) + wrong

    weighted = diffusion_loss(
        network, schedule, x0, t, noise, prediction, min_snr_gamma=5.0, snr_offset=offset
    )
    x_t = schedule.q_sample(x0, t, noise)
    guess = schedule.predict_x0(x_t, t, network(x_t, t, None), prediction)
    snr = schedule.snr()[t]
    weight = (snr + offset).clamp(max=5)
    assert torch.allclose(weighted, (weight * (guess - x0).square().flatten(1).mean(1)).float(), rtol=1e-3)


@pytest.mark.parametrize("profile", ["laptop", "full"])
def test_the_profiles_weigh_high_noise(profile):
    # Samplers start at T − 1: a network that was not asked there answers at random.
    objective = PROFILES[profile].objective
    schedule = objective.make_schedule()
    high = (schedule.snr() <= 4).nonzero().flatten()
    weight = schedule.min_snr_weight(
        high, objective.prediction, objective.min_snr_gamma, objective.snr_offset
    )
    assert high[-1] == objective.T - 1
    assert weight.min() > 0.99


def test_the_objective_weighs_with_its_offset():
    drawn = {"images": SLICES[:4], "t": torch.full((4,), 49), "noise": torch.randn(SLICES[:4].shape), "y": {}}
    network = lambda x, t, y=None: torch.zeros_like(x)  # noqa: E731
    plain = TINY.objective(network, drawn)
    one, none = (TINY.replace(min_snr_gamma=5.0, snr_offset=o).objective(network, drawn) for o in (1.0, 0.0))
    torch.testing.assert_close(one, plain)
    assert (none < 1e-2 * plain).all()


def test_settings_from_before_the_offset_have_none():
    stored = {k: v for k, v in TINY.objective.settings().items() if k != "snr_offset"}
    assert Denoising.from_settings(stored) == TINY.objective


def test_weights_where_no_signal_is_left():
    s = NoiseSchedule.linear().zero_terminal_snr()
    last = torch.tensor([999])
    found = {p: float(s.min_snr_weight(last, p, 5.0)) for p in ("epsilon", "sample", "v_prediction")}
    assert found == {"epsilon": 1.0, "sample": 0.0, "v_prediction": 0.0}


def test_validation_buckets_are_ordered_and_repeatable():
    # A network that knows the noise of high timesteps and nothing of low ones has its loss in the first.
    schedule = NoiseSchedule.cosine(50)
    config = TINY.replace(prediction="epsilon")

    class Knows(nn.Module):
        def __init__(self):
            super().__init__()
            self.somewhere = nn.Parameter(torch.zeros(1))

        def forward(self, x, t, y):
            black = schedule.predict_noise(x, t, -torch.ones_like(x), "sample")
            return torch.where(t.reshape(-1, 1, 1, 1) >= 20, black, torch.zeros_like(x))

    losses = validation_loss(Knows(), config, torch.zeros_like(SLICES), buckets=5)
    assert losses.shape == (5,)
    torch.testing.assert_close(losses[:2], torch.ones(2), atol=0.2, rtol=0)
    assert losses[2:].max() < 1e-4
    again = validation_loss(Knows(), config, torch.zeros_like(SLICES), buckets=5)
    assert torch.equal(losses, again)
    assert not torch.equal(
        losses, validation_loss(Knows(), config, torch.zeros_like(SLICES), buckets=5, seed=1)
    )


# ---- precision, memory, devices ---------------------------------------------------------------------


def test_bf16_stays_near_fp32():
    # The head of a fresh network is 0 in any precision; the gradients behind it are not.
    awake = TINY.make_network()
    nn.init.normal_(awake.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    a, b = (
        list(train(TINY.replace(precision=p, steps=3), SLICES, device="cpu", model=_copy(awake)))
        for p in ("bf16", "fp32")
    )
    assert a[0].loss == pytest.approx(b[0].loss, rel=0.02)
    assert a[0].loss != b[0].loss
    assert a[2].loss == pytest.approx(b[2].loss, rel=0.05)
    assert next(a[-1].model.parameters()).dtype == torch.float32


def _copy(network):
    again = TINY.make_network()
    again.load_state_dict(network.state_dict())
    return again


def test_parts_of_a_batch_give_the_whole():
    whole, parts = _run(), _run(TINY.replace(accumulate=4))
    assert [s.loss for s in whole] == pytest.approx([s.loss for s in parts], rel=1e-4)
    assert [s.grad_norm for s in whole] == pytest.approx([s.grad_norm for s in parts], rel=1e-3)
    with pytest.raises(ValueError, match="does not fit 1 processes in 3 parts"):
        _run(TINY.replace(accumulate=3))


class _SmallMemory(Denoising):
    """Memory for so many images at once: how CUDA, MPS and the CPU say that it is short."""

    def __call__(self, network, step):
        if len(step["t"]) > self.room:
            raise self.error
        return super().__call__(network, step)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB, max allowed: 18.0 GB)."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
]


def _small_memory(room, error):
    objective = _SmallMemory(**{f: getattr(TINY.objective, f) for f in asdict(TINY.objective)})
    objective.__dict__.update(room=room, error=error)
    return replace(TINY, objective=objective)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["CUDA", "MPS", "CPU"])
def test_short_memory_means_more_parts(error):
    short = _run(_small_memory(1, error))[-1]
    assert short.config.accumulate == 4
    parts = _run(TINY.replace(accumulate=4))[-1]
    assert torch.allclose(_weights(short.model), _weights(parts.model), atol=1e-6)
    with pytest.raises(MemoryError, match="1 images at once do not fit in memory"):
        _run(_small_memory(0, error))
    auto = _run(_small_memory(1, error).replace(precision="auto"))[-1]  # timed with one part, too
    assert auto.config.precision in ("fp32", "bf16")


def test_other_errors_of_the_network_pass():
    with pytest.raises(RuntimeError, match="a mistake of my own"):
        _run(_small_memory(0, RuntimeError("a mistake of my own")))


def test_auto_precision_is_measured_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "faster_precision", lambda *a: "bf16")
    config = TINY.replace(precision="auto")
    state = next(train(config, SLICES, device="cpu"))
    assert state.config.precision == "bf16"
    save_checkpoint(tmp_path / "c.safetensors", state)
    monkeypatch.setattr(loop, "faster_precision", lambda *a: "fp32")
    resumed = _run(config, resume=tmp_path / "c.safetensors")
    assert resumed[0].step == 2
    assert resumed[0].config.precision == "bf16"


@pytest.mark.parametrize(("slow", "found"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_the_faster_precision_is_taken(slow, found, monkeypatch):
    # A clock that a slow step moves on by a second, and a fast one by half.
    now, config = [0.0], TINY
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])

    class Clock(Denoising):
        def __call__(self, network, step):
            is_bf16 = torch.is_autocast_enabled("cpu")
            now[0] += 1.0 if is_bf16 == (slow == "bf16") else 0.5
            return super().__call__(network, step)

    config = replace(TINY, objective=Clock(**{f: getattr(TINY.objective, f) for f in asdict(TINY.objective)}))
    network = config.make_network()
    assert training.faster_precision(network, config, draw_step(config, SLICES, config.objective, 0)) == found
    assert all(p.grad is None for p in network.parameters())


def test_channels_last_gives_the_same():
    a, b = _run()[-1], _run(TINY.replace(channels_last=True))[-1]
    assert torch.allclose(_weights(a.model), _weights(b.model), atol=1e-4)


def test_a_device_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"device {device} is not here"):
            next(train(TINY, SLICES, device=device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="device cuda:1 is not here"):
        pick_device("cuda:1")
    assert pick_device("cuda:0") == torch.device("cuda:0")


def test_a_card_without_kernels_is_passed_over(monkeypatch):
    def no_kernel(*shape, device=None, **more):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", no_kernel)
    with pytest.warns(UserWarning, match=r"no kernel image .*going on without"):
        assert pick_device().type in ("cpu", "mps")


def test_a_card_that_emulates_bf16_trains_in_fp32(monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation)
    )
    group = loop._Alone(torch.device("cuda"))
    with pytest.warns(UserWarning, match="no bf16"):
        assert loop._with_precision(TINY.replace(precision="bf16"), None, None, group).precision == "fp32"
    assert asked == [False]


# ---- weights ----------------------------------------------------------------------------------------


def test_weights_come_back_with_their_configuration(tmp_path):
    state, path = _run()[-1], tmp_path / "new" / "w.safetensors"
    save_weights(path, state.ema.model, TINY, {"data": "noise"})
    denoise, header = load_weights(path), read_header(path)
    assert Denoising.from_settings(header.settings) == TINY.objective
    assert header.training == json.loads(json.dumps(TINY.loop()))
    assert header.card == {"data": "noise"}
    assert (denoise.prediction, denoise.shape, denoise.schedule.T) == ("v_prediction", (1, 16, 16), 50)
    assert torch.equal(_weights(denoise), _weights(state.ema.model))
    assert not denoise.network.training
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]


def test_half_precision_is_stated_and_read(tmp_path):
    network = TINY.make_network()
    for half in (False, True):
        save_weights(tmp_path / f"{half}", network, TINY, half=half)
    assert read_header(tmp_path / "True").card == {"stored": "float16"}
    assert (tmp_path / "True").stat().st_size < 0.6 * (tmp_path / "False").stat().st_size
    found = load_weights(tmp_path / "True")
    assert next(found.parameters()).dtype == torch.float32
    assert torch.allclose(_weights(found), _weights(network), rtol=1e-3, atol=1e-4)


def test_files_of_the_first_format_are_read(tmp_path):
    flat = TINY.loop() | TINY.objective.settings()
    flat |= flat.pop("network")
    flat = {k: v for k, v in flat.items() if k not in ("conditions", "drop")}
    metadata = {"format": "1", "config": json.dumps(flat), "data": "noise"}
    network = TINY.make_network()
    save_file(network.state_dict(), tmp_path / "w", metadata)
    header = read_header(tmp_path / "w")
    assert Denoising.from_settings(header.settings) == TINY.objective
    assert (header.training, header.card) == (TINY.loop(), {"data": "noise"})
    assert torch.equal(_weights(load_weights(tmp_path / "w")), _weights(network))


def test_shipped_weights_fit_their_profile():
    denoise, header = load_weights(), read_header(training.WEIGHTS)
    assert Denoising.from_settings(header.settings) == PROFILES["laptop"].objective
    found_out = {"steps": 0, "precision": "fp32"}  # what "auto" had found on the machine of the run
    assert header.training | {"steps": 0} == PROFILES["laptop"].loop() | found_out
    assert training.WEIGHTS.stat().st_size < 20e6
    assert 15e6 < count_parameters(PROFILES["full"].make_network()) < 25e6
    assert count_parameters(denoise) < 5e6


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(path, TINY.make_network(), TINY)
    before = path.read_bytes()

    def full_disk(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_weights(path, TINY.make_network(), TINY)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_wrong_files_are_named(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(FileNotFoundError, match="Train it first"):
        load_weights(path)
    with pytest.raises(FileNotFoundError, match="save_checkpoint"):
        _run(resume=path)
    save_weights(path, TINY.make_network(), TINY)
    with pytest.raises(ValueError, match="weights only"):
        _run(resume=path)
    whole = path.read_bytes()
    for damaged in (b"", b"not safetensors at all", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a whole"):
            load_weights(path)
        with pytest.raises(ValueError, match="not a whole"):
            _run(resume=path)
    save_checkpoint(path, next(train(TINY, SLICES, device="cpu")))
    with pytest.raises(ValueError, match="is a checkpoint"):
        load_weights(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no configuration"):
        load_weights(path)
    save(path, {"a": torch.zeros(1)}, "segmenter", {})
    with pytest.raises(ValueError, match="is of kind 'segmenter', not a denoiser"):
        load_weights(path)
    save(path, {"a": torch.zeros(1)}, "denoiser", {"colour": "red"})
    with pytest.raises(ValueError, match=r"'colour'.*update oasis_helpers"):
        load_weights(path)
    save_file({"a": torch.zeros(1)}, path, {"format": "99"})
    with pytest.raises(ValueError, match="format 99, this version reads 2: update oasis_helpers"):
        load_weights(path)
    save_file({"a": torch.zeros(1)}, path, {"format": "2", "kind": "denoiser", "settings": "{"})
    with pytest.raises(ValueError, match="metadata that cannot be read"):
        load_weights(path)


def _settings(**changes):
    return json.loads(json.dumps(TINY.replace(**changes).objective.settings()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (_settings(base_channels=40_000), "another architecture"),  # 100 GB and more
        (_settings(channel_mult=(1, 3)), r"another architecture .*\(and \d+ more\)"),
        (_settings(num_res_blocks=10**9), "cannot use"),
        (_settings(T=100_000) | {"T": 10**12}, "cannot use"),
        (_settings() | {"network": {"base_channels": "many"}}, "make no network"),
        (_settings() | {"conditions": {"a": {"kind": "smell"}}}, "kind 'smell'"),
    ],
)
def test_what_a_file_asks_for_is_compared_before_memory_is_taken(settings, message, tmp_path):
    save(tmp_path / "w", TINY.make_network().state_dict(), "denoiser", settings)
    before = psutil.Process().memory_info().rss
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "w")
    assert psutil.Process().memory_info().rss - before < 100e6


# ---- the files of a run -------------------------------------------------------------------------------


def _names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _steps(out):
    with (run.run_folder(out) / "metrics.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "loss", "lr", "grad_norm", "images_per_second"]
    return [row[0] for row in rows[1:]]


def test_a_run_with_files(tmp_path):
    out = tmp_path / "lr1e-3_b0.9"  # a name that ends in no ending
    states = training.train_to(out, TINY, SLICES, device="cpu", every=1, keep=2, card={"data": "test"})
    for state in states:
        kept = [f"step-{n:07d}.safetensors" for n in range(max(1, state.step - 1), state.step + 1)]
        assert [p.name for p in training.checkpoints(out)] == kept
    assert _names(tmp_path) == ["lr1e-3_b0.9", "lr1e-3_b0.9.run/metrics.csv"]
    assert torch.equal(_weights(load_weights(out)), _weights(_run()[-1].ema.model))
    card = read_header(out).card
    assert card == {"data": "test", "data_fingerprint": fingerprint(SLICES), "steps": 6}
    assert _steps(out) == list("123456")
    with pytest.raises(FileExistsError, match="that run is finished"):
        next(training.train_to(out, TINY, SLICES))


def test_runs_and_files_of_other_names_do_not_meet(tmp_path):
    mine = {"lr1e-3_b0.99.csv": "results,of,mine\n", "lr[1e-3].csv": "mine\n", "notes.run": "mine"}
    for name, content in mine.items():
        (tmp_path / name).write_text(content)
    for name in ("lr1e-3_b0.9", "lr1e-3_b0.99", "lr[1e-3]"):
        out = tmp_path / f"{name}.safetensors"
        states = training.train_to(out, TINY, SLICES, device="cpu", every=1)
        for state in states:
            if state.step == 3:
                break
        states.close()
        assert [run._step_of(p) for p in training.checkpoints(out)] == [2, 3]
    for name in ("lr1e-3_b0.9", "lr1e-3_b0.99", "lr[1e-3]"):
        out = tmp_path / f"{name}.safetensors"
        resumed = training.train_to(out, TINY, SLICES, device="cpu", resume=True)
        assert [s.step for s in resumed] == [4, 5, 6]
    assert all((tmp_path / name).read_text() == content for name, content in mine.items())
    with pytest.raises(FileExistsError, match=r"notes\.run"):
        next(training.train_to(tmp_path / "notes", TINY, SLICES, device="cpu"))


def test_the_log_of_a_long_run_is_read_again(tmp_path):
    folder = tmp_path / "x.run"
    folder.mkdir()
    checkpoint = folder / "step-1000001.safetensors"
    (folder / "metrics.csv").write_bytes(
        b"step,loss,lr,grad_norm,images_per_second\n1000000,1,1,1,1\n10000\xff,garbled\n\n1000002,1,1,1,1\n"
    )
    with run._Rows(folder, checkpoint) as rows:
        rows.write(replace(next(train(TINY, SLICES, device="cpu")), step=1_000_002))
    lines = (folder / "metrics.csv").read_text().splitlines()
    assert lines[1] == "1000000,1,1,1,1"
    assert [line.split(",")[0] for line in lines[1:]] == ["1000000", "1000002"]


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
    assert torch.equal(_weights(load_weights(out)), _weights(_run()[-1].ema.model))
    assert _steps(out) == list("123456")
    with pytest.raises(FileNotFoundError, match=r"no whole checkpoint \(0 found\)"):
        next(training.train_to(tmp_path / "no.safetensors", TINY, SLICES, resume=True))


@pytest.mark.parametrize("every", [2, 6])
def test_a_run_that_died_before_its_weights_can_be_finished(every, tmp_path, monkeypatch):
    out, original = tmp_path / "run.safetensors", run.save_weights

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "save_weights", killed)
    with pytest.raises(KeyboardInterrupt):
        list(training.train_to(out, TINY, SLICES, device="cpu", every=every))
    monkeypatch.setattr(run, "save_weights", original)
    with pytest.raises(ValueError, match="other data"):
        list(training.train_to(out, TINY, SLICES[1:], device="cpu", resume=True))
    with pytest.raises(ValueError, match="is at step 6: give steps"):
        list(training.train_to(out, TINY.replace(steps=4), SLICES, device="cpu", resume=True))
    assert list(training.train_to(out, TINY, SLICES, device="cpu", resume=True)) == []
    assert torch.equal(_weights(load_weights(out)), _weights(_run()[-1].ema.model))
    assert read_header(out).card["steps"] == 6
    assert training.checkpoints(out) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every is 0: give 1 or more"),
        ({"keep": 0}, "keep is 0: give 1 or more"),
        ({"card": {"data": object()}}, "card cannot be stored"),
    ],
)
def test_mistakes_are_named_before_the_first_step(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        next(training.train_to(tmp_path / "new" / "w", TINY, SLICES, **settings))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    out, original = tmp_path / "run.safetensors", weights.save_file

    def full(tensors, path, metadata):
        if json.loads(metadata["run"])["step"] == 4:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, path, metadata)

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        list(training.train_to(out, TINY, SLICES, device="cpu", every=2))
    assert _names(tmp_path) == [
        "run.safetensors.run/metrics.csv",
        "run.safetensors.run/step-0000002.safetensors",
    ]


def test_a_loss_that_explodes_names_the_last_checkpoint(tmp_path):
    config = TINY.replace(lr=1e30, warmup=0, grad_clip=1e30, steps=50)
    with pytest.raises(FloatingPointError, match=r"lower lr\. The last is .*step-0000001"):
        list(training.train_to(tmp_path / "run.safetensors", config, SLICES, device="cpu", every=1))


def test_a_broken_tensorboard_is_left_out(tmp_path, monkeypatch):
    import types

    broken = types.ModuleType("torch.utils.tensorboard")  # as with a TensorFlow that does not fit
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", broken)
    broken.__getattr__ = lambda name: (_ for _ in ()).throw(AttributeError(name))
    list(training.train_to(tmp_path / "w", TINY, SLICES, device="cpu"))
    assert _steps(tmp_path / "w") == list("123456")


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

    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 2; .*step-0000002\..* has all to go on"):
        interrupt_at_2(training.train_to(out, TINY, SLICES, device="cpu"))
    assert seen == [1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    list(training.train_to(out, TINY, SLICES, device="cpu", resume=True))
    assert torch.equal(_weights(load_weights(out)), _weights(_run()[-1].ema.model))
    assert _steps(out) == list("123456")


# ---- several processes --------------------------------------------------------------------------------

PROGRAM = """
import signal, sys, torch
from oasis_helpers.training import TrainConfig, train_to
config = TrainConfig(steps=4, batch_size=4).replace(
    image_size=16, base_channels=8, channel_mult=(1, 2), attention_levels=(1,), T=50, precision="auto")
slices = torch.randint(0, 256, (10, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
from oasis_helpers.training import loop
import os
rank = int(os.environ.get("RANK", 0))
loop.faster_precision = lambda *a: "fp32" if rank == 0 else "bf16"  # they measure, and disagree
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    for state in train_to(sys.argv[1], config, slices, device="cpu"):
        assert state.config.precision == "fp32"
        if state.step == 2 and rank == 1:
            signal.raise_signal(signal.SIGINT)  # one of them is told to stop
except KeyboardInterrupt as stop:
    with open(f"{sys.argv[1]}.stop{rank}", "w") as file:
        file.write(str(stop))
torch.distributed.barrier()
list(train_to(sys.argv[1], config, slices, device="cpu", resume=True))
"""


def test_two_processes_train_as_one(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # accelerate's own settings change nothing
    settings = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}
    done = subprocess.run(
        [*command, str(tmp_path / "program.py"), str(tmp_path / "two")],
        env=os.environ | settings, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in "01":  # both ended after the same step, and none waited for the other
        assert (tmp_path / f"two.stop{rank}").read_text().startswith("stopped after step 2; ")
    list(
        training.train_to(
            tmp_path / "one", TINY.replace(steps=4, ema_decay=0.999, warmup=50), SLICES, device="cpu"
        )
    )
    one, two = (load_weights(tmp_path / name) for name in ("one", "two"))
    assert torch.allclose(_weights(one), _weights(two), atol=1e-5)
    logs = [
        (tmp_path / f"{name}.run" / "metrics.csv").read_text().splitlines()[1:] for name in ("one", "two")
    ]
    for a, b in zip(*logs, strict=True):
        assert float(a.split(",")[1]) == pytest.approx(float(b.split(",")[1]), rel=1e-4)


def test_other_parallelisms_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP: this loop knows plain data parallelism only"):
        next(train(TINY, SLICES, device="cpu"))


def test_accelerates_environment_changes_nothing(monkeypatch):
    before = [s.loss for s in _run()]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert [s.loss for s in _run()] == before
