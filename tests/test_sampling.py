import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler

from oasis_helpers.diffusion import PREDICTIONS, NoiseSchedule, Process
from oasis_helpers.sampling import (
    Denoiser,
    IdealDenoiser,
    autoguided,
    clipped,
    ddim_invert,
    ddim_step,
    ddpm_step,
    dpm_solver_step,
    guided,
    heun_step,
    inpaint,
    karras_timesteps,
    limited,
    sample,
    sample_images,
    slerp,
    spaced_timesteps,
)

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def _inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 1, 4, 4, generator=generator) for _ in range(3)]


def _close(ours, theirs, where):
    assert float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max())) < 1e-5, where


# All the first and last timesteps, where formulas go wrong, and some between.
TIMES = (*range(12), *range(12, 988, 61), *range(988, 1000))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddpm_step_equals_diffusers(name, prediction, clip):
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
    for t in TIMES:
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(t), dtype=x_t.dtype)
        theirs = reference.step(output, t, x_t, generator=torch.Generator().manual_seed(t)).prev_sample
        x0 = s.predict_x0(x_t, t, output, prediction)
        _close(ddpm_step(s, x0.clamp(-1, 1) if clip else x0, t, x_t, noise=noise), theirs, t)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_step_equals_diffusers(name, prediction, eta, clip):
    s = NoiseSchedule.named(name, 1000)
    reference = DDIMScheduler(
        1000, trained_betas=s.betas.numpy(), prediction_type=prediction, clip_sample=clip
    )
    reference.alphas_cumprod = s.alphas_cumprod
    reference.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    x_t, output, noise = (v.double() for v in _inputs())
    for stride in (1, 20):
        reference.set_timesteps(1000 // stride)
        for t in TIMES:
            # diffusers writes the same values for every stride: previous = t − stride
            t_prev = max(t - stride, -1)
            theirs = reference.step(
                output, t, x_t, eta=eta, variance_noise=noise, use_clipped_model_output=True
            ).prev_sample
            x0 = s.predict_x0(x_t, t, output, prediction)
            ours = ddim_step(s, x0.clamp(-1, 1) if clip else x0, t, t_prev, x_t, eta=eta, noise=noise)
            _close(ours, theirs, (stride, t))


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
        x0 = s.predict_x0(x_t, t, output, "epsilon").clamp(-1, 1)
        ours = ddpm_step(s, x0, t, x_t, variance="large", noise=noise)
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
        x0 = s.predict_x0(x, t, output, prediction)
        _close(dpm_solver_step(s, x0, t, t_prev, x, previous=previous), theirs, t)
        previous = t, x0
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
    x = _inputs()[0].double()
    for t, t_prev in pairwise(times):
        output = _answer(x, t)
        x0 = s.predict_x0(x, t, output, prediction)
        guess = ddim_step(s, x0, t, t_prev, x)
        theirs = reference.step(output, t, x / scale[t]).prev_sample * scale[t_prev]
        _close(guess, theirs, t)
        second = _answer(guess, t_prev)
        ours = heun_step(s, x0, t, t_prev, x, s.predict_x0(guess, t_prev, second, prediction))
        theirs = reference.step(second, t_prev, guess / scale[t_prev]).prev_sample * scale[t_prev]
        _close(ours, theirs, t)
        x = ours


def test_heun_of_one_estimate_is_euler():
    # Both slopes of the same estimate: nothing may be mixed of a clipped and an unclipped one.
    s, (x, x0, _) = NoiseSchedule.cosine(100), (v.double() for v in _inputs())
    euler = ddim_step(s, x0, 60, 40, x)
    torch.testing.assert_close(heun_step(s, x0, 60, 40, x, x0), euler, rtol=1e-9, atol=1e-9)


# ---- what is known exactly: normal data ----------------------------------------------------------

FLOW = {"flow": lambda s, n: (torch.ones_like(s), -torch.ones_like(n))}


def _straight(T):
    """Rectified flow as a process: x_t = (1 − τ) x₀ + τ ε."""
    tau = torch.arange(1, T + 1, dtype=torch.float64) / (T + 1)
    return Process(1 - tau, tau, "straight")


def _gaussian(process, mean, deviation, prediction="sample"):
    """The perfect denoiser of normal data through ``prediction``, and the exact end of the ODE from T − 1."""

    def network(x, t, y=None):
        signal, noise = (v[t].reshape(-1, 1, 1, 1) for v in (process.signal, process.noise))
        variance = (signal * deviation) ** 2 + noise**2
        x0 = mean + signal * deviation**2 / variance * (x - signal * mean)
        return process.target(x0, (x - signal * x0) / noise, t, prediction)

    (s, n) = process.levels(process.T - 1)

    def end(x):
        return mean + deviation * (x - s * mean) / ((s * deviation) ** 2 + n**2) ** 0.5

    return Denoiser(network, process, prediction, (1, 1, 1)), end


PROCESSES = {
    "linear": lambda: NoiseSchedule.linear(8000, 0.1 / 8000, 20 / 8000),
    "flow": lambda: _straight(8000),
}


def _errors(process, method, steps, prediction="sample", **settings):
    denoise, end = _gaussian(process, 0.3, 0.5, prediction)
    x = torch.randn(64, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    how = {"start": (x, process.T - 1), "method": method} | settings
    ends = [sample_images(denoise, 64, steps=n, **how) for n in steps]
    return [float((found - end(x)).square().mean().sqrt()) for found in ends]


@pytest.mark.parametrize("name", PROCESSES)
def test_second_order_solvers_beat_the_first_on_gaussian_data(name, monkeypatch):
    monkeypatch.setitem(PREDICTIONS, "flow", FLOW["flow"])  # all that a new prediction needs
    process, prediction = PROCESSES[name](), "flow" if name == "flow" else "v_prediction"
    first = _errors(process, "ddim", (40, 80), prediction)
    assert first[0] / first[1] == pytest.approx(2, rel=0.1)  # first order: half the step, half the error
    assert _errors(process, "dpm_solver", (80,), prediction)[0] < first[1] / 5
    heun = _errors(process, "heun", (20, 40), prediction, spacing="karras")  # as many calls
    assert heun[0] / heun[1] > 3
    assert heun[1] < first[1]


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("name", PROCESSES)
def test_random_steps_end_in_the_right_distribution(name, method):
    process = {"linear": NoiseSchedule.linear, "flow": _straight}[name](300)
    denoise, _ = _gaussian(process, 0.3, 0.5)
    found = sample_images(denoise, 20_000, method=method, steps=300, eta=1.0, seed=1)
    start = denoise.schedule.levels(299)[0]  # what is left of the image where pure noise is put
    assert float(found.mean()) == pytest.approx(0.3, abs=0.02 + start)
    assert float(found.std()) == pytest.approx(0.5, rel=0.03)


def test_evaluations_are_counted():
    s, calls = NoiseSchedule.cosine(50), []

    def network(x, t, y):
        calls.append(int(t[0]))
        return torch.zeros_like(x)

    for method, wanted in (("ddim", 5), ("dpm_solver", 5), ("heun", 9)):
        calls.clear()
        *_, last = sample(Denoiser(network, s, "v_prediction", (1, 4, 4)), 1, method=method, steps=5)
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
        s.predict_x0(x, 999, x, "epsilon")
    with pytest.raises(ValueError, match="no signal is left"):
        heun_step(s, x, 999, 900, x, x)
    denoise = Denoiser(lambda x, t, y: -x / 2, s, "v_prediction", tuple(x.shape[1:]))
    for method in ("ddpm", "ddim", "dpm_solver", "heun"):
        *_, last = sample(denoise, 2, method=method, steps=None if method == "ddpm" else 5)
        assert last.x.isfinite().all()


# ---- denoisers around denoisers -------------------------------------------------------------------


class _Fixed:
    """Stands for a denoiser: the same estimate everywhere, another with conditions."""

    def __init__(self, x0, with_y=None, schedule=None):
        self.x0, self.with_y, self.schedule = x0, with_y, schedule or NoiseSchedule.cosine(10)
        self.shape, self.device, self.asked = tuple(x0.shape[1:]), x0.device, []

    def __call__(self, x, t, y=None):
        self.asked.append(y)
        return self.with_y if y else self.x0


def test_clipping_holds_estimates_in_the_range_of_images():
    _, output, _ = _inputs()
    raw = 3 * output
    assert torch.equal(clipped(_Fixed(raw))(raw, 5), raw.clamp(-1, 1))
    held = clipped(_Fixed(raw), quantile=0.9)(raw, 5)
    for image, found in zip(raw, held):
        limit = max(1.0, float(image.abs().flatten().quantile(0.9, interpolation="higher")))
        torch.testing.assert_close(found, image.clamp(-limit, limit) / limit)
    small = 0.1 * output
    assert torch.equal(clipped(_Fixed(small), quantile=0.9)(small, 5), small)
    with pytest.raises(ValueError, match="quantile"):
        clipped(_Fixed(raw), quantile=1.5)


def test_quantiles_of_many_values():
    # torch.quantile refuses more than 2^24 values, which 65 images of 512×512 have.
    images = torch.zeros(65, 1, 512, 512)
    images[:, :, 0] = 3.0
    assert clipped(_Fixed(images), quantile=0.999)(images, 5).max() == 1


def test_guidance_is_the_rule_and_its_ends_are_exact():
    without, with_y, _ = _inputs()
    denoise, y = _Fixed(without, with_y), {"label": torch.tensor([0, 1])}
    torch.testing.assert_close(guided(denoise, 3.0)(without, 5, y), without + 3 * (with_y - without))
    denoise.asked.clear()
    assert torch.equal(guided(denoise, 1.0)(without, 5, y), with_y)
    assert torch.equal(guided(denoise, 0.0)(without, 5, y), without)
    assert denoise.asked == [y, None]  # one call each, not two
    with pytest.raises(ValueError, match="nothing to guide towards"):
        guided(denoise, 2.0)(without, 5)


def test_guidance_in_the_image_is_guidance_in_the_noise():
    s, (x, first, second) = NoiseSchedule.cosine(100), (v.double() for v in _inputs())
    epsilons = [s.predict_noise(x, 40, x0, "sample") for x0 in (first, second)]
    mixed = epsilons[0] + 2.5 * (epsilons[1] - epsilons[0])
    found = guided(_Fixed(first, second, s), 2.5)(x, 40, {"label": torch.tensor([0, 1])})
    torch.testing.assert_close(found, s.predict_x0(x, 40, mixed, "epsilon"))


class _Gaussians:
    """The exact denoiser of normal distributions in 1-D, half of all numbers from each.

    The condition "label" names one of them; without it x_0 is from any.
    """

    shape, device = (1,), torch.device("cpu")

    def __init__(self, schedule, means, deviations):
        self.schedule = schedule
        self.means, self.deviations = (torch.tensor(v, dtype=torch.float64) for v in (means, deviations))

    def _log_density(self, x, t):
        """log p_t(x | label) of every label, (B, labels)."""
        s, n = self.schedule.levels(t)
        return torch.distributions.Normal(s * self.means, (s**2 * self.deviations**2 + n**2).sqrt()).log_prob(
            x
        )

    def log_density(self, x, t, y=None):
        found = self._log_density(x, t)
        if y:
            return found.gather(1, y["label"][:, None])[:, 0]
        return found.logsumexp(1) - math.log(len(self.means))

    def __call__(self, x, t, y=None):
        s, n = self.schedule.levels(t)
        each = (self.means * n**2 + s * self.deviations**2 * x) / (s**2 * self.deviations**2 + n**2)
        if y:
            return each.gather(1, y["label"][:, None])
        return (self._log_density(x, t).softmax(1) * each).sum(1, keepdim=True)


def _carried(denoise, x, y=None):
    """Where a thousand small deterministic steps carry x, (B, 1), from the last timestep."""
    T = denoise.schedule.T
    return sample_images(denoise, len(x), method="ddim", steps=T, start=(x, T - 1), y=y)


def test_the_guided_estimate_is_the_score_of_two_densities_multiplied():
    # Ho & Salimans 2022: of p(x_t | c)^s p(x_t)^(1 − s), at every noise; the rest is Tweedie's formula.
    s, scale = NoiseSchedule.cosine(100), 3.0
    exact = _Gaussians(s, (-1.0, 1.0), (0.4, 0.6))
    x = torch.linspace(-3, 3, 31, dtype=torch.float64)[:, None].requires_grad_()
    y = {"label": torch.arange(31) % 2}
    for t in (5, 50, 90):
        density = scale * exact.log_density(x, t, y) + (1 - scale) * exact.log_density(x, t)
        (score,) = torch.autograd.grad(density.sum(), x)
        signal, noise = s.levels(t)
        estimate = guided(exact, scale)(x.detach(), t, y)
        torch.testing.assert_close((signal * estimate - x.detach()) / noise**2, score)


def test_guidance_does_not_sample_that_product():
    # Of two normal distributions around 0 all is known: the steps arrive at a deviation of σ (σ/σ_u)^(s − 1),
    # and p_c^s p_u^(1 − s) has 1/√(s/σ² + (1 − s)/σ_u²). See Bradley & Nakkiran 2024 (arXiv 2408.09000).
    schedule, own, wide, scale = NoiseSchedule.cosine(1000), 0.5, 1.0, 3.0
    narrow, broad = (_Gaussians(schedule, (0.0,), (d,)) for d in (own, wide))
    x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]], dtype=torch.float64)
    found = _carried(autoguided(narrow, broad, scale), x) / x
    reached = own * (own / wide) ** (scale - 1)
    assert found == pytest.approx(reached, rel=0.02)
    assert reached < 0.5 * (scale / own**2 + (1 - scale) / wide**2) ** -0.5
    assert _carried(autoguided(narrow, broad, 1.0), x) / x == pytest.approx(own, rel=0.02)


def test_guidance_within_an_interval_counts_there_alone():
    # As above, with the part of the way between two noises: σ times a power of the ratio of deviations there.
    schedule, own, wide, scale, low, high = NoiseSchedule.cosine(1000), 0.5, 1.0, 3.0, 300, 700
    narrow, broad = (_Gaussians(schedule, (0.0,), (d,)) for d in (own, wide))
    x = torch.tensor([[-1.0], [2.0]], dtype=torch.float64)
    found = _carried(limited(autoguided(narrow, broad, scale), narrow, low, high), x) / x
    ends = (schedule.noise / schedule.signal)[[low, high]]
    ratio = ((own**2 + ends**2) / (wide**2 + ends**2)).sqrt()
    assert found == pytest.approx(own * float(ratio[0] / ratio[1]) ** (scale - 1), rel=0.02)
    assert found[0] > 1.5 * own * (own / wide) ** (scale - 1)


def test_an_interval_has_both_ends_and_asks_nobody_in_vain():
    first, second, _ = _inputs()
    inside, outside = _Fixed(first), _Fixed(second)
    denoise = limited(inside, outside, 3, 6)
    for t, wanted in ((2, second), (3, first), (6, first), (7, second)):
        assert torch.equal(denoise(first, t), wanted)
    assert (len(inside.asked), len(outside.asked)) == (2, 2)
    assert torch.equal(denoise(first, torch.tensor([6, 7])), torch.stack([first[0], second[1]]))
    for low, high in ((-1, 5), (6, 5), (5, 10)):
        with pytest.raises(ValueError, match=f"from {low} to {high} is no interval of timesteps 0 … 9"):
            limited(inside, outside, low, high)


def test_rescaled_guidance_has_the_contrast_of_the_estimate_with_conditions():
    without, with_y, _ = _inputs()
    denoise, y = _Fixed(without, with_y), {"label": torch.tensor([0, 1])}
    plain, half, whole = (guided(denoise, 4.0, rescale)(without, 5, y) for rescale in (0.0, 0.5, 1.0))
    wanted, found = (images.flatten(1).std(1) for images in (with_y, whole))
    torch.testing.assert_close(found, wanted)
    assert (plain.flatten(1).std(1) > 1.2 * wanted).all()
    torch.testing.assert_close(half, (plain + whole) / 2)
    with pytest.raises(ValueError, match=r"rescale is 1.5: give a share from 0 to 1"):
        guided(denoise, 4.0, 1.5)


def test_a_weaker_network_guides_with_the_same_conditions():
    first, second, third = _inputs()
    strong, weak, y = _Fixed(first, second), _Fixed(third, third), {"label": torch.tensor([0, 1])}
    torch.testing.assert_close(autoguided(strong, weak, 2.5)(first, 5, y), third + 2.5 * (second - third))
    torch.testing.assert_close(autoguided(strong, weak, 2.5)(first, 5), third + 2.5 * (first - third))
    assert weak.asked == [y, None]
    assert torch.equal(autoguided(strong, weak, 1.0)(first, 5), first)
    for other in (_Fixed(first, schedule=NoiseSchedule.linear(10)), _Fixed(first[..., :2])):
        with pytest.raises(ValueError, match="give two of one kind"):
            autoguided(strong, other, 2.0)


def test_conditions_go_with_every_call():
    first, second, _ = _inputs()
    y = {"label": torch.tensor([1, 0])}
    for method, calls in (("ddpm", 10), ("ddim", 4), ("dpm_solver", 4), ("heun", 7)):
        denoise = _Fixed(first, second)
        steps = None if method == "ddpm" else 4
        found = sample_images(denoise, 2, method=method, steps=steps, y=y)
        assert denoise.asked == [y] * calls
        torch.testing.assert_close(found, second, atol=1e-4, rtol=0)
    denoise = _Fixed(first, second)
    *_, last = inpaint(denoise, first, torch.ones(1, 1, 4, 4, dtype=torch.bool), steps=3, y=y)
    torch.testing.assert_close(last.x, second, atol=1e-4, rtol=0)
    *_, last = ddim_invert(denoise, first, steps=3, y=y)
    assert all(asked == y for asked in denoise.asked)


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


@pytest.mark.parametrize("process", [NoiseSchedule.cosine(100), _straight(100)])
def test_ddim_with_eta_1_is_ddpm(process):
    x_t, x0, noise = (v.double() for v in _inputs())
    for t in range(1, 100):
        a = ddpm_step(process, x0, t, x_t, noise=noise)
        b = ddim_step(process, x0, t, t - 1, x_t, eta=1.0, noise=noise)
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


def _oracle(s, x0):
    """A perfect network for one image: it puts out the true noise."""
    network = lambda x, t, y=None: s.predict_noise(x, t, x0.expand_as(x), "sample")  # noqa: E731
    return clipped(Denoiser(network, s, "epsilon", tuple(x0.shape[1:])))


@pytest.mark.parametrize(
    "settings", [{"method": "ddpm"}, {"method": "ddim", "steps": 7}, {"method": "ddim", "eta": 1.0}]
)
def test_an_oracle_leads_back_to_the_image(settings):
    s = NoiseSchedule.cosine(60)
    x0 = torch.linspace(-0.9, 0.9, 16).reshape(1, 1, 4, 4)
    states = list(sample(_oracle(s, x0), 3, **settings))
    assert states[0].t == 59
    assert states[-1].t_prev == -1
    assert len(states) == {"ddpm": 60}.get(settings["method"], settings.get("steps", 50))
    torch.testing.assert_close(states[-1].x, x0.expand(3, 1, 4, 4), atol=1e-3, rtol=0)
    assert all(float(state.x0.abs().max()) <= 1 for state in states)


def test_seeds_decide():
    denoise = Denoiser(lambda x, t, y=None: 0.1 * x, NoiseSchedule.cosine(20), "epsilon", (1, 4, 4))
    first = sample_images(denoise, 2, seed=3)
    assert torch.equal(first, sample_images(denoise, 2, seed=3))
    assert not torch.equal(first, sample_images(denoise, 2, seed=4))
    before = torch.random.get_rng_state()
    sample_images(denoise, 2)
    assert torch.equal(before, torch.random.get_rng_state())
    for seed in (-1, 2**31, 2**32 + 3, 1.5):  # torch keeps 32 bits: 2^32 + 3 would be 3
        with pytest.raises(ValueError, match=r"seed is .*give a whole number from 0 to 2,147,483,647"):
            sample_images(denoise, 2, seed=seed)


def test_start_from_a_noised_image():
    s = NoiseSchedule.cosine(40)
    x0 = torch.full((1, 1, 4, 4), 0.25)
    states = list(sample(_oracle(s, x0), 1, start=(s.q_sample(x0, 17, torch.ones_like(x0)), 17)))
    assert [states[0].t, len(states)] == [17, 18]
    torch.testing.assert_close(states[-1].x, x0, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("T", "steps", "found"),
    [
        (1000, 5, [999, 799, 599, 399, 199]),
        (10, 10, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
        (10, 4, [9, 7, 4, 1]),  # 10 − 2.5 i, rounded (halves to even), less one
        (5, 1, [4]),
    ],
)
def test_trailing_timesteps(T, steps, found):
    assert spaced_timesteps(T, steps) == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "euler"}, "'ddpm', 'ddim'"),
        ({"method": "ddpm", "steps": 5}, "all 10 steps"),
        ({"method": "ddim", "steps": 11}, "1 to T = 10"),
        ({"method": "ddpm", "spacing": "karras"}, "use method='ddim', eta=1"),
        ({"count": 0}, "count is 0"),
        ({"start": (torch.zeros(1, 1, 2, 2), 5)}, "shape"),
        ({"start": (torch.zeros(1, 1, 4, 4), 10)}, "0 … 9"),
        ({"method": "ddim", "eta": 2.0}, "eta"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        list(sample(_Fixed(torch.zeros(1, 1, 4, 4)), **{"count": 1} | settings))


def test_ddim_wants_time_to_run_backwards():
    x = torch.zeros(1, 1, 2, 2)
    s = NoiseSchedule.cosine(10)
    with pytest.raises(ValueError, match="t_prev"):
        ddim_step(s, x, 3, 3, x)
    for step in (ddpm_step, lambda s, x0, t, x: ddim_step(s, x0, t, 2, x)):
        with pytest.raises(ValueError, match="0 … 9"):
            step(s, x, 10, x)


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
    found = sample_images(IdealDenoiser(s, data), 20, method=method, steps=40, spacing="karras")
    nearest = torch.cdist(found.flatten(1), data.flatten(1)).min(1)
    assert nearest.values.max() < 1e-3
    assert len(nearest.indices.unique()) > 3


def test_inpainting_keeps_what_is_given_and_fits_the_rest():
    generator = torch.Generator().manual_seed(0)
    data = torch.rand((6, 1, 4, 4), generator=generator) * 2 - 1
    s, hole = NoiseSchedule.cosine(200), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    hole[..., 2:, :] = True
    *_, last = inpaint(IdealDenoiser(s, data), data, hole, steps=20)
    assert torch.equal(last.x[..., :2, :], data[..., :2, :])
    assert (last.x - data).abs().max() < 0.05  # one image alone has this upper half
    assert last.evaluations == 19 * 5 + 1
    once, again = (
        [state.x for state in inpaint(IdealDenoiser(s, data), data, hole, steps=3, resamples=1, seed=1)]
        for _ in range(2)
    )
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
        next(inpaint(_Fixed(image), image, hole, resamples=resamples))


def test_inversion_leads_back_to_the_image():
    s = NoiseSchedule.linear(1000)
    denoise, _ = _gaussian(s, 0.3, 0.5)
    image = 0.3 + 0.5 * torch.randn(
        8, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    errors = []
    denoise = Denoiser(denoise.network, s, "sample", (1, 2, 2))
    for steps in (25, 100):
        *_, up = ddim_invert(denoise, image, steps=steps)
        assert (up.t, up.evaluations) == (999, steps)
        back = sample_images(denoise, 8, method="ddim", steps=steps, start=(up.x, 999))
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
