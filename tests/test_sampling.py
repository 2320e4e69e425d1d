import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from oasis_helpers.diffusion import PREDICTIONS, NoiseSchedule
from oasis_helpers.sampling import ddim_step, ddpm_step, sample, sample_images, trailing_timesteps

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
def test_trailing_timesteps_start_at_the_end(T, steps):
    found = trailing_timesteps(T, steps)
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
