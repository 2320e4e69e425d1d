"""Exercises of notebook 4: a weight, the loss itself, how much a batch scatters, and settings of one's own."""

from __future__ import annotations

from functools import cache

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import plots
from ..data import load_slices, to_unit_range
from ..diffusion import NoiseSchedule
from ..intake.phantoms import make_phantoms, phantom_cache
from ..training import TrainConfig, load_weights, train, validation_loss
from . import Exercise, Wrong, compare

# ---- 4.1 ----------------------------------------------------------------------------------------


def weight_of_v(snr):
    return (snr + 1).clamp(max=5) / (snr + 1)


def _without_offset(snr):
    return snr.clamp(max=5) / (snr + 1)


def _of_the_image(snr):
    return (snr + 1).clamp(max=5)


def _clamped_below(snr):
    return (snr + 1).clamp(min=5) / (snr + 1)


def _diagnose_weight(weight_of_v) -> str:
    snr = NoiseSchedule.cosine(1000).snr()[[20, 300, 700, 999]]
    mistakes = {
        "the weight at t = 999 is 0: that is min-SNR without the offset. A sampler starts there; count 1 more than the "
        "SNR before you cap it.": _without_offset(snr),
        "that is the weight of a squared error of the image. The squared error of v is 1 + SNR times as large: "
        "divide by that.": _of_the_image(snr),
        "at t = 20 the weight is 1, and nothing is capped there. The cap is the most that SNR + 1 may be, "
        "`clamp(max=…)`.": _clamped_below(snr),
    }
    compare(weight_of_v(snr), snr.add(1).clamp(max=5) / (snr + 1), "the weight", mistakes)
    return "1 under much noise, where sampling starts, and less than a hundredth for grain that nobody sees."


# ---- 4.2 ----------------------------------------------------------------------------------------


def loss_of_v(network, schedule, x0, t, noise):
    x_t = schedule.q_sample(x0, t, noise)
    v = schedule.target(x0, noise, t, "v_prediction")
    return (network(x_t, t) - v).square().flatten(1).mean(1)


def _of_noise(network, schedule, x0, t, noise):
    return (network(schedule.q_sample(x0, t, noise), t) - noise).square().flatten(1).mean(1)


def _clean_input(network, schedule, x0, t, noise):
    v = schedule.target(x0, noise, t, "v_prediction")
    return (network(x0, t) - v).square().flatten(1).mean(1)


def _summed(network, schedule, x0, t, noise):
    return loss_of_v(network, schedule, x0, t, noise) * x0[0].numel()


def _one_number(network, schedule, x0, t, noise):
    return loss_of_v(network, schedule, x0, t, noise).mean()


def _half(x, t, y=None):
    """A network that answers half of what it sees, and tells t in its first pixel."""
    answer = 0.5 * x
    answer[:, :, 0, 0] += t[:, None] / 1000
    return answer


def _diagnose_loss(loss_of_v) -> str:
    schedule, drawn = NoiseSchedule.cosine(1000), torch.Generator().manual_seed(4)
    x0, noise = torch.randn((2, 4, 1, 8, 8), generator=drawn).unbind()
    given = (_half, schedule, x0, torch.tensor([20, 300, 700, 980]), noise)
    mistakes = {
        "your network is asked for the noise. This one predicts v, `schedule.target(x0, noise, t, "
        '"v_prediction")`.': _of_noise(*given),
        "your network sees the clean images. Noise them first: `schedule.q_sample(x0, t, noise)`.": _clean_input(
            *given
        ),
        "64 times too large: a sum over the 8×8 pixels, where a mean is wanted.": _summed(*given),
    }
    found = loss_of_v(*given)
    if torch.as_tensor(found).ndim == 0:
        raise Wrong("one number for the whole batch. Average over the pixels only, `.flatten(1).mean(1)`.")
    compare(found, _right_loss(*given), "the loss of each image", mistakes)
    return "with one loss for each image, they can be sorted by t, or weighted."


def _right_loss(network, schedule, x0, t, noise) -> Tensor:
    v = schedule.target(x0, noise, t, "v_prediction")
    return (network(schedule.q_sample(x0, t, noise), t) - v).square().mean((1, 2, 3))


@torch.no_grad()
def _loss_by_t(loss_of_v) -> Figure:
    denoise = load_weights()
    x0 = to_unit_range(load_slices(make_phantoms(phantom_cache()).validate, 64, cases=1)[4::8])
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    times = [*range(50, 1000, 100)]
    found = [
        loss_of_v(denoise.network, denoise.schedule, x0, torch.full((len(x0),), t), noise).mean()
        for t in times
    ]
    curves = {"the network that ships": (times, torch.stack(found))}
    return plots.lines(curves, "t", "loss of v on four slices", logy=True)


# ---- 4.3 ----------------------------------------------------------------------------------------

SMALL_BATCH, FACTOR = 4, 4


def scatter(losses, batch):
    return losses.reshape(-1, batch).mean(1).std()


def _single(losses, batch):
    return losses.std()


def _variance(losses, batch):
    return losses.reshape(-1, batch).mean(1).var()


def _inside(losses, batch):
    return losses.reshape(-1, batch).std(1).mean()


def _diagnose_scatter(prediction, scatter) -> str:
    losses, batches = single_losses(), (SMALL_BATCH, FACTOR * SMALL_BATCH)
    found = [torch.as_tensor(scatter(losses, batch)).double() for batch in batches]
    mistakes = {
        "the scatter is the same for every size of batch, because you never make batches. Put the losses into rows, "
        "`losses.reshape(-1, batch)`, and take the mean of each.": _single,
        "that is the variance, which falls to a quarter. Its root, the standard deviation, is in the units of the "
        "loss.": _variance,
        "that is how much slices scatter *inside* a batch. Take the mean of each batch first, and then the "
        "scatter of the means.": _inside,
    }
    compare(
        torch.stack(found),
        [losses.reshape(-1, batch).mean(1).std() for batch in batches],
        f"the scatter of batches of {batches[0]} and {batches[1]}",
        {said: torch.stack([wrong(losses, batch) for batch in batches]) for said, wrong in mistakes.items()},
    )
    said = "As you said" if prediction == "a half" else f"You said {prediction!r}, but"
    ratio = float(found[1] / found[0])
    return (
        f"{said}: four times as many slices leave {ratio:.1f} of the scatter, about the root of a quarter. For twice "
        "the precision a step does four times the work."
    )


@cache
def single_losses() -> Tensor:
    """The losses of 768 noised slices by a network that has seen 320, (768,)."""
    network, _ = _trained(())
    drawn, objective = torch.Generator().manual_seed(1), BASE.objective
    batch = _slices()[torch.randint(len(_slices()), (768,), generator=drawn)]
    with torch.no_grad():
        return objective(network, objective.draw(batch, drawn)).double()


# ---- 4.4 ----------------------------------------------------------------------------------------

SEEN = 320  # slices that a run may look at
BASE = TrainConfig(batch_size=16, steps=SEEN // 16, lr=2e-3, warmup=0, lr_schedule="constant").replace(
    image_size=32, base_channels=16, channel_mult=(1, 2), attention_levels=(), schedule="sigmoid"
)
MAY_CHANGE = ("batch_size", "lr", "warmup", "lr_schedule", "min_snr_gamma", "snr_offset", "loss")
WANTED = 0.7  # of the base's loss


def my_settings():
    return {"batch_size": 4, "lr": 4e-3}


def _large_batches():
    return {"batch_size": 64, "lr": 2e-3}


def _far_too_fast():
    return {"batch_size": 4, "lr": 1.0}


def _more_steps():
    return {"batch_size": 4, "steps": 2000}


def _diagnose_settings(my_settings) -> str:
    changes = my_settings()
    if not isinstance(changes, dict):
        raise Wrong(f"it returns a {type(changes).__name__}: a dict of settings is wanted.")
    if odd := sorted(changes.keys() - set(MAY_CHANGE)):
        raise Wrong(
            f"{odd[0]} stays as it is: all runs see {SEEN} slices and have one network. You may change "
            f"{', '.join(MAY_CHANGE)}."
        )
    if SEEN % changes.get("batch_size", 16):
        raise Wrong(f"{SEEN} slices do not divide into batches of {changes['batch_size']}.")
    try:
        found, base = (float(_trained(tuple(c.items()))[1].mean()) for c in (changes, {}))
    except FloatingPointError:
        raise Wrong("the loss is no longer a number: the rate is far too high.") from None
    if found > WANTED * base:
        steps = SEEN // changes.get("batch_size", 16)
        raise Wrong(
            f"a validation loss of {found:.2f} after {steps} steps, where {base:.2f} is to be undercut by "
            f"{1 - WANTED:.0%}. How often do the weights move, and how far each time?"
        )
    return f"a validation loss of {found:.2f} where the settings of before reach {base:.2f}, from as many slices."


@cache
def _slices() -> Tensor:
    return load_slices(make_phantoms(phantom_cache()).train, 32, cases=12)


@cache
def _trained(changes: tuple) -> tuple[torch.nn.Module, Tensor]:
    """The network after a run with some settings changed, and its validation loss without weight, (10,)."""
    changes = dict(changes)
    config = BASE.replace(**changes, steps=SEEN // changes.get("batch_size", 16))
    *_, state = train(config, _slices(), device="cpu")
    held_out = load_slices(make_phantoms(phantom_cache()).validate, 32, cases=2)
    return state.model.eval(), validation_loss(state.model, config, held_out[::8])


def _against_base(my_settings) -> Figure:
    runs = {"settings of before": (), "yours": tuple(my_settings().items())}
    times = [*range(50, 1000, 100)]
    curves = {name: (times, _trained(changes)[1]) for name, changes in runs.items()}
    return plots.lines(curves, "t", "validation loss of v", logy=True)


EXERCISES = (
    Exercise(
        "4.1", "The weight of an error of v", "line", 5,
        hints=(
            "The weight of an error of the *image* is min(SNR + 1, 5), and an error of v is 1 + SNR times that of the "
            "image.",
            "`.clamp(max=5)` is the minimum with 5; divide what comes by `snr + 1`.",
        ),
        diagnose=_diagnose_weight, solution=weight_of_v,
        wrong=(
            ((_without_offset,), "that is min-SNR without the offset"),
            ((_of_the_image,), "that is the weight of a squared error of the image"),
            ((_clamped_below,), "nothing is capped there"),
        ),
    ),
    Exercise(
        "4.2", "The loss of each image", "function", 10,
        hints=(
            "Three lines: make x_t, make v, and compare v with `network(x_t, t)`.",
            "`schedule.q_sample(x0, t, noise)` and `schedule.target(x0, noise, t, \"v_prediction\")`; then square the "
            "difference and take `.flatten(1).mean(1)`.",
        ),
        diagnose=_diagnose_loss, solution=loss_of_v, picture=_loss_by_t,
        wrong=(
            ((_of_noise,), "your network is asked for the noise"),
            ((_clean_input,), "your network sees the clean images"),
            ((_summed,), "a sum over the 8×8 pixels"),
            ((_one_number,), "one number for the whole batch"),
        ),
    ),
    Exercise(
        "4.3", "Four times the batch", "experiment", 10,
        hints=(
            "`losses.reshape(-1, batch)` has a batch in each row.",
            "Take the mean of each row, `.mean(1)`, and the standard deviation of these means, `.std()`.",
        ),
        diagnose=_diagnose_scatter, solution=scatter, prediction="a half",
        alternatives=("the same", "a quarter"),
        wrong=(
            (("the same", _single), "because you never make batches"),
            (("a quarter", _variance), "that is the variance"),
            (("the same", _inside), "how much slices scatter *inside* a batch"),
        ),
    ),
    Exercise(
        "4.4", "Settings of your own", "open", 20,
        hints=(
            "The number of slices is fixed, so a smaller batch gives more steps. The table above says what that did.",
            "`{\"batch_size\": 4, \"lr\": 4e-3}` passes. Which of the two does more?",
        ),
        diagnose=_diagnose_settings, solution=my_settings, picture=_against_base,
        wrong=(
            ((_large_batches,), "How often do the weights move"),
            ((_far_too_fast,), "the rate is far too high"),
            ((_more_steps,), "steps stays as it is"),
        ),
    ),
)  # fmt: skip
