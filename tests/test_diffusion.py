import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from oasis_helpers.diffusion import PREDICTIONS, Denoiser, NoiseSchedule, diffusion_loss

NAMES = ("linear", "quadratic", "cosine", "sigmoid", "shifted cosine")
schedules = st.builds(NoiseSchedule.named, st.sampled_from(NAMES), st.integers(1, 1200))


@given(schedules)
@settings(max_examples=60, deadline=None)
def test_betas_lie_in_0_1_and_alphas_cumprod_falls(s):
    assert s.betas.dtype == torch.float64
    assert ((s.betas > 0) & (s.betas < 1)).all()
    assert (s.alphas_cumprod.diff() < 0).all()
    assert ((s.alphas_cumprod > 0) & (s.alphas_cumprod < 1)).all()
    assert (s.snr().diff() < 0).all()


@given(schedules, st.data(), st.sampled_from(sorted(PREDICTIONS)), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_predictions_are_undone(s, data, prediction, seed):
    generator = torch.Generator().manual_seed(seed)
    t = torch.tensor([data.draw(st.integers(0, s.T - 1)) for _ in range(3)])
    x0, noise = (torch.randn(3, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in "ab")
    x_t = s.q_sample(x0, t, noise)
    output = s.target(x0, noise, t, prediction)
    # Dividing by the smallest √ᾱ or √(1−ᾱ) multiplies the rounding error.
    worst = 1 / min(float(s.alphas_cumprod[t].min().sqrt()), float((1 - s.alphas_cumprod[t]).min().sqrt()))
    torch.testing.assert_close(s.predict_x0(x_t, t, output, prediction), x0, atol=1e-12 * worst, rtol=0)
    torch.testing.assert_close(s.predict_noise(x_t, t, output, prediction), noise, atol=1e-12 * worst, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_closed_form_is_the_iterated_chain(name):
    s = NoiseSchedule.named(name, 50)
    mean, variance = 1.0, 0.0  # of x_t when x_0 = 1
    for t, beta in enumerate(s.betas.tolist()):
        mean, variance = mean * (1 - beta) ** 0.5, variance * (1 - beta) + beta
        one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        assert float(s.q_sample(one, t, zero)) == pytest.approx(mean, rel=1e-10)
        assert float(s.q_sample(zero, t, one)) ** 2 == pytest.approx(variance, rel=1e-10)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_posterior_is_bayes_rule(t):
    s = NoiseSchedule.linear()
    x0, x_t = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([[-0.8]], dtype=torch.float64)
    mean, variance = s.q_posterior(x0, x_t, t)
    if t == 0:
        assert float(mean) == pytest.approx(0.3, abs=1e-12)
        assert float(variance) == 0
        return
    prior_mean = s.alphas_cumprod[t - 1].sqrt() * 0.3
    prior_precision = 1 / (1 - s.alphas_cumprod[t - 1])
    likelihood_precision = s.alphas[t] / s.betas[t]
    precision = prior_precision + likelihood_precision
    expected = (prior_mean * prior_precision + s.alphas[t].sqrt() * -0.8 / s.betas[t]) / precision
    assert float(mean) == pytest.approx(float(expected), rel=1e-9)
    assert float(variance) == pytest.approx(float(1 / precision), rel=1e-9)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("linear", "linear"), ("quadratic", "scaled_linear"), ("cosine", "squaredcos_cap_v2")],
)
def test_schedules_equal_diffusers(ours, theirs):
    from diffusers import DDPMScheduler

    reference = DDPMScheduler(1000, beta_schedule=theirs, beta_start=1e-4, beta_end=0.02).alphas_cumprod
    torch.testing.assert_close(
        NoiseSchedule.named(ours, 1000).alphas_cumprod.float(), reference, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("T", [1, 10, 1000])
def test_a_shift_multiplies_every_snr(factor, T):
    s = NoiseSchedule.cosine(T)
    torch.testing.assert_close(s.shifted(factor).snr(), factor**2 * s.snr(), rtol=1e-8, atol=0)
    assert torch.equal(s.shifted(1.0).betas, s.betas)


def test_a_shift_leaves_no_signal_where_there_was_none():
    s = NoiseSchedule.linear().zero_terminal_snr().shifted(0.5)
    assert s.snr()[-1] == 0
    assert (s.snr().diff() < 0).all()


def test_shifted_cosine_moves_log_snr_by_that_of_128_pixels():
    ours, plain = NoiseSchedule.named("shifted cosine", 1000), NoiseSchedule.cosine(1000)
    moved = ours.snr().log() - plain.snr().log()
    torch.testing.assert_close(moved, torch.full_like(moved, 2 * math.log(64 / 128)), rtol=0, atol=1e-7)


@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_min_snr_weight_is_its_formula(prediction, offset):
    s = NoiseSchedule.cosine(1000)
    snr, capped = s.snr(), (s.snr() + offset).clamp(max=5)
    expected = {"epsilon": capped / snr, "sample": capped, "v_prediction": capped / (snr + 1)}[prediction]
    found = s.min_snr_weight(torch.arange(1000), prediction, 5.0, offset)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=0)
    assert found.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_an_offset_keeps_the_weight_of_v_at_high_noise(name):
    s, t = NoiseSchedule.named(name, 1000), torch.arange(1000)
    without, with_one = (s.min_snr_weight(t, "v_prediction", 5.0, offset) for offset in (0.0, 1.0))
    assert float(without[-1]) < (1e-2 if name == "quadratic" else 1e-3)
    torch.testing.assert_close(with_one[s.snr() <= 4], torch.ones(int((s.snr() <= 4).sum())))
    assert (with_one >= without).all()


def test_an_offset_has_no_weight_for_the_noise_where_no_signal_is_left():
    s, t = NoiseSchedule.linear().zero_terminal_snr(), torch.tensor([0, 999])
    with pytest.raises(ValueError, match="predicts v or the image, or offset 0"):
        s.min_snr_weight(t[:1], "epsilon", 5.0, 1.0)  # whatever t: a run fails at once, not some day
    assert s.min_snr_weight(t, "epsilon", 5.0)[1] == 1
    assert s.min_snr_weight(t, "v_prediction", 5.0, 1.0)[1] == 1
    assert s.min_snr_weight(t, "sample", 5.0, 1.0)[1] == 1


def test_first_step_is_already_noisy():
    s = NoiseSchedule.linear()
    assert float(s.alphas_cumprod[0]) == pytest.approx(1 - 1e-4)


def test_integer_and_batch_timesteps_agree():
    s = NoiseSchedule.cosine(10)
    x, noise = torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), 0.5)
    assert torch.equal(s.q_sample(x, 3, noise), s.q_sample(x, torch.tensor([3, 3]), noise))
    assert s.q_sample(x, 3, noise).dtype == torch.float32


def test_loss_of_a_zero_output_is_the_mean_square_of_the_noise():
    s = NoiseSchedule.cosine(10)
    x, noise, t = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 2.0), torch.tensor([0, 9])
    loss = diffusion_loss(lambda x, t, y: torch.zeros_like(x), s, x, t, noise, "epsilon")
    assert loss.tolist() == [4.0, 4.0]


def test_the_loss_hands_the_conditions_to_the_network():
    s, y = NoiseSchedule.cosine(10), {"label": torch.tensor([1, 3])}
    x, t = torch.zeros(2, 1, 4, 4), torch.tensor([0, 9])
    network = lambda x, t, y: y["label"].reshape(-1, 1, 1, 1).expand_as(x).float()  # noqa: E731
    assert diffusion_loss(network, s, x, t, x, "epsilon", y).tolist() == [1.0, 9.0]


def test_a_batch_keeps_to_its_timesteps():
    s = NoiseSchedule.cosine(50)
    x0, noise, t = torch.ones(3, 1, 2, 2), torch.zeros(3, 1, 2, 2), torch.tensor([0, 20, 49])
    for prediction in PREDICTIONS:
        x_t = s.q_sample(x0, t, noise)
        alone = [s.predict_x0(x_t[i : i + 1], int(t[i]), x_t[i : i + 1], prediction) for i in range(3)]
        torch.testing.assert_close(s.predict_x0(x_t, t, x_t, prediction), torch.cat(alone))


def test_the_denoiser_gives_the_image_that_the_output_implies():
    s = NoiseSchedule.cosine(100)
    x0, noise = torch.randn((2, 3, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for prediction in PREDICTIONS:
        target = lambda x, t, y, prediction=prediction: s.target(x0, noise, t, prediction)  # noqa: E731
        denoise = Denoiser(target, s, prediction, (1, 4, 4))
        for t in (7, torch.tensor([3, 50, 98])):
            torch.testing.assert_close(denoise(s.q_sample(x0, t, noise), t), x0)
    with pytest.raises(ValueError, match="v_prediction"):
        Denoiser(target, s, "noise", (1, 4, 4))


class _NoFloat64(TorchFunctionMode):
    """Stands for Apple's MPS, which has no float64: fails when such a tensor is moved."""

    def __torch_function__(self, function, types, arguments=(), settings=None):
        settings = settings or {}
        asked = [a for a in (*arguments[1:], *settings.values()) if isinstance(a, str | torch.device)]
        if function is torch.Tensor.to and any(torch.device(a).type == "meta" for a in asked):
            assert arguments[0].dtype != torch.float64, "MPS has no float64"
        return function(*arguments, **settings)


def test_no_float64_is_moved_to_a_device():
    s = NoiseSchedule.cosine(50)
    with _NoFloat64():
        with pytest.raises(AssertionError, match="MPS has no float64"):
            torch.zeros(1, dtype=torch.float64).to("meta")
        x, t = torch.zeros(2, 1, 4, 4, device="meta"), torch.tensor([0, 40])
        for prediction in PREDICTIONS:
            network = lambda x, t, y: x  # noqa: E731
            diffusion_loss(network, s, x, t, x, prediction, min_snr_gamma=5.0)
            diffusion_loss(network, s, x, t.to("meta"), x, prediction, min_snr_gamma=5.0)
            s.predict_noise(x, 3, x, prediction)
        s.q_posterior(x, x, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, x: s.q_sample(x, 10, x), "0 … 9"),
        (lambda s, x: s.q_sample(x, -1, x), "0 … 9"),
        (lambda s, x: s.levels(10), "0 … 9"),
        (lambda s, x: s.q_sample(x, torch.tensor([1, 2, 3]), x), "batch of 2"),
        (lambda s, x: s.target(x, x, 1, "noise"), "v_prediction"),
        (lambda s, x: s.predict_x0(x, 1, x, "noise"), "v_prediction"),
        (lambda s, x: NoiseSchedule(torch.tensor([0.1, 1.5])), r"betas\[1\] is 1.5"),
        (lambda s, x: NoiseSchedule(torch.zeros(2, 2)), "shape"),
        (lambda s, x: NoiseSchedule.linear(0), "at least one step"),
        (lambda s, x: NoiseSchedule.named("exponential", 10), "shifted cosine"),
        (lambda s, x: s.shifted(0), "factor is 0"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(NoiseSchedule.cosine(10), torch.zeros(2, 1, 2, 2))


def test_float_timesteps_are_refused():
    with pytest.raises(TypeError, match="integers"):
        NoiseSchedule.cosine(10).q_sample(torch.zeros(1, 1), torch.tensor([0.5]), torch.zeros(1, 1))


def test_bytes_are_refused():
    # x₀ of bytes times a share below 1 would be 0
    x = torch.ones(1, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(TypeError, match="to_unit_range"):
        NoiseSchedule.cosine(10).q_sample(x, 3, x)


def test_repr_names_the_schedule():
    assert repr(NoiseSchedule.cosine(10)) == "NoiseSchedule.cosine(T=10)"
