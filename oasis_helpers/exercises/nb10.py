"""Exercises of notebook 10: eight runs with one fault each, to be named from what they show.

A run is computed when somebody first asks for it and kept. Four of them use weights that ship with a
faulty sampler; the others use small networks for 32×32 pixels, each trained here in seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from .. import plots, unet
from ..autoencoder import load_stable_diffusion
from ..data import Slices, read_slices, to_unit_range
from ..diffusion import Denoiser, NoiseSchedule, diffusion_loss
from ..intake.phantoms import make_phantoms, phantom_cache
from ..prompts import tokenize
from ..sampling import clipped, ddim_step, guided, spaced_timesteps
from ..training import EMA, load_weights
from . import Exercise, Wrong

LETTERS = "ABCDEFGH"

FAULTS = {
    "wrong range": "the training images lie in [0, 1] instead of [−1, 1]",
    "alpha off by one": "a step takes ᾱ of its wrong end, so the t that the network is told does not fit the image",
    "no time embedding": "t never reaches the network",
    "noise in the last step": "the sampler adds fresh noise after the last estimate",
    "no average of the weights": "samples come from the raw weights of a training at a high rate",
    "leakage": "slices of one head are in the training set and in the validation set",
    "clipped latents": "latents are cut at ±1 as if they were pixels",
    "another schedule": "sampling follows another noise schedule than training did",
    "v taken for noise": "the network puts out v and the sampler reads it as noise",
    "root forgotten": "x_t is mixed with ᾱ and 1 − ᾱ instead of their square roots",
    "too few steps": "the sampler takes too few and too long steps",
    "diverged": "the learning rate was so high that training fell apart",
}
PLANTED = dict(zip(LETTERS, (
    "another schedule", "no time embedding", "noise in the last step", "wrong range",
    "clipped latents", "leakage", "alpha off by one", "no average of the weights",
)))  # fmt: skip

CALLS, COUNT = 20, 3  # of the network for a sample, and samples of a run
TRAINING, BETWEEN = 250, 20  # steps, and steps between two looks
TIMES = (20, 100, 300, 500, 700, 900, 980)


@dataclass(frozen=True)
class Run:
    """What is left of a training and of the samples made after it.

    ``training`` and ``validation``: (N, C, H, W) as the network got them, of the heads ``training_heads`` and
    ``validation_heads``; ``losses`` of its training, (steps,), or None where the weights are those that ship.
    ``samples``: (3, 1, H, W); ``last_estimates``: x̂_0 of the sampler's last step, ``earlier`` the samples of
    the weights of 20 training steps before, where there were any. ``path``: for each step of the sampler its
    t and the standard deviation of the noise (x_t − s x̂_0)/n that the estimate leaves, which should be 1.
    """

    denoise: Denoiser
    training: Tensor
    validation: Tensor
    training_heads: frozenset[int]
    validation_heads: frozenset[int]
    losses: Tensor | None
    samples: Tensor
    last_estimates: Tensor
    path: Sequence[tuple[int, float]]
    earlier: Tensor | None = None
    y: dict[str, Tensor] | None = field(default=None, repr=False)

    @torch.no_grad()
    def network(self, x_t: Tensor, t: int) -> Tensor:
        """What the network itself puts out, v, (B, C, H, W), if it is told ``t``."""
        y = (
            None
            if self.y is None
            else {name: value[:1].expand(len(x_t), -1) for name, value in self.y.items()}
        )
        return self.denoise.network(x_t, torch.full((len(x_t),), t), y)

    @torch.no_grad()
    def loss(self, images: Tensor, t: int) -> float:
        """Mean squared error of v on noised ``images`` at one timestep."""
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(t))
        times = torch.full((len(images),), t)
        network = lambda x, _, y: self.network(x, t)  # noqa: E731
        return float(
            diffusion_loss(network, self.denoise.schedule, images, times, noise, "v_prediction").mean()
        )

    def told(self, first: int = 300, second: int = 700) -> float:
        """Root mean square of what another t changes in the network's answer to one x_t."""
        noise = torch.randn(self.validation.shape, generator=torch.Generator().manual_seed(0))
        x_t = self.denoise.schedule.q_sample(self.validation, 500, noise)
        return _rms(self.network(x_t, first) - self.network(x_t, second))


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _roughness(x: Tensor) -> float:
    return float(x.diff(dim=-1).abs().mean())


# ---- data and training --------------------------------------------------------------------------


@cache
def _slices() -> tuple[Slices, Slices]:
    location = make_phantoms(phantom_cache())
    return read_slices(location.train, 64, cases=3), read_slices(location.test, 64, cases=2)


def _small(images: Tensor) -> Tensor:
    return F.avg_pool2d(to_unit_range(images), 2)


class _Untold(unet.UNet):
    def forward(self, x, t, y=None):
        return super().forward(x, torch.zeros_like(t), y)


@dataclass(frozen=True)
class _Trained:
    raw: nn.Module
    average: nn.Module
    earlier_raw: nn.Module
    earlier_average: nn.Module
    losses: Tensor


@cache
def _trained(kind: type[unet.UNet] = unet.UNet, low: float = -1.0, lr: float = 6e-3, decay: bool = True):
    """A small network after 250 steps on half the slices of three heads, whose darkest pixels are ``low``."""
    images, schedule = _small(_slices()[0].images[::2]), NoiseSchedule.cosine(1000)
    images = images if low == -1 else (images + 1) / 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = kind(base_channels=16, channel_mult=(1, 2), attention_levels=())
    average, generator, losses = EMA(network, 0.98), torch.Generator().manual_seed(0), []
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    for step in range(TRAINING):
        if step == TRAINING - BETWEEN:
            before = copy.deepcopy(network), copy.deepcopy(average.model)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / TRAINING) if decay else lr
        x0 = images[torch.randint(len(images), (8,), generator=generator)]
        t = torch.randint(1000, (8,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        loss = diffusion_loss(network, schedule, x0, t, noise, "v_prediction").mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(network)
        losses.append(loss.item())
    return _Trained(network.eval(), average.model, *(net.eval() for net in before), torch.tensor(losses))


# ---- sampling, rightly and not ------------------------------------------------------------------


@torch.no_grad()
def _sampled(denoise, *, told_late: bool = False, noise_at_the_end: bool = False, eta: float = 0.0, y=None):
    """Samples, the last estimates and the path of a run with :data:`CALLS` calls of the denoiser."""
    schedule, drawn = denoise.schedule, torch.Generator().manual_seed(3)
    x, path = torch.randn((COUNT, *denoise.shape), generator=drawn), []
    timesteps = spaced_timesteps(schedule.T, CALLS)
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1]):
        x0 = denoise(x, max(t_prev, 0) if told_late else t, y)
        s, n = schedule.levels(t)
        path.append((t, float(((x - s * x0) / n).std())))
        noise = torch.randn(x.shape, generator=drawn)
        x = ddim_step(schedule, x0, t, t_prev, x, eta=eta, noise=noise)
        if t_prev < 0 and noise_at_the_end:
            x = x + n * noise
    return x, x0, path


def _with_weights(denoise: Denoiser, **how) -> Run:
    learned, unseen = _slices()
    sets = [to_unit_range(part.images[::8]) for part in (learned, unseen)]
    heads = [frozenset(part.case.tolist()) for part in (learned, unseen)]
    return Run(denoise, *sets, *heads, None, *_sampled(denoise, **how))


def _small_run(of: _Trained, *, raw: bool = False, low: float = -1.0, leak: bool = False) -> Run:
    learned, unseen = _slices()
    kept = learned if leak else unseen
    sets = [_small(images) for images in (learned.images[::2], kept.images[1::2])]
    if low != -1:
        sets = [(images + 1) / 2 for images in sets]
    heads = [frozenset(part.case.tolist()) for part in (learned, kept)]
    networks = (of.raw, of.earlier_raw) if raw else (of.average, of.earlier_average)
    now, before = (Denoiser(net, NoiseSchedule.cosine(1000), "v_prediction", (1, 32, 32)) for net in networks)
    return Run(now, *sets, *heads, of.losses, *_sampled(now), earlier=_sampled(before)[0])


@cache
def _latent_run(cut: bool) -> Run:
    denoise, autoencoder = load_stable_diffusion()
    location = make_phantoms(phantom_cache())
    y = {"prompt": tokenize(["lateral ventricles"] * COUNT)}
    sets, heads = [], []
    for folder in (location.train, location.test):
        part = read_slices(folder, 256, cases=1)
        with torch.no_grad():
            sets.append(autoencoder.encode(to_unit_range(part.images[::8])))
        heads.append(frozenset(part.case.tolist()))
    asked = guided(denoise, 2)
    latents, estimates, path = _sampled(clipped(asked) if cut else asked, y=y)
    with torch.no_grad():
        samples, estimates = autoencoder.decode(latents), autoencoder.decode(estimates)
    return Run(denoise, *sets, *heads, None, samples, estimates, path, y=y)


def _another_schedule() -> Run:
    right = load_weights()
    betas = NoiseSchedule.linear(1000).betas
    return _with_weights(Denoiser(right.network, NoiseSchedule(betas), right.prediction, right.shape))


_FAULTY: dict[str, Callable[[], Run]] = {
    "A": _another_schedule,
    "B": lambda: _small_run(_trained(kind=_Untold)),
    "C": lambda: _with_weights(load_weights(), eta=1.0, noise_at_the_end=True),
    "D": lambda: _small_run(_trained(low=0.0), low=0.0),
    "E": lambda: _latent_run(True),
    "F": lambda: _small_run(_trained(), leak=True),
    "G": lambda: _with_weights(load_weights(), told_late=True),
    "H": lambda: _small_run(_trained(lr=1.2e-2, decay=False), raw=True),
}
_REPAIRED: dict[str, Callable[[], Run]] = {
    "A": lambda: _with_weights(load_weights()),
    "B": lambda: _small_run(_trained()),
    "C": lambda: _with_weights(load_weights(), eta=1.0),
    "D": lambda: _small_run(_trained()),
    "E": lambda: _latent_run(False),
    "F": lambda: _small_run(_trained()),
    "G": lambda: _with_weights(load_weights()),
    "H": lambda: _small_run(_trained(lr=1.2e-2, decay=False)),
}


@cache
def run(letter: str) -> Run:
    """The run with this letter, A to H, or "sound" for one without a fault. ValueError for another."""
    if letter == "sound":
        return _REPAIRED["B"]()
    if letter not in _FAULTY:
        raise ValueError(f"there is no run {letter!r}: there are {', '.join(LETTERS)} and 'sound'.")
    return _FAULTY[letter]()


@cache
def _repaired(letter: str) -> Run:
    return _REPAIRED[letter]()


# ---- what is shown of a run ---------------------------------------------------------------------

_NUMBERS: dict[str, Callable[[Run], dict[str, float]]] = {
    "A": lambda r: {
        "mean of the samples": float(r.samples.mean()),
        "noise left before the last step": r.path[-1][1],
    },
    "B": lambda r: {f"loss at t = {t}": r.loss(r.validation, t) for t in (500, 980)},
    "C": lambda r: {
        "roughness of the samples": _roughness(r.samples),
        "roughness of the last estimates": _roughness(r.last_estimates),
    },
    "D": lambda r: {
        "a dark pixel of the samples (quantile 0.02)": float(r.samples.quantile(0.02)),
        "first loss": float(r.losses[0]),
    },
    "E": lambda r: {
        "a bright pixel of the samples (quantile 0.99)": float(r.samples.quantile(0.99)),
        "noise left before the last step": r.path[-1][1],
    },
    "F": lambda r: {
        f"validation loss over training loss at t = {t}": r.loss(r.validation, t) / r.loss(r.training, t)
        for t in (300, 700)
    },
    "G": lambda r: {
        "roughness of the samples": _roughness(r.samples),
        "roughness of the last estimates": _roughness(r.last_estimates),
    },
    "H": lambda r: {
        # to tenths, and no mean: how far it jumps is another number in every run
        f"share of the samples' pixels that {BETWEEN} training steps changed by more than 0.02": round(
            float(((r.samples - r.earlier).abs() > 0.02).double().mean()), 1
        ),
        "loss at t = 500": r.loss(r.validation, 500),
    },
}  # fmt: skip


@cache
def numbers(letter: str) -> dict[str, tuple[float, float]]:
    """Two numbers, each as measured on the run with this letter and on a sound one."""
    ill, sound = (_NUMBERS[letter](one) for one in (run(letter), _repaired(letter)))
    return {name: (value, sound[name]) for name, value in ill.items()}


def _rows(letter: str, one: Run) -> list[Tensor]:
    """Samples; of F validation slices and the training slices most like them, of H samples of two moments."""
    if letter == "F":
        slices = one.validation[[5, 10, 24]]
        nearest = torch.cdist(slices.flatten(1), one.training.flatten(1)).argmin(1)
        return [slices, one.training[nearest]]
    return [one.earlier, one.samples] if letter == "H" else [one.samples]


def picture(letter: str) -> Figure:
    """The run, and on the right a sound one: samples, or what else shows that something is wrong."""
    return _beside(letter, "a sound run")


def _beside(letter: str, other: str) -> Figure:
    """Pictures of the run on the left, and on the right, under the name ``other``, without its fault."""
    names = {"F": ["validation slice", "most like it"], "H": ["20 steps before", "at the end"]}
    pictures, titles = [], []
    for number, name in enumerate(names.get(letter, [""])):
        for said, one in ((f"run {letter}", run(letter)), (other, _repaired(letter))):
            row = _rows(letter, one)[number]
            pictures += [*row]
            titles += [f"{said}:\n{name}" if name else said] * len(row)
    window = plots.WHOLE if letter == "D" else plots.BRAIN  # what is wrong with D is brighter than a brain
    return plots.grid(pictures, 2 * COUNT, titles, 1.5, "synthetic – not for diagnosis", window=window)


def curve(letter: str) -> Figure:
    """One curve of the run, beside that of a sound one where there is one."""
    one, sound = run(letter), _repaired(letter)
    if letter in "BF":
        sets = {"B": {"run B": (one, one.validation), "a sound run": (sound, one.validation)},
                "F": {"training": (one, one.training), "validation": (one, one.validation)}}[letter]  # fmt: skip
        curves = {name: (TIMES, [r.loss(images, t) for t in TIMES]) for name, (r, images) in sets.items()}
        return plots.lines(curves, "timestep t", "loss of v", logy=True, size=(6.2, 2.8))
    if letter in "DH":
        other = run("sound")
        means = {f"run {letter}": one.losses, "a sound run": other.losses}
        curves = {k: (range(5, TRAINING + 1, 5), v.reshape(-1, 5).mean(1)) for k, v in means.items()}
        figure = plots.lines(curves, "step (means of 5)", "training loss", logy=True, size=(6.2, 2.8))
        figure.axes[0].set_ylim(0.03, 1)  # the same axis wherever a run ends
        return figure
    curves = {name: tuple(zip(*r.path)) for name, r in ((f"run {letter}", one), ("a sound run", sound))}
    return plots.lines(curves, "timestep t (sampling runs to the left)", "noise left", size=(6.2, 2.8))


# ---- diagnoses ----------------------------------------------------------------------------------

_SAID = {
    "A": "the network was trained with ᾱ of the cosine schedule and is asked at ᾱ of another: told t, it finds "
    "another amount of noise than it learned to expect there",
    "B": "the network gives one answer whatever t it is told, and has to guess the noise from the picture, worst "
    "where nearly all is noise",
    "C": "the last estimates are smooth and the samples are not: noise came after the last estimate",
    "D": "black is 0 for this network, so its images have half the spread and a grey background",
    "E": "a third of all latents lie outside of ±1, and the strongest of them draw the bright rim of the head",
    "F": "validation slices lie between training slices of the same heads, so learning heads by heart looks like skill",
    "G": "the network is told a t that comes later on the way, expects less noise than there is and leaves the rest",
    "H": "at this rate the weights jump about after every batch, and the sample follows; their average stays",
}

# What speaks against a fault that is not the planted one, with what was measured on the run.
_AGAINST = {
    "wrong range": "with the wrong range the darkest training pixel would be 0; here it is {darkest:.1f}",
    "alpha off by one": "an off-by-one leaves more grain in the last estimates than a sound run has; here their "
    "roughness is {rough:.2f} where a sound run has {rough_sound:.2f}",
    "no time embedding": "without t the answer would not change with the t that is told; here it changes by {told:.2f}",
    "noise in the last step": "noise in the last step would lie between last estimates and samples; here they differ by "
    "{last:.3f}",
    "no average of the weights": "raw weights of a high rate draw something else after every few steps; {steady}",
    "leakage": "leakage changes a score and no sample, and needs a head on both sides; here {common} heads are on both",
    "clipped latents": "what is diffused here has {channels} channel and no decoder: there are no latents to clip",
    "another schedule": "with another schedule much less noise would be left before the last step than in a sound run; "
    "here it is {end:.2f} where a sound run has {end_sound:.2f}",
    "v taken for noise": "v taken for noise would spoil the first estimate already and end in no head at all; here "
    "heads come out",
    "root forgotten": "without the roots x_t has too little variance in the middle of the way, and the noise left would "
    "show it; here it is {middle:.2f} there",
    "too few steps": f"{CALLS} calls are enough: the sound run takes as many and lacks the symptom",
    "diverged": "a training that fell apart ends at a loss of 1 or above, and gives no heads; this one gives heads",
}
_ESPECIALLY = {
    ("A", "alpha off by one"): "an off-by-one leaves grain; these samples are smooth, too bright and bulge",
    ("A", "root forgotten"): "the network is the one that ships, trained with the right mix; look at ᾱ of the sampler",
    ("C", "alpha off by one"): "an off-by-one would leave grain in the estimates as well; these last estimates are "
    "smooth, and only the samples are rough",
    ("E", "wrong range"): "the background of these samples is black as it should be; only what is bright is missing",
    ("G", "another schedule"): "another schedule changes brightness and shape; these heads have their shape and are grainy",
    ("G", "root forgotten"): "the network is the one that ships, trained with the right mix; ask what it is told",
    ("D", "clipped latents"): "these are pixels, there are no latents; look at the darkest value of the training images",
    ("H", "diverged"): "the loss has fallen far below 1: the training works, and its last step is a matter of chance",
    ("H", "alpha off by one"): "the sampler was the same at both moments, and what it drew was not",
    ("H", "another schedule"): "the sampler was the same at both moments, and what it drew was not",
    ("F", "no average of the weights"): "the samples of a moment earlier in training look the same; it is the "
    "validation loss that is too good",
}  # fmt: skip


@cache
def _measured(letter: str) -> dict[str, float | str]:
    one, sound = run(letter), _repaired(letter)
    steady = "these weights are the average that ships, and sample well elsewhere"
    if one.earlier is not None:
        steady = f"here samples of {BETWEEN} steps before differ by no more than {_rms(one.samples - one.earlier):.2f}"
    return {
        "darkest": float(one.training.min()),
        "rough": _roughness(one.last_estimates),
        "rough_sound": _roughness(sound.last_estimates),
        "middle": one.path[CALLS // 2][1],
        "end": one.path[-1][1],
        "end_sound": sound.path[-1][1],
        "told": one.told(),
        "last": _rms(one.samples - one.last_estimates),
        "common": len(one.training_heads & one.validation_heads),
        "channels": one.training.shape[1],
        "steady": steady,
    }


def _diagnosis(letter: str) -> Callable[[Callable[[], str]], str]:
    def diagnose(fault_of) -> str:
        named = fault_of()
        if named not in FAULTS:
            raise Wrong(f"{named!r} is not on the list: {', '.join(FAULTS)}.")
        if named != PLANTED[letter]:
            said = _ESPECIALLY.get((letter, named)) or _AGAINST[named].format(**_measured(letter))
            raise Wrong(f"{named} does not fit: {said}.")
        gone = "; ".join(f"{name} {ill:.2f} → {sound:.2f}" for name, (ill, sound) in numbers(letter).items())
        return f"{named}: {_SAID[letter]}. Repaired: {gone}."

    return diagnose


def fault_of_a():
    return "another schedule"


def fault_of_b():
    return "no time embedding"


def fault_of_c():
    return "noise in the last step"


def fault_of_d():
    return "wrong range"


def fault_of_e():
    return "clipped latents"


def fault_of_f():
    return "leakage"


def fault_of_g():
    return "alpha off by one"


def fault_of_h():
    return "no average of the weights"


def _named(name: str) -> Callable[[], str]:
    return lambda: name


def _exercise(letter: str, solution: Callable, hints: Sequence[str], wrong: dict[str, str]) -> Exercise:
    number = LETTERS.index(letter) + 1
    answers = tuple(((_named(name),), message) for name, message in wrong.items())
    hints = "Which of the five looks shows it first? Take them in their order.", *hints  # it is shown unasked
    return Exercise(
        f"10.{number}", f"Run {letter}", "diagnosis", 6, hints, _diagnosis(letter), solution, answers,
        picture=lambda fault_of: _beside(letter, "repaired"),
    )  # fmt: skip


EXERCISES = (
    _exercise("A", fault_of_a, (
        "The heads are smooth but too bright and misshapen. On the way the noise left is not 1: who decides how much "
        "there should be?",
        "Print `run(\"A\").denoise.schedule.alphas_cumprod[500]`, and the same for the sound run.",
    ), {"alpha off by one": "an off-by-one leaves grain", "root forgotten": "look at ᾱ of the sampler"}),
    _exercise("B", fault_of_b, (
        "Nothing is wrong with the samples at first sight. Ask the network itself.",
        "Give one x_t to `run(\"B\").network` with two different t, or call `run(\"B\").told()`.",
    ), {"wrong range": "the darkest training pixel would be 0", "leakage": "0 heads are on both"}),
    _exercise("C", fault_of_c, (
        "Grain has two sources: the estimates, or what is added to them. Compare both numbers.",
        "Show `run(\"C\").last_estimates` beside `run(\"C\").samples`.",
    ), {"alpha off by one": "these last estimates are smooth", "too few steps": "20 calls are enough"}),
    _exercise("D", fault_of_d, (
        "Look at the data first, as the network gets it.",
        "`run(\"D\").training.min()` and `.max()`: what should they be?",
    ), {"clipped latents": "there are no latents", "no time embedding": "here it changes by"}),
    _exercise("E", fault_of_e, (
        "The background is black as it should be, and the brightest parts are missing. What has a limit?",
        "`run(\"E\").training.abs().max()` has values that no pixel has. What would a limit of 1 do to them?",
    ), {"wrong range": "the background of these samples is black", "no time embedding": "here it changes by"}),
    _exercise("F", fault_of_f, (
        "A score that is too good is a symptom. Who are the heads that it was measured on?",
        "Take `run(\"F\").training_heads & run(\"F\").validation_heads`.",
    ), {"no average of the weights": "it is the validation loss that is too good",
        "noise in the last step": "here they differ by 0.000"}),
    _exercise("G", fault_of_g, (
        "The last estimates are as rough as the samples, so the network itself leaves grain. The weights are sound.",
        "A network that is told too small a t expects less noise than there is (exercise 3.3). Which t does a step "
        "have to choose from?",
    ), {"noise in the last step": "between last estimates and samples",
        "another schedule": "these heads have their shape and are grainy"}),
    _exercise("H", fault_of_h, (
        "Both rows come from the same noise. What has changed between them?",
        "The rate is high to the end, and each batch moves the weights far. What is used for samples instead of the "
        "last weights?",
    ), {"diverged": "its last step is a matter of chance", "leakage": "0 heads are on both"}),
)  # fmt: skip
