import hashlib
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from oasis_helpers import training
from oasis_helpers.autoencoder import (
    AUTOENCODER,
    Autoencoder,
    Autoencoding,
    DiagonalGaussian,
    Latents,
    load_autoencoder,
    load_latents,
    load_stable_diffusion,
)
from oasis_helpers.conditions import Tokens
from oasis_helpers.data import load_slices, to_unit_range
from oasis_helpers.evaluation import SEGMENTER
from oasis_helpers.layout import DataLocation
from oasis_helpers.prompts import LENGTH, SLOTS, VOCABULARY, tokenize
from oasis_helpers.sampling import sample_images
from oasis_helpers.seeds import generator
from oasis_helpers.training import (
    PROFILES,
    WEIGHTS,
    LatentDenoising,
    TrainConfig,
    draw_step,
    read_header,
    run,
    save_weights,
    teach_reading,
    train,
    train_to,
)
from oasis_helpers.unet import count_parameters

SMALL = Autoencoding(
    image_size=64, encoder_widths=(8, 8), decoder_widths=(8, 8), encoder_blocks=1, decoder_blocks=1
)
TINY = TrainConfig(SMALL, steps=4, batch_size=2, warmup=1, ema_decay=0.5)
TINY_LATENT = TrainConfig(LatentDenoising(image_size=8), steps=3, batch_size=4, warmup=1).replace(
    base_channels=8, channel_mult=(1, 2), attention_levels=(1,), reading_steps=2
)


@pytest.fixture(scope="module")
def slices(phantoms):
    return load_slices(phantoms.train, 64)


@pytest.fixture
def small():
    return TINY.make_network().eval()


# ---- the network ----------------------------------------------------------------------------------


def test_shapes_and_sizes():
    network = PROFILES["autoencoder"].make_network()
    with torch.device("meta"):
        outline = PROFILES["autoencoder"].make_network()
        made, posterior = outline(torch.zeros(2, 1, 256, 256), torch.zeros(2, 4, 32, 32))
    assert made.shape == (2, 1, 256, 256)
    assert posterior.mean.shape == posterior.log_variance.shape == (2, 4, 32, 32)
    assert 2e6 < count_parameters(network) < 4e6
    assert count_parameters(PROFILES["latent"].make_network()) < 6e6


def test_the_gaussian_is_that_of_torch():
    drawn = generator(0)
    mean, log_variance, noise = (torch.randn((3, 4, 5, 6), generator=drawn) for _ in range(3))
    gaussian = DiagonalGaussian(mean, log_variance)
    expected = kl_divergence(Normal(mean, log_variance.exp().sqrt()), Normal(0.0, 1.0))
    assert torch.allclose(gaussian.kl(), expected.mean((1, 2, 3)), atol=1e-5)
    assert torch.allclose(gaussian.sample(noise), mean + log_variance.exp().sqrt() * noise, atol=1e-5)
    assert torch.isfinite(DiagonalGaussian(mean, 1e4 * log_variance).sample(noise)).all()


def test_latents_have_mean_0_and_deviation_1_and_mean_the_same_image(small, slices):
    images = to_unit_range(slices[:3])
    with torch.no_grad():
        small.encoder[-1].bias[:4] = torch.tensor([-3.0, 0.0, 1.0, 2.0])
        small.encoder[-1].weight[1] *= 20
        before = small.decoder(small.posterior(images).mean).clamp(-1, 1)
    small.standardise(slices)
    found = small.encode(to_unit_range(slices))
    assert found.shape == (len(slices), 4, 8, 8)
    assert torch.allclose(found.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(found.std((0, 2, 3)), torch.ones(4), atol=1e-3)
    # what is divided by on the way in is multiplied by on the way out
    assert torch.allclose(small.decode(small.encode(images)), before, atol=1e-4)
    small.standardise(slices)  # once more is as once
    assert torch.allclose(small.encode(to_unit_range(slices)), found, atol=1e-4)
    assert float(small.decode(50 * torch.randn(2, 4, 8, 8)).abs().max()) <= 1


@pytest.mark.parametrize(
    ("method", "values", "complaint"),
    [
        ("encode", torch.zeros(1, 1, 60, 64), r"shape \(1, 1, 60, 64\): give \(B, 1, H, W\), with sides"),
        ("encode", torch.zeros(1, 3, 64, 64), "give .B, 1, H, W"),
        ("encode", torch.zeros(1, 64, 64), "give .B, 1, H, W"),
        ("encode", torch.zeros(1, 1, 64, 64, dtype=torch.uint8), "images are torch.uint8: give floats"),
        ("encode", torch.full((1, 1, 64, 64), torch.nan), "images hold NaN"),
        ("decode", torch.zeros(1, 3, 8, 8), r"this autoencoder's are \(B, 4, h, w\)"),
        ("decode", torch.full((1, 4, 8, 8), torch.inf), "latents hold NaN or infinity"),
    ],
)
def test_what_is_no_image_or_latent_is_refused(small, method, values, complaint):
    with pytest.raises(ValueError, match=complaint):
        getattr(small, method)(values)


# ---- the objective --------------------------------------------------------------------------------


class _Copier(torch.nn.Module):
    """In place of an autoencoder: gives the images back, changed as it was told, and a known posterior."""

    def __init__(self, change=lambda x: x, mean=0.0):
        super().__init__()
        self.change, self.mean = change, mean

    def forward(self, images, noise):
        return self.change(images), DiagonalGaussian(
            torch.full_like(noise, self.mean), torch.zeros_like(noise)
        )


def test_the_loss_is_what_its_docstring_says(slices):
    step = SMALL.draw(slices, generator(0))
    assert torch.equal(SMALL(_Copier(), step), torch.zeros(len(slices)))  # a perfect one has nothing to learn
    pixels, kl, features = (
        replace(SMALL, **{"kl": 0.0, "features": 0.0} | own) for own in ({}, {"kl": 0.5}, {"features": 1.0})
    )
    off = _Copier(lambda x: x + 0.25)
    assert torch.allclose(pixels(off, step), torch.full((len(slices),), 0.25))
    # of N(2, 1) from N(0, 1): 2²/2
    assert torch.allclose(kl(_Copier(mean=2.0), step), torch.full((len(slices),), 0.5 * 2.0))

    def blurred(x):
        return torch.nn.functional.avg_pool2d(x, 5, 1, 2)

    def shifted(x):  # as far away in the pixels, but brightness is no anatomy
        return x + (x - blurred(x)).abs().mean((1, 2, 3), keepdim=True)

    seen = features(_Copier(blurred), step) - pixels(_Copier(blurred), step)
    assert (seen > 0).all()
    assert (seen > features(_Copier(shifted), step) - pixels(_Copier(shifted), step)).all()


def test_the_judge_does_not_learn(slices):
    network, step = SMALL.make_network(), SMALL.draw(slices[:2], generator(0))
    SMALL(network, step).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    from oasis_helpers.autoencoder import _judge

    judge = _judge(torch.device("cpu"))
    assert not judge.training
    assert all(p.grad is None and not p.requires_grad for p in judge.parameters())


def test_it_learns_by_the_loop_of_all_networks(slices):
    config = TINY.replace(steps=60, lr=4e-3, warmup=5)
    states = list(train(config, slices, device="cpu"))
    first, last = (sum(s.loss for s in part) / 5 for part in (states[:5], states[-5:]))
    assert last < 0.5 * first


def test_settings_and_images_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="image_size is 60: give a multiple of 8"):
        Autoencoding(image_size=60)
    with pytest.raises(ValueError, match="kl is -1: give 0 or more"):
        Autoencoding(kl=-1)
    with pytest.raises(ValueError, match="encoder_blocks is 1000"):
        Autoencoding(encoder_blocks=1000)
    with pytest.raises(ValueError, match=r"give uint8 \(N, 1, 64, 64\), as load_slices\(root, 64\)"):
        SMALL.draw(torch.zeros(2, 1, 32, 32, dtype=torch.uint8), generator(0))
    assert Autoencoding(**SMALL.settings()) == SMALL


# ---- files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, slices):
    """A file with a small autoencoder."""
    out = tmp_path_factory.mktemp("autoencoder") / "a.safetensors"
    list(train_to(out, TINY, slices, device="cpu", every=2))
    return out


def test_the_scale_of_the_latents_is_in_the_weights(trained, slices):
    network = load_autoencoder(trained)
    found = network.encode(to_unit_range(slices))
    assert torch.allclose(found.std((0, 2, 3)), torch.ones(4), atol=1e-3)
    assert not torch.allclose(network.scale, torch.ones(4, 1, 1), atol=0.05)
    assert network.sha256 == hashlib.sha256(trained.read_bytes()).hexdigest()
    assert not network.training


def test_a_run_that_died_after_its_last_step_gets_its_scale_too(trained, slices, tmp_path, monkeypatch):
    out = tmp_path / "w.safetensors"
    with monkeypatch.context() as patched:

        def killed(*arguments):
            raise KeyboardInterrupt

        patched.setattr(run, "save_weights", killed)
        with pytest.raises(KeyboardInterrupt):
            list(train_to(out, TINY, slices, device="cpu", every=2))
    assert list(train_to(out, TINY, slices, device="cpu", resume=True)) == []
    a, b = load_autoencoder(trained).state_dict(), load_autoencoder(out).state_dict()
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    assert read_header(out).training == read_header(trained).training


def test_other_files_are_refused(tmp_path, trained, slices):
    for path, kind in ((WEIGHTS, "denoiser"), (SEGMENTER, "segmenter")):
        with pytest.raises(ValueError, match=f"is of kind '{kind}', not an autoencoder"):
            load_autoencoder(path)
    with pytest.raises(FileNotFoundError):
        load_autoencoder(tmp_path / "none.safetensors")
    state = next(train(TINY, slices, device="cpu"))
    training.save_checkpoint(tmp_path / "c.safetensors", state)
    with pytest.raises(ValueError, match="is a checkpoint"):
        load_autoencoder(tmp_path / "c.safetensors")
    training.save(tmp_path / "odd.safetensors", {}, Autoencoding.kind, {"wings": 2})
    with pytest.raises(ValueError, match="settings that this version cannot use"):
        load_autoencoder(tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="is of kind 'autoencoder', not a denoiser"):
        training.load_weights(trained)


# ---- among the latents -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latents(phantoms, trained):
    return load_latents(phantoms, load_autoencoder(trained), 64)


def test_latents_are_the_means_with_what_is_true(latents, phantoms, trained, slices):
    network = load_autoencoder(trained)
    assert len(latents) == len(slices)
    rows = torch.tensor([5, 0])
    some, known = latents[rows]
    assert torch.allclose(some, network.encode(to_unit_range(slices[rows])), atol=1e-5)
    assert known[:, 0].tolist() == [2, 1]  # heights of the second slice of a head and of the first
    other = load_autoencoder(trained)
    other.sha256 = "another"
    assert load_latents(phantoms, other, 64).fingerprint != latents.fingerprint
    with pytest.raises(ValueError, match=r"no phantoms\.csv: prompts are made of the causes of phantoms"):
        load_latents(DataLocation(phantoms.root, "oasis"), network, 64)


def test_each_step_has_new_phrases_from_its_seed_alone(latents):
    objective = TINY_LATENT.objective
    a, again, b = (
        draw_step(TINY_LATENT, latents, objective, n) for n in (0, 0, 2)
    )  # 8 slices: 2 are an epoch
    assert a["images"].shape == (4, 4, 8, 8)
    assert a["y"]["prompt"].shape == (4, LENGTH)
    assert torch.equal(a["y"]["prompt"], again["y"]["prompt"])
    assert not torch.equal(a["y"]["prompt"], b["y"]["prompt"])
    everything = Latents(torch.zeros(400, 4, 8, 8), latents.known[:1].expand(400, 6), "400")
    prompts = draw_step(TINY_LATENT.replace(batch_size=400), everything, objective, 0)["y"]["prompt"]
    dropped = prompts.eq(-1).all(1).float().mean()
    assert 0.05 < dropped < 0.16  # a tenth


def _truths(count):
    """Rows as of ``truths``: anything from the lowest to the highest word of each slot."""
    starts = [[low for low, _ in slot.words.values()] for slot in SLOTS]
    low, high = (torch.tensor([end(of) for of in starts]) for end in (min, max))
    drawn = torch.rand(count, len(SLOTS), generator=torch.Generator().manual_seed(0))
    return low + 1.3 * (high - low) * drawn


def _alike(reader):
    """The cosine of what "thin" of the scalp and what "thin" of the skull changes in the vectors."""
    texts = ["thick scalp, thick skull", "thin scalp, thick skull", "thick scalp, thin skull"]
    with torch.no_grad():
        neither, scalp, skull = reader(tokenize(texts)).mean(1)
    return float(torch.cosine_similarity(scalp - neither, skull - neither, dim=0))


def test_reading_is_learned_and_its_draws_are_of_the_seed():
    torch.manual_seed(0)
    reader = Tokens(len(VOCABULARY), LENGTH).embedding(96)
    assert reader.places.std() > 0.9, "as large as words"
    known, texts = _truths(500), ["thin scalp", "slice, thick scalp", "thin skull"]
    known[:, :4] = torch.nan
    fresh = deepcopy(reader)
    told = teach_reading(reader, known, 250)(texts)
    assert told.shape == (3, 6)
    assert told[1, 4] > told[0, 4] + 0.5  # mm
    once, again = (teach_reading(deepcopy(fresh), known, 3)(texts) for _ in range(2))
    assert torch.equal(once[:, 4:], again[:, 4:])
    one, two = (teach_reading(deepcopy(fresh), known, 1, seed=seed)(texts) for seed in (1, 2))
    assert not torch.equal(one[:, 4:], two[:, 4:])


def test_the_weights_that_ship_know_whose_word_it_is():
    denoise, _ = load_stable_diffusion()
    assert _alike(denoise.network.conditions["prompt"]) < 0.5


def test_what_nobody_knows_is_no_lesson():
    torch.manual_seed(0)
    reader = Tokens(len(VOCABULARY), LENGTH).embedding(32)
    known = _truths(50)
    known[:, 3] = torch.nan
    found = teach_reading(reader, known, 3)(["thin scalp"])[0]
    assert found.isnan().tolist() == [False] * 3 + [True] + [False] * 2
    assert all(p.isfinite().all() for p in reader.parameters())
    with pytest.raises(ValueError, match="reading_steps is -1: give 0 or more"):
        TINY_LATENT.replace(reading_steps=-1)


def test_only_a_fresh_network_learns_to_read_first(latents, monkeypatch, tmp_path):
    begun = []
    monkeypatch.setattr(LatentDenoising, "begin", lambda self, network, data, seed: begun.append(seed))
    config = TINY_LATENT.replace(seed=3)
    states = train_to(tmp_path / "l.safetensors", config, latents, device="cpu", every=1)
    next(states), states.close()
    assert begun == [3]
    list(train_to(tmp_path / "l.safetensors", config, latents, device="cpu", resume=True))
    list(train(config, latents, model=config.make_network(), device="cpu"))
    assert begun == [3]


def test_a_latent_model_names_its_autoencoder(latents, trained, tmp_path):
    sha = load_autoencoder(trained).sha256
    config, out = TINY_LATENT.replace(autoencoder=sha), tmp_path / "l.safetensors"
    list(train_to(out, config, latents, device="cpu", every=2))
    denoise, autoencoder = load_stable_diffusion(out, trained)
    assert denoise.shape == (4, 8, 8)
    found = denoise(torch.randn(2, 4, 8, 8), 20, {"prompt": tokenize(["thin scalp", "thick scalp"])})
    assert autoencoder.decode(found).shape == (2, 1, 64, 64)
    header = read_header(out)
    assert header.settings["autoencoder"] == sha
    assert tuple(header.settings["words"]) == VOCABULARY
    save_weights(tmp_path / "other.safetensors", TINY.make_network(), TINY)
    with pytest.raises(ValueError, match=rf"SHA-256 {sha[:16]}….*give the autoencoder that belongs to it"):
        load_stable_diffusion(out, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is of kind 'denoiser', not a denoiser of latents"):
        load_stable_diffusion(WEIGHTS, trained)
    settings = header.settings | {"words": ["other", "words"]}
    training.save(tmp_path / "w.safetensors", training.read_tensors(out)[0], header.kind, settings)
    with pytest.raises(ValueError, match="other words than this version's grammar"):
        load_stable_diffusion(tmp_path / "w.safetensors", trained)


def test_a_run_does_not_go_on_with_another_autoencoder(latents, tmp_path):
    out, first = tmp_path / "l.safetensors", TINY_LATENT.replace(autoencoder="one")
    states = train_to(out, first, latents, device="cpu", every=1)
    next(states), next(states)
    states.close()
    with pytest.raises(ValueError, match="autoencoder one ≠ two"):
        next(train_to(out, first.replace(autoencoder="two"), latents, device="cpu", resume=True))
    assert len(list(train_to(out, first, latents, device="cpu", resume=True))) >= 1


def test_the_file_that_ships_has_its_name():
    assert AUTOENCODER.parent == WEIGHTS.parent
    assert isinstance(PROFILES["autoencoder"].make_network(), Autoencoder)


def test_the_latent_model_under_the_schedulers_of_diffusers_makes_our_samples():
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

    denoise, _ = load_stable_diffusion()
    start = torch.randn((1, *denoise.shape), generator=torch.Generator().manual_seed(0))
    y, steps = {"prompt": tokenize("marked atrophy, lateral ventricles")}, 4
    how = {
        "trained_betas": denoise.schedule.betas.numpy(),
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    zero = {"final_sigmas_type": "zero"}
    schedulers = {
        DDIMScheduler(**how, clip_sample=False): "ddim",
        DPMSolverMultistepScheduler(**how, **zero): "dpm_solver",
        # UniPC's predictor of first order is a step of DDIM: Zhao et al. 2023, section 3.4
        UniPCMultistepScheduler(**how, **zero, solver_order=1, disable_corrector=list(range(steps))): "ddim",
    }
    for scheduler, method in schedulers.items():
        scheduler.set_timesteps(steps)
        x = start.clone()
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(denoise.network(x, t.expand(1), y), t, x).prev_sample
        ours = sample_images(denoise, 1, method=method, steps=steps, start=(start, 999), y=y)
        assert torch.allclose(x, ours, atol=1e-4), type(scheduler).__name__
