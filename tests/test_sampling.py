from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler

from oasis_helpers.diffusion import PREDICTIONS, NoiseSchedule
from oasis_helpers.sampling import (
    IdealDenoiser,
    ddim_invert,
    ddim_step,
    ddpm_step,
    dpm_solver_step,
    estimate_x0,
    heun_step,
    inpaint,
    karras_timesteps,
    sample,
    sample_images,
    slerp,
    spaced_timesteps,
)

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def _inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 1, 4, 4, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddpm_step_equals_diffusers_at_every_t(name, prediction, clip):
    s = NoiseSchedule.named(name, 1000)
    reference = DDPMScheduler(
        1000,
        trained_betas=s.betas.numpy(),
        prediction_type=prediction,
        clip_sample=clip,
        variance_type="fixed_small",
    )
    reference.alphas, reference.betas = s.alphas, s.betas
    reference.alphas_cumprod, reference.one = s.alphas_cumprod, torch.tensor(1.0, dtype=torch.float64)
    x_t, output, _ = (v.double() for v in _inputs())
    for t in range(1000):
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(t), dtype=x_t.dtype)
        theirs = reference.step(output, t, x_t, generator=torch.Generator().manual_seed(t)).prev_sample
        ours = ddpm_step(s, output, t, x_t, prediction=prediction, clip=clip, noise=noise)
        scale = max(1.0, float(theirs.abs().max()))
        assert float((ours - theirs).abs().max()) / scale < 1e-5, t


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_step_equals_diffusers_at_every_t(name, prediction, eta):
    s = NoiseSchedule.named(name, 1000)
    reference = DDIMScheduler(1000, trained_betas=s.betas.numpy(), prediction_type=prediction)
    reference.alphas_cumprod = s.alphas_cumprod
    reference.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    x_t, output, noise = (v.double() for v in _inputs())
    for stride in (1, 20):
        reference.set_timesteps(1000 // stride)
        for t in range(1000):
            # diffusers writes the same values for every stride: previous = t − stride
            t_prev = max(t - stride, -1)
            theirs = reference.step(output, t, x_t, eta=eta, variance_noise=noise).prev_sample
            ours = ddim_step(s, output, t, t_prev, x_t, prediction=prediction, eta=eta, noise=noise)
            scale = max(1.0, float(theirs.abs().max()))
            assert float((ours - theirs).abs().max()) / scale < 1e-5, (stride, t)


def _answer(x, t):
    """Stands for a network: depends on the image and on the time."""
    return 0.6 * torch.sin(3 * x) + 0.2 * torch.cos(torch.as_tensor(t / 50.0))


@pytest.mark.parametrize("name", SCHEDULES)
def test_large_variance_equals_diffusers(name):
    s = NoiseSchedule.named(name, 1000)
    reference = DDPMScheduler(1000, trained_betas=s.betas.numpy(), variance_type="fixed_large")
    reference.alphas, reference.betas, reference.alphas_cumprod = s.alphas, s.betas, s.alphas_cumprod
    reference.one = torch.tensor(1.0, dtype=torch.float64)
    x_t, output, _ = (v.double() for v in _inputs())
    for t in (0, 1, 17, 500, 999):
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(t), dtype=x_t.dtype)
        theirs = reference.step(output, t, x_t, generator=torch.Generator().manual_seed(t)).prev_sample
        ours = ddpm_step(s, output, t, x_t, variance="large", noise=noise)
        assert float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max())) < 1e-5, t


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_dpm_solver_equals_diffusers_step_by_step(name, prediction, spacing):
    s = NoiseSchedule.named(name, 1000)
    reference = DPMSolverMultistepScheduler(
        1000, trained_betas=s.betas.numpy(), prediction_type=prediction, timestep_spacing=spacing
    )
    reference.set_timesteps(20)
    times = reference.timesteps.tolist()
    sigmas = ((1 - s.alphas_cumprod) / s.alphas_cumprod).sqrt()
    reference.sigmas = torch.cat([sigmas[times], sigmas.new_zeros(1)])  # theirs are float32
    x, previous = _inputs()[0].double(), None
    for t, t_prev in zip(times, [*times[1:], -1]):
        output = _answer(x, t)
        theirs = reference.step(output, t, x).prev_sample
        how = {"prediction": prediction, "clip": False}
        ours = dpm_solver_step(s, output, t, t_prev, x, previous=previous, **how)
        previous = t, estimate_x0(s, output, t, x, **how)
        assert float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max())) < 1e-5, t
        x = theirs


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_heun_equals_diffusers_step_by_step(name, prediction):
    s = NoiseSchedule.named(name, 1000)
    reference = HeunDiscreteScheduler(
        1000, trained_betas=s.betas.numpy(), prediction_type=prediction, timestep_spacing="trailing"
    )
    reference.set_timesteps(10)
    times = spaced_timesteps(1000, 10)
    assert sorted({int(t) for t in reference.timesteps}, reverse=True) == times
    sigmas = ((1 - s.alphas_cumprod) / s.alphas_cumprod).sqrt()
    doubled = torch.cat([sigmas[times], sigmas.new_zeros(1)])
    reference.sigmas = torch.cat([doubled[:1], doubled[1:-1].repeat_interleave(2), doubled[-1:]])
    scale = s.alphas_cumprod.sqrt()  # theirs is x/√ᾱ
    x, how = _inputs()[0].double(), {"prediction": prediction, "clip": False}
    for t, t_prev in pairwise(times):
        output = _answer(x, t)
        guess = ddim_step(s, output, t, t_prev, x, **how)
        theirs = reference.step(output, t, x / scale[t]).prev_sample * scale[t_prev]
        assert float((guess - theirs).abs().max()) / max(1.0, float(theirs.abs().max())) < 1e-5, t
        second = _answer(guess, t_prev)
        ours = heun_step(s, output, t, t_prev, x, second, guess, **how)
        theirs = reference.step(second, t_prev, guess / scale[t_prev]).prev_sample * scale[t_prev]
        assert float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max())) < 1e-5, t
        x = ours


def _gaussian(schedule, mean, deviation):
    """The perfect denoiser of normal data, and the exact end of the ODE from x at T − 1."""

    def denoiser(x, t, y=None):
        a = schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return mean + a.sqrt() * deviation**2 / (a * deviation**2 + 1 - a) * (x - a.sqrt() * mean)

    a = schedule.alphas_cumprod[-1]

    def end(x):
        return mean + deviation * (x - a.sqrt() * mean) / (a * deviation**2 + 1 - a).sqrt()

    return denoiser, end


def _errors(method, steps, **settings):
    s = NoiseSchedule.linear(8000, 0.1 / 8000, 20 / 8000)
    denoiser, end = _gaussian(s, 0.3, 0.5)
    x = torch.randn(64, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    how = {"prediction": "sample", "clip": False, "start": (x, 7999), "method": method} | settings
    ends = [sample_images(denoiser, s, x.shape, steps=n, **how) for n in steps]
    return [float((found - end(x)).square().mean().sqrt()) for found in ends]


def test_second_order_solvers_beat_the_first_on_gaussian_data():
    first = _errors("ddim", (20, 40))
    assert first[0] / first[1] == pytest.approx(2, rel=0.1)  # first order: half the step, half the error
    assert _errors("dpm_solver", (40,))[0] < first[1] / 5
    heun = _errors("heun", (10, 20), spacing="karras")  # as many calls of the network
    assert heun[0] / heun[1] > 3
    assert heun[1] < first[1]


def test_evaluations_are_counted():
    s, calls = NoiseSchedule.cosine(50), []

    def model(x, t, y):
        calls.append(int(t[0]))
        return torch.zeros_like(x)

    for method, wanted in (("ddim", 5), ("dpm_solver", 5), ("heun", 9)):
        calls.clear()
        *_, last = sample(model, s, (1, 1, 4, 4), method=method, steps=5, prediction="v_prediction")
        assert last.evaluations == len(calls) == wanted


def test_zero_terminal_snr():
    s = NoiseSchedule.linear(1000).zero_terminal_snr()
    assert s.alphas_cumprod[-1] == 0
    assert s.alphas_cumprod[0] == pytest.approx(float(NoiseSchedule.linear(1000).alphas_cumprod[0]))
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    theirs = rescale_zero_terminal_snr(NoiseSchedule.linear(1000).betas)
    torch.testing.assert_close(s.betas, theirs, rtol=1e-9, atol=1e-12)
    x, *_ = _inputs()
    with pytest.raises(ValueError, match="no signal is left"):
        ddim_step(s, x, 999, 900, x)
    with pytest.raises(ValueError, match="no signal is left"):
        heun_step(s, x, 999, 900, x, x, x, prediction="v_prediction")
    for method in ("ddpm", "ddim", "dpm_solver", "heun"):
        steps = None if method == "ddpm" else 5
        *_, last = sample(
            lambda x, t, y: -x / 2, s, x.shape, method=method, steps=steps, prediction="v_prediction"
        )
        assert last.x.isfinite().all()


def test_dynamic_thresholding():
    s, (x, output, _) = NoiseSchedule.cosine(10), _inputs()
    raw = estimate_x0(s, 3 * output, 5, x, prediction="sample", clip=False)
    held = estimate_x0(s, 3 * output, 5, x, prediction="sample", clip=0.9)
    for image, found in zip(raw, held):
        limit = max(1.0, float(image.abs().flatten().quantile(0.9)))
        torch.testing.assert_close(found, image.clamp(-limit, limit) / limit)
    small = 0.1 * output
    assert torch.equal(estimate_x0(s, small, 5, x, prediction="sample", clip=0.9), small)
    with pytest.raises(ValueError, match="quantile"):
        estimate_x0(s, small, 5, x, prediction="sample", clip=1.5)


def test_karras_spacing():
    s = NoiseSchedule.cosine(1000)
    times = karras_timesteps(s, 20)
    noise = ((1 - s.alphas_cumprod) / s.alphas_cumprod).sqrt()
    assert times == sorted(set(times), reverse=True)
    assert noise[times[0]] == pytest.approx(80, rel=0.2)
    roots = noise[times] ** (1 / 7)
    assert (roots.diff() < 0).all()
    assert len(karras_timesteps(s, 1)) == 1
    with pytest.raises(ValueError, match="steps is 0"):
        karras_timesteps(s, 0)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_spacings_equal_diffusers(spacing):
    for steps in (1, 7, 20, 50):
        reference = DDIMScheduler(1000, timestep_spacing=spacing)
        reference.set_timesteps(steps)
        if spacing == "linspace" and steps == 1:
            continue  # theirs is 0, where there is nothing to do
        assert spaced_timesteps(1000, steps, spacing) == reference.timesteps.tolist()
    with pytest.raises(ValueError, match="spacing is 'odd'"):
        spaced_timesteps(10, 5, "odd")


def test_ddim_with_eta_1_is_ddpm():
    s = NoiseSchedule.cosine(100)
    x_t, output, noise = (v.double() for v in _inputs())
    for t in range(1, 100):
        a = ddpm_step(s, output, t, x_t, clip=False, noise=noise)
        b = ddim_step(s, output, t, t - 1, x_t, eta=1.0, clip=False, noise=noise)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_without_noise_the_step_is_the_mean():
    s = NoiseSchedule.cosine(100)
    x_t, output, noise = _inputs()
    mean = ddpm_step(s, output, 50, x_t)
    assert torch.allclose(
        mean,
        (ddpm_step(s, output, 50, x_t, noise=noise) + ddpm_step(s, output, 50, x_t, noise=-noise)) / 2,
        atol=1e-6,
    )
    assert torch.equal(ddpm_step(s, output, 0, x_t, noise=noise), ddpm_step(s, output, 0, x_t))


class Oracle:
    """A perfect network for one image: it returns the true noise."""

    def __init__(self, s, x0):
        self.s, self.x0 = s, x0

    def __call__(self, x, t, y=None):
        return self.s.predict_noise(x, t, self.x0.expand_as(x), "sample")


@pytest.mark.parametrize(
    "settings", [{"method": "ddpm"}, {"method": "ddim", "steps": 7}, {"method": "ddim", "eta": 1.0}]
)
def test_an_oracle_leads_back_to_the_image(settings):
    s = NoiseSchedule.cosine(60)
    x0 = torch.linspace(-0.9, 0.9, 16).reshape(1, 1, 4, 4)
    states = list(sample(Oracle(s, x0), s, (3, 1, 4, 4), **settings))
    assert states[0].t == 59
    assert states[-1].t_prev == -1
    assert len(states) == {"ddpm": 60}.get(settings["method"], settings.get("steps", 50))
    torch.testing.assert_close(states[-1].x, x0.expand(3, 1, 4, 4), atol=1e-3, rtol=0)
    assert all(float(state.x0.abs().max()) <= 1 for state in states)


def test_seeds_decide():
    s, shape = NoiseSchedule.cosine(20), (2, 1, 4, 4)
    model = lambda x, t, y=None: 0.1 * x  # noqa: E731
    first = sample_images(model, s, shape, seed=3)
    assert torch.equal(first, sample_images(model, s, shape, seed=3))
    assert not torch.equal(first, sample_images(model, s, shape, seed=4))
    before = torch.random.get_rng_state()
    sample_images(model, s, shape)
    assert torch.equal(before, torch.random.get_rng_state())


def test_start_from_a_noised_image():
    s = NoiseSchedule.cosine(40)
    x0 = torch.full((1, 1, 4, 4), 0.25)
    states = list(sample(Oracle(s, x0), s, (1, 1, 4, 4), start=(s.q_sample(x0, 17, torch.ones_like(x0)), 17)))
    assert [states[0].t, len(states)] == [17, 18]
    torch.testing.assert_close(states[-1].x, x0, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("T", "steps"), [(1000, 50), (1000, 7), (10, 10), (5, 1)])
def test_spaced_timesteps_start_at_the_end(T, steps):
    found = spaced_timesteps(T, steps)
    assert found[0] == T - 1
    assert found[-1] >= 0
    assert len(found) == steps == len(set(found))
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "euler"}, "'ddpm', 'ddim'"),
        ({"method": "ddpm", "steps": 5}, "all 10 steps"),
        ({"method": "ddim", "steps": 11}, "1 to T = 10"),
        ({"prediction": "noise"}, "v_prediction"),
        ({"start": (torch.zeros(1, 1, 2, 2), 5)}, "shape"),
        ({"start": (torch.zeros(1, 1, 4, 4), 10)}, "0 … 9"),
        ({"method": "ddim", "eta": 2.0}, "eta"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        list(sample(lambda x, t, y=None: x, NoiseSchedule.cosine(10), (1, 1, 4, 4), **settings))


def test_ddim_wants_time_to_run_backwards():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="t_prev"):
        ddim_step(NoiseSchedule.cosine(10), x, 3, 3, x)


def test_the_ideal_denoiser_is_the_posterior_mean():
    s, data = NoiseSchedule.cosine(100), torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1)
    ideal, x = IdealDenoiser(s, data), torch.linspace(-2, 2, 9).reshape(9, 1, 1, 1)
    for t in (5, 50, 95):
        a = s.alphas_cumprod[t]
        by_hand = torch.tanh(a.sqrt() * x / (1 - a))  # two points: the mean is a tanh
        times = torch.full((9,), t)
        torch.testing.assert_close(ideal(x, times), by_hand.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ideal.weights(x, times).sum(1), torch.ones(9, dtype=torch.float64))
    mixed = ideal(x[:2], torch.tensor([5, 95]))  # every image has its own timestep
    torch.testing.assert_close(mixed[1:], ideal(x[1:2], torch.tensor([95])))


@pytest.mark.parametrize("method", ["ddim", "dpm_solver", "heun"])
def test_a_perfect_fit_only_copies(method):
    generator = torch.Generator().manual_seed(0)
    data = torch.rand((6, 1, 4, 4), generator=generator) * 2 - 1
    s = NoiseSchedule.cosine(200)
    found = sample_images(
        IdealDenoiser(s, data),
        s,
        (20, 1, 4, 4),
        method=method,
        steps=40,
        spacing="karras",
        prediction="sample",
    )
    nearest = torch.cdist(found.flatten(1), data.flatten(1)).min(1)
    assert nearest.values.max() < 1e-3
    assert len(nearest.indices.unique()) > 3


def test_inpainting_keeps_what_is_given_and_fits_the_rest():
    generator = torch.Generator().manual_seed(0)
    data = torch.rand((6, 1, 4, 4), generator=generator) * 2 - 1
    s, hole = NoiseSchedule.cosine(200), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    hole[..., 2:, :] = True
    *_, last = inpaint(IdealDenoiser(s, data), s, data, hole, steps=20, prediction="sample")
    assert torch.equal(last.x[..., :2, :], data[..., :2, :])
    assert (last.x - data).abs().max() < 0.05  # one image alone has this upper half
    assert last.evaluations == 19 * 5 + 1
    once = [state.x for state in inpaint(IdealDenoiser(s, data), s, data, hole, steps=3, resamples=1, seed=1)]
    again = [
        state.x for state in inpaint(IdealDenoiser(s, data), s, data, hole, steps=3, resamples=1, seed=1)
    ]
    assert all(torch.equal(a, b) for a, b in zip(once, again))


@pytest.mark.parametrize(
    ("hole", "resamples", "message"),
    [
        (torch.ones(1, 1, 4, 4), 5, "booleans"),
        (torch.ones(1, 1, 5, 4, dtype=torch.bool), 5, "hole has shape"),
        (torch.ones(7, 1, 4, 4, dtype=torch.bool), 5, "hole has shape"),
        (torch.ones(1, 1, 4, 4, dtype=torch.bool), 0, "at least 1"),
    ],
)
def test_mistakes_in_inpainting_are_named(hole, resamples, message):
    image = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match=message):
        next(inpaint(lambda x, t, y: x, NoiseSchedule.cosine(10), image, hole, resamples=resamples))


def test_inversion_leads_back_to_the_image():
    s = NoiseSchedule.linear(1000)
    denoiser, _ = _gaussian(s, 0.3, 0.5)
    image = 0.3 + 0.5 * torch.randn(
        8, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    errors, how = [], {"prediction": "sample"}
    for steps in (25, 100):
        *_, up = ddim_invert(denoiser, s, image, steps=steps, **how)
        assert (up.t, up.evaluations) == (999, steps)
        back = sample_images(
            denoiser, s, image.shape, method="ddim", steps=steps, start=(up.x, 999), clip=False, **how
        )
        errors.append(float((back - image).abs().max()))
    assert errors[1] < errors[0] / 2
    assert errors[1] < 0.1


def test_slerp_keeps_the_length():
    a, b = torch.randn((2, 3, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-5)
    assert torch.allclose(slerp(a, b, 1.0), b, atol=1e-5)
    length = slerp(a, b, 0.5).flatten(1).norm(dim=1)
    assert torch.allclose(length, (a.flatten(1).norm(dim=1) + b.flatten(1).norm(dim=1)) / 2, rtol=0.05)
    assert torch.allclose(slerp(a, a, 0.3), a, atol=1e-4)
