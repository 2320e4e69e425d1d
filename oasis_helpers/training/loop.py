"""The training loop: a generator that yields its state, with EMA, mixed precision and several processes.

The loop draws nothing and prints nothing; whoever iterates over it decides what to show. It knows no
diffusion either: what a step draws and what its loss is, the objective says. All randomness of step n comes
from (seed, n), so a resumed run repeats the uninterrupted one bit for bit on the same machine. Started by
``torchrun`` or ``accelerate launch``, each process takes its share of every batch.

Sources: AdamW, Loshchilov & Hutter 2019 (arXiv 1711.05101); gradient clipping, Pascanu et al. 2013
(arXiv 1211.5063); cosine learning rate, Loshchilov & Hutter 2017 (arXiv 1608.03983); the average, Ho et al.
2020 (arXiv 2006.11239).
"""

from __future__ import annotations

import copy
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..seeds import generator
from .config import TrainConfig, learning_rate, pick_device
from .weights import fingerprint, load_checkpoint


class EMA:
    """Exponential moving average of a model's weights; sampling uses ``ema.model``.

    The decay is lowered early, min(decay, (1 + n)/(10 + n)) after n updates, so that the
    average forgets the random start. Buffers are copied.
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
        for ours, theirs in zip(self.model.buffers(), model.buffers()):
            ours.copy_(theirs)


class _Numbers:
    """A few numbers of a step. On a GPU they are read when somebody asks, and wait for that step alone."""

    def __init__(self, *values: Tensor):
        self._values = torch.stack([v.detach().float() for v in values]).to("cpu", non_blocking=True)
        self._done = torch.cuda.Event() if values[0].is_cuda else None
        if self._done is not None:
            self._done.record()

    def read(self) -> list[float]:
        if self._done is not None:
            self._done.synchronize()
        return self._values.tolist()


@dataclass
class TrainState:
    """What :func:`train` yields after every step; the networks are live, not copies.

    ``step`` counts finished steps from 1; ``images_per_second`` counts from this call's first step.
    ``config`` is the one in effect: precision "auto" resolved, ``accumulate`` raised where memory
    was short. ``data`` is the fingerprint of what it learns from. Only the process with ``is_main`` should
    write files.
    """

    step: int
    numbers: _Numbers
    lr: float
    images_per_second: float
    model: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    data: str
    is_main: bool = True

    @property
    def loss(self) -> float:
        """Mean over the batch of all processes, before the step."""
        return self.numbers.read()[0]

    @property
    def grad_norm(self) -> float:
        """Norm of all gradients, before clipping."""
        return self.numbers.read()[1]

    def check(self) -> None:
        """Raise ``FloatingPointError`` if loss or gradient were no numbers; the step was then not made."""
        loss, grad_norm = self.numbers.read()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient is {grad_norm}"
            raise FloatingPointError(
                f"the {what} at step {self.step - 1}: the weights are still those of step {self.step - 1}. "
                "Set precision to 'fp32' and resume from the last checkpoint, or start anew with a lower lr."
            )


def _batch_indices(count: int, config: TrainConfig, step: int) -> Tensor:
    """Which images step ``step`` sees: a fresh shuffle of all of them each epoch."""
    wanted = range(step * config.batch_size, (step + 1) * config.batch_size)
    picked, shuffled, epoch_now = [], None, None
    for position in wanted:
        epoch, place = divmod(position, count)
        if epoch != epoch_now:
            shuffled = torch.randperm(count, generator=generator(config.seed, epoch, "epoch"))
            epoch_now = epoch
        picked.append(shuffled[place])
    return torch.stack(picked)


def draw_step(config: TrainConfig, data, objective, step: int) -> Any:
    """Everything random of one step, from (seed, step): which images, and what the objective draws."""
    batch = data[_batch_indices(len(data), config, step)]
    return objective.draw(batch, generator(config.seed, step))


def train(
    config: TrainConfig,
    data,
    objective=None,
    *,
    model: nn.Module | None = None,
    device: torch.device | str | None = None,
    resume: str | Path | None = None,
) -> Iterator[TrainState]:
    """Train a network on ``data`` and yield a :class:`TrainState` after every step.

    ``data``: what gives a batch for a tensor of indices and has a length, such as the uint8 tensor (N, 1,
    H, W) of :func:`~oasis_helpers.data.load_slices` or a ``TensorDataset``. ``objective`` in place of the
    configuration's: it makes the network, draws what a step needs and gives the loss. ``model`` is a
    network of your own, called as the objective calls its own. ``resume`` is a checkpoint file written by
    :func:`save_checkpoint` of the same configuration and data (``steps`` may be raised). Raises
    ``ValueError`` for data of another size or kind and for a device that is not here, and
    ``FloatingPointError`` when the loss or a gradient is no longer a number. Where memory is short, a batch
    is computed in more parts; ``MemoryError`` if one image is too much. Ho et al. 2020, algorithm 1, where
    the objective is denoising.
    """
    if objective is not None:
        config = replace(config, objective=objective)
    if len(data) == 0:
        raise ValueError("there is no image to learn from: data is empty.")
    group = _processes(device)
    if config.batch_size % (group.count * config.accumulate):
        raise ValueError(
            f"batch_size {config.batch_size} does not fit {group.count} processes in {config.accumulate} "
            f"parts each: choose a multiple of {group.count * config.accumulate}."
        )
    if model is None:
        model = config.begin(data) if resume is None else config.make_network()
    model = model.to(group.device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    ema, optimizer = EMA(model, config.ema_decay), _optimizer(model, config, group.device)
    known, first = fingerprint(data), 0
    if resume is not None:
        first, config = load_checkpoint(resume, config, known, model, ema, optimizer)
    upcoming = group.moved(draw_step(config, data, config.objective, first))
    config = _with_precision(config, model, upcoming, group)
    parallel = group.wrap(torch.compile(model) if config.compile else model)

    started, state = time.perf_counter(), None
    for step in range(first, config.steps):
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(step, config)
        model.train()  # whoever looked at the network may have left it in eval mode
        loss, config = _gradients(parallel, upcoming, config, group)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        numbers = _Numbers(group.mean(loss), grad_norm)
        rate = (step + 1 - first) * config.batch_size / (time.perf_counter() - started)
        before, state = state, TrainState(
            step + 1, numbers, learning_rate(step, config), rate, model, ema, optimizer, config, known,
            group.is_main,
        )  # fmt: skip
        _update(state, before, loss, grad_norm)
        if step + 1 < config.steps:  # drawn and moved while a GPU works
            upcoming = group.moved(draw_step(config, data, config.objective, step + 1))
        yield state
    if state is not None:
        state.check()


def _optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.99),
        fused=device.type in ("cpu", "cuda"),
    )  # fmt: skip


def _is_late(device: torch.device) -> bool:
    """Are the numbers of a step read after the next has begun? A GPU would stand still otherwise."""
    return device.type == "cuda"


def _update(state: TrainState, before: TrainState | None, loss: Tensor, grad_norm: Tensor) -> None:
    """Change weights and average by one step, unless its loss or gradient is no number."""
    if _is_late(loss.device):
        if before is not None:
            before.check()
        # The fused optimiser leaves the weights alone where this is 1, and nobody has waited to know it.
        state.optimizer.found_inf = (~(loss + grad_norm).isfinite()).float().reshape(())
    else:
        state.check()
    state.optimizer.step()
    state.ema.update(state.model)


def _gradients(
    model: nn.Module, drawn: Any, config: TrainConfig, group: _Alone
) -> tuple[Tensor, TrainConfig]:
    """Gradients of one step and its mean loss; in more parts than before where memory is short."""
    while True:
        try:
            for parameter in model.parameters():
                parameter.grad = None
            return _backward(model, drawn, config, group), config
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            short = error
        config = _smaller_parts(config, group.count, short)


def _backward(model: nn.Module, drawn: Any, config: TrainConfig, group: _Alone) -> Tensor:
    """Gradients of one step in ``config.accumulate`` parts; the mean loss, detached."""
    total = torch.zeros((), device=group.device)
    size = _part(config, group)
    for part in range(config.accumulate):
        rows = _rows(drawn, slice(part * size, (part + 1) * size))
        # Several processes add up their gradients once, after the last part.
        with group.no_sync(model) if part + 1 < config.accumulate else nullcontext():
            with autocast(config, group.device):
                loss = config.objective(model, rows).sum() / (size * config.accumulate)
            loss.backward()
        total += loss.detach()
    return total


def _rows(drawn: Any, rows: slice) -> Any:
    """The same rows of every tensor in ``drawn``."""
    if isinstance(drawn, dict):
        return {name: _rows(value, rows) for name, value in drawn.items()}
    return drawn[rows]


# ---- precision and memory ----------------------------------------------------------------------


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    """bf16 autocast where the configuration asks for it, else nothing."""
    return torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext()


def _with_precision(config: TrainConfig, model: nn.Module, drawn: Any, group: _Alone) -> TrainConfig:
    """The configuration with the precision in effect, the same in all processes."""
    if config.precision == "auto":
        found = faster_precision(model, config, _rows(drawn, slice(0, _part(config, group))))
        return replace(config, precision=group.agreed(found))
    # Cards before Ampere only emulate it, slower than fp32.
    emulated = group.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if config.precision == "bf16" and emulated:
        warnings.warn("this card has no bf16: training in fp32.", stacklevel=3)
        return replace(config, precision="fp32")
    return config


def _part(config: TrainConfig, group: _Alone) -> int:
    return config.batch_size // group.count // config.accumulate


def faster_precision(model: nn.Module, config: TrainConfig, drawn: Any) -> str:
    """ "bf16" if a training step in autocast is at least a tenth faster here than in fp32, else "fp32".

    ``drawn``: one part of a batch, where the network is; fp32 also if memory is short for the trial.
    """
    device = next(model.parameters()).device
    trial = copy.deepcopy(model)

    def seconds(precision: str, drawn: Any) -> float:
        started = time.perf_counter()
        with autocast(replace(config, precision=precision), device):
            loss = config.objective(trial, drawn).mean()
        loss.backward()
        float(next(trial.parameters()).grad.sum())  # waits until the device is done
        return time.perf_counter() - started

    try:
        fp32 = min(seconds("fp32", drawn) for _ in range(3))
        # A processor without bf16 takes minutes where it takes seconds in fp32: one image tells.
        if device.type == "cpu" and seconds("bf16", _rows(drawn, slice(0, 1))) > fp32:
            return "fp32"
        bf16 = min(seconds("bf16", drawn) for _ in range(3))
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        return "fp32"  # the step itself finds parts that fit
    return "bf16" if bf16 < 0.9 * fp32 else "fp32"


def _out_of_memory(error: RuntimeError) -> bool:
    """Is it memory? CUDA has a class for that, MPS and the CPU only words."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "not enough memory")
    )


def _smaller_parts(config: TrainConfig, processes: int, error: Exception) -> TrainConfig:
    """The same batch in twice as many parts, or ``MemoryError`` if one image is too much already."""
    share = config.batch_size // processes
    part = share // config.accumulate
    if processes > 1:
        raise MemoryError(
            f"{part} images at once do not fit in the memory of a process. Raise accumulate: {processes} "
            "processes cannot each choose for themselves."
        ) from error
    if part <= 1 or share % (2 * config.accumulate):
        raise MemoryError(
            f"{part} images at once do not fit in memory. Choose a smaller network or image size, or a "
            "batch_size that is a power of two."
        ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return replace(config, accumulate=2 * config.accumulate)


# ---- processes -----------------------------------------------------------------------------------


class _Alone:
    """The processes of a run, where there is but one."""

    index, count, is_main = 0, 1, True

    def __init__(self, device: torch.device):
        self.device = device

    @cached_property
    def _beside(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def moved(self, drawn: Any) -> Any:
        """This process's share of what was drawn, on its device; a GPU works on meanwhile."""
        if isinstance(drawn, dict):
            return {name: self.moved(value) for name, value in drawn.items()}
        share = len(drawn) // self.count
        mine = drawn[self.index * share : (self.index + 1) * share]
        if self.device.type != "cuda":
            return mine.to(self.device)
        # On the stream of the network the copy would wait for all that stands there already.
        network = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._beside):
            there = mine.pin_memory().to(self.device, non_blocking=True)
        network.wait_stream(self._beside)
        there.record_stream(network)  # its memory is not given to the next copy before the network is done
        return there

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def mean(self, value: Tensor) -> Tensor:
        return value

    def agreed(self, choice: str) -> str:
        return choice

    def no_sync(self, model: nn.Module) -> AbstractContextManager:
        return nullcontext()


class _Several(_Alone):
    """The processes that ``accelerate launch`` or torchrun started; accelerate brings them together."""

    def __init__(self, device: torch.device | str | None):
        from accelerate import Accelerator

        for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
            if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
                raise ValueError(
                    f"accelerate is set to use {name}: this loop knows plain data parallelism only."
                )
        # Said here, so that no variable of accelerate's environment changes the numbers of a run.
        on_cpu = pick_device(device).type == "cpu"
        self._accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", dynamo_backend="no")
        super().__init__(self._accelerator.device)
        self.index, self.count = self._accelerator.process_index, self._accelerator.num_processes
        self.is_main = self._accelerator.is_main_process

    def wrap(self, model: nn.Module) -> nn.Module:
        return self._accelerator.prepare_model(model)

    def mean(self, value: Tensor) -> Tensor:
        return self._accelerator.reduce(value, "mean")

    def agreed(self, choice: str) -> str:
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([choice])[0]

    def no_sync(self, model: nn.Module) -> AbstractContextManager:
        return self._accelerator.no_sync(model)


def _processes(device: torch.device | str | None) -> _Alone:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return _Several(device)
    return _Alone(pick_device(device))
