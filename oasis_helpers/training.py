"""Training: a loop that yields its state, EMA, mixed precision, several processes, checkpoints, resume.

The loop draws nothing and prints nothing; whoever iterates over it decides what to show.
:func:`train` computes, :func:`train_to` adds the files of a run. All randomness of step n comes
from (seed, n), so a resumed run repeats the uninterrupted one bit for bit on the same machine.
Started by ``accelerate launch``, each process takes its share of every batch.

Sources: algorithm 1 of DDPM, Ho et al. 2020 (arXiv 2006.11239), with its EMA; AdamW,
Loshchilov & Hutter 2019 (arXiv 1711.05101); gradient clipping, Pascanu et al. 2013
(arXiv 1211.5063); cosine learning rate, Loshchilov & Hutter 2017 (arXiv 1608.03983).
"""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .data import to_unit_range
from .diffusion import LOSSES, NoiseSchedule, check_prediction, diffusion_loss
from .unet import UNet

FORMAT = 1  # of weight and checkpoint files
_CHOICES = {
    "precision": ("fp32", "bf16", "auto"),
    "lr_schedule": ("cosine", "linear", "constant"),
    "loss": LOSSES,
}
WEIGHTS = Path(__file__).parent / "weights" / "phantoms-64.safetensors"


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run; stored with the weights, enough to rebuild them.

    ``image_size`` in pixels; the network's settings as in :class:`~oasis_helpers.unet.UNet`;
    ``T``, ``schedule`` and ``prediction`` as in :mod:`~oasis_helpers.diffusion`; ``lr`` is the
    peak of a linear warm-up over ``warmup`` steps, then "cosine" or "linear" to zero at
    ``steps`` or "constant"; ``loss`` and ``min_snr_gamma`` as in
    :func:`~oasis_helpers.diffusion.diffusion_loss`; ``batch_size`` counts over all processes
    and is computed in ``accumulate`` parts; ``grad_clip`` is the largest gradient norm;
    ``precision`` "fp32", "bf16" for autocast, or "auto" for the faster of the two here.
    """

    image_size: int = 64
    base_channels: int = 32
    channel_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 1
    attention_levels: tuple[int, ...] = (2,)
    patch_size: int = 2
    T: int = 1000
    schedule: str = "cosine"
    prediction: str = "v_prediction"
    steps: int = 200
    batch_size: int = 16
    lr: float = 1e-3
    warmup: int = 50
    lr_schedule: str = "cosine"
    loss: str = "l2"
    min_snr_gamma: float | None = None
    accumulate: int = 1
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("image_size", "T", "steps", "batch_size", "accumulate", "lr", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0.")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma is {self.min_snr_gamma}: give a number above 0, or None.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}: give a number in [0, 1).")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}.")
        check_prediction(self.prediction)
        # JSON has no tuples; a configuration read back must equal the one written.
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        object.__setattr__(self, "attention_levels", tuple(self.attention_levels))

    def make_model(self) -> UNet:
        """A fresh network; its initial weights depend on ``seed`` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return UNet(
                in_channels=1,
                base_channels=self.base_channels,
                channel_mult=self.channel_mult,
                num_res_blocks=self.num_res_blocks,
                attention_levels=self.attention_levels,
                patch_size=self.patch_size,
            )

    def make_schedule(self) -> NoiseSchedule:
        """The noise schedule named in the configuration."""
        return NoiseSchedule.named(self.schedule, self.T)


PROFILES = {
    # a taste, in CI and on any laptop: about a minute, not yet heads
    "quick": TrainConfig(base_channels=16, channel_mult=(1, 2, 4), steps=200, lr=2e-3, ema_decay=0.98),
    # heads in five minutes on two cores (steps=1200); an hour gives the weights that ship
    "laptop": TrainConfig(
        steps=14_800, batch_size=8, lr=1e-3, warmup=100, min_snr_gamma=5.0, precision="bf16",
    ),
    # a GPU's worth: 128×128, about 20 million parameters
    "full": TrainConfig(
        image_size=128, base_channels=64, channel_mult=(1, 2, 3, 4), num_res_blocks=2,
        attention_levels=(2, 3), steps=100_000, batch_size=64, lr=4e-4, warmup=1000,
        ema_decay=0.9995, precision="bf16",
    ),
}  # fmt: skip


def pick_device() -> torch.device:
    """The fastest device here: CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to ``config.lr``, then the way down (or not) that ``config.lr_schedule`` names."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = min((step - config.warmup) / max(config.steps - config.warmup, 1), 1.0)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return config.lr * left[config.lr_schedule]


class EMA:
    """Exponential moving average of a model's weights; sampling uses ``ema.model``.

    The decay is lowered early, min(decay, (1 + n)/(10 + n)) after n updates, so that the
    average forgets the random start.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step: average ← d · average + (1 − d) · weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)


@dataclass
class TrainState:
    """What :func:`train` yields after every step; the networks are live, not copies.

    ``step`` counts finished steps from 1; ``loss`` is the mean over the batch of all processes;
    ``grad_norm`` is before clipping; ``images_per_second`` counts from this call's first step.
    ``config`` is the one in effect: precision "auto" resolved, ``accumulate`` raised where memory
    was short. Only the process with ``is_main`` should write files.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    images_per_second: float
    model: UNet
    ema: EMA
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    is_main: bool = True


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    """bf16 autocast where the configuration asks for it, else nothing."""
    return torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext()


def _step_generator(seed: int, step: int) -> torch.Generator:
    # Always on the CPU: the same numbers whatever the device.
    return torch.Generator().manual_seed((seed << 32) + step)


def _epoch_generator(seed: int, epoch: int) -> torch.Generator:
    # Far from every step's seed.
    return torch.Generator().manual_seed((seed << 32) + (1 << 31) + epoch)


def _batch_indices(count: int, config: TrainConfig, step: int) -> Tensor:
    """Which images step ``step`` sees: a fresh shuffle of all of them each epoch."""
    wanted = range(step * config.batch_size, (step + 1) * config.batch_size)
    picked, shuffled, epoch_now = [], None, None
    for position in wanted:
        epoch, place = divmod(position, count)
        if epoch != epoch_now:
            shuffled = torch.randperm(count, generator=_epoch_generator(config.seed, epoch))
            epoch_now = epoch
        picked.append(shuffled[place])
    return torch.stack(picked)


def train(
    config: TrainConfig,
    slices: Tensor,
    *,
    model: nn.Module | None = None,
    device: torch.device | str | None = None,
    resume: str | Path | None = None,
) -> Iterator[TrainState]:
    """Train a network on ``slices`` and yield a :class:`TrainState` after every step.

    ``slices``: uint8 (N, 1, image_size, image_size) from
    :func:`~oasis_helpers.data.load_slices`. ``model`` is a network of your own, called as
    ``model(x, t, y)``, in place of the configuration's. ``resume`` is a checkpoint file written by
    :func:`save_checkpoint` of the same configuration (``steps`` may differ). Raises ``ValueError``
    for images of another size or type, and ``FloatingPointError`` when the loss is no longer a
    number. Where memory is short, a batch is computed in more parts; ``MemoryError`` if one image is
    too much. Ho et al. 2020, algorithm 1.
    """
    if slices.dtype != torch.uint8 or slices.ndim != 4 or slices.shape[1] != 1 or len(slices) == 0:
        raise ValueError(
            f"slices is {slices.dtype} of shape {tuple(slices.shape)}: "
            "give uint8 (N, 1, H, W) from load_slices."
        )
    if slices.shape[-2:] != (config.image_size, config.image_size):
        raise ValueError(
            f"slices are {slices.shape[-2]}×{slices.shape[-1]}, the configuration says {config.image_size}×"
            f"{config.image_size}: load them with load_slices(root, {config.image_size})."
        )
    accelerator = _accelerator(device)
    device, processes = accelerator.device, accelerator.num_processes
    if config.batch_size % (processes * config.accumulate):
        raise ValueError(
            f"batch_size {config.batch_size} does not fit {processes} processes in {config.accumulate} "
            f"parts each: choose a multiple of {processes * config.accumulate}."
        )
    schedule = config.make_schedule()
    model = (config.make_model() if model is None else model).to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    ema = EMA(model, config.ema_decay)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.99),
        fused=device.type in ("cpu", "cuda"),
    )  # fmt: skip
    first = 0
    if resume is not None:
        first, config = _load_checkpoint(resume, config, model, ema, optimizer)
    if config.precision == "auto":
        config = replace(config, precision=faster_precision(model, config))
    parallel = accelerator.prepare_model(torch.compile(model) if config.compile else model)
    mine = slice(accelerator.process_index, None, processes)

    started = time.perf_counter()
    for step in range(first, config.steps):
        generator = _step_generator(config.seed, step)
        picked = _batch_indices(len(slices), config, step)
        t = torch.randint(0, config.T, (config.batch_size,), generator=generator)
        noise = torch.randn((config.batch_size, *slices.shape[1:]), generator=generator)
        batch = (to_unit_range(slices[picked[mine]]), t[mine], noise[mine])  # this process's share

        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        while True:
            try:
                optimizer.zero_grad(set_to_none=True)
                loss = _backward(accelerator, parallel, schedule, batch, config)
                break
            except torch.OutOfMemoryError as error:
                config = _smaller_parts(config, processes, error)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        value = float(accelerator.reduce(loss, "mean"))
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {step}: the weights are still those of step {step}. "
                "Lower lr, or set precision to 'fp32', and resume from the last checkpoint."
            )
        optimizer.step()
        ema.update(model)
        rate = (step + 1 - first) * config.batch_size / (time.perf_counter() - started)
        yield TrainState(
            step + 1, value, lr, float(grad_norm), rate, model, ema, optimizer, config,
            accelerator.is_main_process,
        )  # fmt: skip


def _accelerator(device: torch.device | str | None) -> Accelerator:
    """The processes and the device of this run. ``device`` overrides accelerate's own choice."""
    on_cpu = (torch.device(device) if device is not None else pick_device()).type == "cpu"
    # accelerate keeps one state a process and refuses another device; a notebook trains on several.
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=not several)
    return Accelerator(cpu=on_cpu)


def _backward(
    accelerator: Accelerator, model: nn.Module, schedule: NoiseSchedule, batch: tuple[Tensor, ...], config
) -> Tensor:
    """Gradients of one step in ``config.accumulate`` parts; the mean loss, detached."""
    total = torch.zeros((), device=accelerator.device)
    parts = list(zip(*(part.chunk(config.accumulate) for part in batch)))
    for number, part in enumerate(parts, 1):
        x0, t, noise = (tensor.to(accelerator.device) for tensor in part)
        # Several processes add up their gradients once, after the last part.
        with accelerator.no_sync(model) if number < len(parts) else nullcontext():
            with autocast(config, accelerator.device):
                each = diffusion_loss(
                    model, schedule, x0, t, noise, config.prediction,
                    loss=config.loss, min_snr_gamma=config.min_snr_gamma,
                )  # fmt: skip
            loss = each.sum() / len(batch[0])
            accelerator.backward(loss)
        total += loss.detach()
    return total


def _smaller_parts(config: TrainConfig, processes: int, error: Exception) -> TrainConfig:
    """The same batch in twice as many parts, or ``MemoryError`` if one image is too much already."""
    share = config.batch_size // processes
    if share // config.accumulate <= 1 or share % (2 * config.accumulate):
        raise MemoryError(
            f"{share // config.accumulate} images of {config.image_size}×{config.image_size} at once do not "
            "fit in memory. Choose a smaller network or image size, or a batch_size that is a power of two."
        ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return replace(config, accumulate=2 * config.accumulate)


def faster_precision(model: nn.Module, config: TrainConfig) -> str:
    """ "bf16" if a training step in autocast is at least a tenth faster here than in fp32, else "fp32"."""
    device = next(model.parameters()).device
    trial = copy.deepcopy(model)
    images = torch.zeros((config.batch_size, 1, config.image_size, config.image_size), device=device)
    seconds = {}
    for precision in ("fp32", "bf16"):
        times = []
        for _ in range(3):
            started = time.perf_counter()
            with autocast(replace(config, precision=precision), device):
                output = trial(images, torch.zeros(config.batch_size, dtype=torch.long, device=device))
            output.float().square().mean().backward()
            float(next(trial.parameters()).grad.sum())  # waits until the device is done
            times.append(time.perf_counter() - started)
        seconds[precision] = min(times)
    return "bf16" if seconds["bf16"] < 0.9 * seconds["fp32"] else "fp32"


def checkpoints(out: str | Path) -> list[Path]:
    """The checkpoints of the run that will end in the weights ``out``, oldest first."""
    out = Path(out).expanduser()
    return sorted(out.parent.glob(f"{out.stem}.step*.checkpoint.safetensors"))


def train_to(
    out: str | Path,
    config: TrainConfig,
    slices: Tensor,
    *,
    device: torch.device | str | None = None,
    resume: bool = False,
    every: int = 500,
    keep: int = 2,
    **card: str,
) -> Iterator[TrainState]:
    """:func:`train` with the files of a run, and a way to stop it.

    Beside the weights ``out``, written at the end with ``card`` in their metadata: ``out``'s name
    with ``.csv`` has a line of metrics a step (and with ``.tensorboard`` the same for TensorBoard,
    where that is installed), ``.stepN.checkpoint.safetensors`` the state at every ``every``-th
    step. The last ``keep`` are kept until the end. ``resume`` goes on from the newest that is
    whole. Ctrl-C lets the step end, writes a checkpoint and raises ``KeyboardInterrupt`` that
    names it; a second Ctrl-C stops at once. Raises ``FileExistsError`` rather than overwrite a
    run, and what :func:`train` raises.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise FileExistsError(f"{out} exists: that run is finished. Give another name.")
    if checkpoints(out) and not resume:
        raise FileExistsError(
            f"{checkpoints(out)[-1]} exists. Give another name, or resume (--resume) to go on with that run."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    start = _newest_whole(out) if resume else None
    for left_over in out.parent.glob(f".{out.stem}.*.part"):  # a checkpoint cut by a hard stop
        left_over.unlink(missing_ok=True)
    log, state = _Log(out, start), None
    with _ends_after_the_step() as interrupted:
        try:
            for state in train(config, slices, device=device, resume=start):
                if state.is_main:
                    log.write(state)
                    if state.step % every == 0:
                        _keep(out, state, keep)
                yield state
                if interrupted:
                    if state.is_main:
                        _keep(out, state, keep)
                    break
        except FloatingPointError as error:
            last = checkpoints(out)
            raise FloatingPointError(
                f"{error} {f'The last is {last[-1]}.' if last else 'There is none yet.'}"
            ) from None
        finally:
            log.close()
    if interrupted and state.step < config.steps:
        raise KeyboardInterrupt(f"stopped after step {state.step}; {checkpoints(out)[-1]} has all to go on")
    if state is not None and state.is_main:
        save_weights(out, state.ema.model, state.config, steps=str(state.step), **card)
        for path in checkpoints(out):
            path.unlink()


def _keep(out: Path, state: TrainState, keep: int) -> None:
    """Write a checkpoint of ``state`` and delete all but the last ``keep``."""
    save_checkpoint(out.with_name(f"{out.stem}.step{state.step:07d}.checkpoint.safetensors"), state)
    for old in checkpoints(out)[:-keep]:
        old.unlink()


def _newest_whole(out: Path) -> Path:
    found = checkpoints(out)
    for path in reversed(found):
        try:
            with safe_open(path, "pt") as file:
                if "step" in (file.metadata() or {}):
                    return path
        except (SafetensorError, OSError):
            continue  # cut short by a full disk or a hard stop; the one before is whole
    raise FileNotFoundError(
        f"{out} has no whole checkpoint beside it ({len(found)} found): start without resume."
    )


class _Log:
    """Metrics of a run: a CSV, and TensorBoard where it is installed."""

    COLUMNS = ("step", "loss", "lr", "grad_norm", "images_per_second")

    def __init__(self, out: Path, start: Path | None):
        path, lines = out.with_suffix(".csv"), [",".join(self.COLUMNS)]
        if start is not None and path.exists():  # what came after the checkpoint will come again
            step = int(start.name.split(".step")[-1].split(".")[0])
            lines += [line for line in path.read_text().splitlines()[1:] if int(line.split(",")[0]) <= step]
        if int(os.environ.get("RANK", 0)) > 0:
            path = Path(os.devnull)
        self.file = path.open("w", encoding="utf-8", buffering=1)
        self.file.write("\n".join(lines) + "\n")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out.with_suffix(".tensorboard"))
        except ImportError:
            self.board = None

    def write(self, state: TrainState) -> None:
        values = [getattr(state, name) for name in self.COLUMNS]
        self.file.write(",".join(f"{value:.6g}" for value in values) + "\n")
        if self.board is not None:
            for name, value in zip(self.COLUMNS[1:], values[1:]):
                self.board.add_scalar(name, value, state.step)

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


@contextmanager
def _ends_after_the_step() -> Iterator[list[int]]:
    """A list that is no longer empty after Ctrl-C; the second Ctrl-C works as ever."""
    received: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    # Only the main thread may set signal handlers; a job in the background ignores Ctrl-C.
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield received
        return

    def note(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


@torch.no_grad()
def validation_loss(
    model: nn.Module, config: TrainConfig, slices: Tensor, *, buckets: int = 10, seed: int = 0
) -> Tensor:
    """Mean loss on ``slices`` in each of ``buckets`` equal ranges of t, shape (buckets,).

    Every slice is noised once in each bucket, with timesteps and noise fixed by ``seed``, so
    that two networks, or two moments of one, are compared on the same questions.
    """
    device = next(model.parameters()).device
    schedule, losses = config.make_schedule(), []
    edges = torch.linspace(0, config.T, buckets + 1).round().long()
    for bucket, (low, high) in enumerate(pairwise(edges.tolist())):
        generator = _step_generator(seed, bucket)
        found = []
        for part in slices.split(64):
            x0 = to_unit_range(part).to(device)
            t = torch.randint(low, high, (len(x0),), generator=generator).to(device)
            noise = torch.randn(x0.shape, generator=generator).to(device)
            with autocast(config, device):
                found.append(diffusion_loss(model, schedule, x0, t, noise, config.prediction))
        losses.append(torch.cat(found).mean())
    return torch.stack(losses).cpu()


# ---- weights and checkpoints ----------------------------------------------------------------


def replace_file(path: Path, write) -> None:
    """Write beside ``path``, flush to disk, rename: the old file stays whole if anything fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_weights(path: str | Path, model: UNet, config: TrainConfig, **card: str) -> None:
    """Write a network and its configuration to one safetensors file, atomically.

    ``card`` adds strings to the file's metadata (data, hardware, commit …).
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": str(FORMAT), "config": json.dumps(asdict(config)), **card}
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; ``FileNotFoundError``, or ``ValueError`` if damaged."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Train it first, or give a file of save_weights or save_checkpoint."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}). Copy or train it again."
        ) from error


def load_weights(path: str | Path = WEIGHTS, device: torch.device | str = "cpu") -> tuple[UNet, TrainConfig]:
    """The network (eval mode) and configuration in a file of :func:`save_weights`.

    Without ``path``: the weights that ship, trained on 64×64 phantoms. Raises
    ``FileNotFoundError``, or ``ValueError`` for a file that is damaged or of another kind.
    """
    tensors, metadata = read_tensors(path)
    config = _read_config(metadata, path)
    model = config.make_model()
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds weights of another architecture than its configuration says."
        ) from error
    return model.to(device).eval(), config


def _read_config(metadata: dict[str, str], path: Path) -> TrainConfig:
    if "config" not in metadata:
        raise ValueError(f"{path} holds no configuration: it was not written by save_weights.")
    if int(metadata.get("format", 0)) > FORMAT:
        raise ValueError(
            f"{path} has format {metadata['format']}, this version reads {FORMAT}: update oasis_helpers."
        )
    stored = json.loads(metadata["config"])
    if unknown := sorted(set(stored) - {f.name for f in fields(TrainConfig)}):
        raise ValueError(f"{path} has unknown settings ({', '.join(unknown)}): update oasis_helpers.")
    return TrainConfig(**stored)


def save_checkpoint(path: str | Path, state: TrainState) -> None:
    """Everything needed to go on, in one safetensors file, written atomically.

    Weights, EMA, both moments of AdamW, the step and the configuration; the random state
    needs no place, because step n's randomness comes from (seed, n).
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in state.ema.model.state_dict().items()}
    for index, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in moments.items()}
    tensors = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    metadata = {
        "format": str(FORMAT),
        "config": json.dumps(asdict(state.config)),
        "step": str(state.step),
        "ema_updates": str(state.ema.updates),
    }
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata))


def _load_checkpoint(
    path: str | Path, config: TrainConfig, model: UNet, ema: EMA, optimizer: torch.optim.Optimizer
) -> tuple[int, TrainConfig]:
    """Restore all of a run from ``path``: the number of finished steps and the configuration in effect."""
    tensors, metadata = read_tensors(path)
    stored = _read_config(metadata, path)
    if "step" not in metadata:
        raise ValueError(f"{path} holds weights only; resume needs a checkpoint of save_checkpoint.")
    # What a run finds out for itself (precision, parts) is taken over; how long it lasts may change.
    found_out = {"steps": config.steps, "accumulate": config.accumulate}
    if config.precision == "auto":
        config = replace(config, precision=stored.precision)
    if replace(stored, **found_out) != config:
        ours, theirs = asdict(config), asdict(stored)
        differing = ", ".join(
            f"{k} {theirs[k]} ≠ {ours[k]}" for k in ours if k not in found_out and ours[k] != theirs[k]
        )
        raise ValueError(f"{path} was trained otherwise ({differing}). Use its configuration, or start anew.")

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    model.load_state_dict(part("model."))
    ema.model.load_state_dict(part("ema."))
    ema.updates = int(metadata["ema_updates"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in part("optimizer.").items():
        index, key = name.split(".", 1)
        moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"]), config
