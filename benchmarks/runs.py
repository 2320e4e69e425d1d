"""Many training runs of small networks at once: processes on a CPU, recorded steps on a GPU.

A training step of these networks is hundreds of short kernels, and a GPU waits for Python between them. So on
CUDA a step is recorded once, as a CUDA graph, and played back: one call a step, a stream and a thread for
each run. What a step draws, its learning rate and its optimiser are those of ``train``,
and a test compares the weights. Elsewhere it *is* ``train``, a process for each run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import torch
from torch import Tensor, nn

from oasis_helpers.data import find_data, load_slices, to_unit_range
from oasis_helpers.diffusion import Process, diffusion_loss
from oasis_helpers.training import (
    EMA,
    Denoising,
    TrainConfig,
    checkpoints,
    learning_rate,
    pick_device,
    save_weights,
    train,
    train_to,
)
from oasis_helpers.training.loop import draw_step
from oasis_helpers.training.weights import fingerprint

DEVICE = pick_device()
# MPS is left out: what is measured on a Mac is measured on its CPU.
ON_GPU = DEVICE.type == "cuda"
if ON_GPU:
    torch.backends.cuda.matmul.allow_tf32 = True
else:
    DEVICE = torch.device("cpu")
PROGRESS = 2000  # steps between two lines
_one_at_a_time = threading.Lock()  # while a graph is recorded no other may be


def hardware() -> str:
    """What runs here: the card, or the processors."""
    return torch.cuda.get_device_name() if ON_GPU else f"{joblib.cpu_count()} CPUs"


def in_parallel(function: Callable, jobs: Iterable[tuple], count: int | None = None) -> Iterator:
    """``function`` of each job's arguments, ``count`` at a time, as they are done."""
    kind = {"backend": "threading"} if ON_GPU else {}
    runner = joblib.Parallel(count or joblib.cpu_count(), return_as="generator_unordered", **kind)
    return runner(joblib.delayed(function)(*job) for job in jobs)


@cache
def training_slices(root: str, size: int) -> Tensor:
    """Training slices of the data in ``root`` as bytes, once a process."""
    return load_slices(find_data(root).train, size)


class Trained(NamedTuple):
    """The networks at the end of a run, in eval mode where they were trained."""

    last: nn.Module
    average: nn.Module


def trained(config: TrainConfig, slices, make: Callable[[], nn.Module] | None = None) -> Trained:
    """Train by ``config`` on ``slices``, or other data; ``make`` makes another network than it says.

    Raises ``FloatingPointError`` where the weights become no numbers.
    """
    if not ON_GPU:
        torch.set_num_threads(1)  # two processes gain more than a second thread
        *_, state = train(config, slices, model=make() if make else None, device="cpu")
        return Trained(state.model.eval(), state.ema.model)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        with _one_at_a_time:  # nor may two make their initial weights from the one global generator
            step = Step(config, make() if make else config.begin(slices), DEVICE)
            step.record(draw_step(config, slices, config.objective, 0))
        started = time.perf_counter()
        for number in range(config.steps):
            step.play(draw_step(config, slices, config.objective, number), number)
            if (number + 1) % PROGRESS == 0:
                print(
                    f"{number + 1} of {config.steps} steps, {time.perf_counter() - started:.0f} s", flush=True
                )
        stream.synchronize()
    if not all(p.isfinite().all() for p in step.network.parameters()):
        raise FloatingPointError(f"weights are no numbers after {config.steps} steps: {config}")
    return Trained(step.network.eval(), step.ema.model)


def trained_to(path: Path, config: TrainConfig, slices, card: dict[str, Any]) -> None:
    """:func:`trained` with the average stored, unless it is there; on a CPU a run that was cut goes on."""
    if path.exists():
        return
    if not ON_GPU:
        resume = bool(checkpoints(path))
        for _ in train_to(path, config, slices, device="cpu", card=card, resume=resume):
            pass
        return
    card = {**card, "data_fingerprint": fingerprint(slices), "steps": config.steps, "trained on": hardware()}
    average = trained(config, slices).average
    if finish := getattr(config.objective, "finish", None):
        finish(average, slices)
    save_weights(path, average, config, card)


class _Waiting:
    """Memory from which a GPU copies while this thread draws the next step.

    Without it a thread stands in the driver until its stream has come to the copy, and so do all others.
    """

    def __init__(self):
        self.pinned: dict[str, Tensor] = {}
        self.copied = torch.cuda.Event()

    def copy(self, drawn: dict[str, Tensor], there: dict[str, Tensor]) -> None:
        self.copied.synchronize()
        for name, values in drawn.items():
            if name in self.pinned:
                self.pinned[name].copy_(values)
            else:
                self.pinned[name] = values.pin_memory()
            there[name].copy_(self.pinned[name], non_blocking=True)
        self.copied.record()


class Step:
    """One training step in fp32 (on a GPU with TF32), which can be recorded and played back.

    A graph repeats its kernels with the numbers in the same places, so what changes from step to step (the
    drawn images, timesteps and noise, the learning rate, how far the average moves) lies in tensors.
    """

    def __init__(self, config: TrainConfig, network: nn.Module, device: torch.device):
        objective = config.objective
        self.config, self.device, self.graph = config, device, None
        self.network = network.to(device).train()
        self.ema = EMA(self.network, config.ema_decay)
        self.process = self.weights = None
        if isinstance(objective, Denoising):
            schedule, every = objective.make_schedule(), torch.arange(objective.T)
            self.process = Process(schedule.signal.to(device), schedule.noise.to(device))
            self.weights = torch.ones(schedule.T, device=device)
            if objective.min_snr_gamma is not None:
                how = objective.prediction, objective.min_snr_gamma, objective.snr_offset
                self.weights = schedule.min_snr_weight(every, *how).to(device)
        self.rate, self.pull = (torch.zeros((), device=device) for _ in range(2))
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.rate, weight_decay=config.weight_decay, betas=(0.9, 0.99),
            capturable=device.type == "cuda",
        )  # fmt: skip
        self.drawn: dict[str, Tensor] = {}
        self.waiting = [_Waiting() for _ in range(2 if device.type == "cuda" else 0)]

    def _set(self, drawn: dict[str, Any], number: int) -> None:
        """Put what step ``number`` needs in its place."""
        drawn = {name: values for name, values in drawn.items() if name != "y"} | drawn.get("y", {})
        if not self.drawn:
            self.drawn = {name: values.to(self.device, copy=True) for name, values in drawn.items()}
        elif self.waiting:
            self.waiting[number % 2].copy(drawn, self.drawn)
        else:
            for name, values in drawn.items():
                self.drawn[name].copy_(values)
        decay = min(self.ema.decay, (1 + number) / (10 + number))  # as EMA.update
        self.rate.fill_(learning_rate(number, self.config))
        self.pull.fill_(1 - decay)

    def _losses(self) -> Tensor:
        """The loss of each image; diffusion's without a table on the CPU, which no graph can record."""
        objective = self.config.objective
        if self.process is None:
            return objective(self.network, self.drawn)
        images, t, noise = (self.drawn[name] for name in ("images", "t", "noise"))
        y = {name: self.drawn[name] for name in objective.conditions if name in self.drawn}
        x0 = to_unit_range(images) if images.dtype == torch.uint8 else images
        how = {"y": y or None, "loss": objective.loss}
        losses = diffusion_loss(self.network, self.process, x0, t, noise, objective.prediction, **how)
        return losses * self.weights[t]

    def _run(self) -> None:
        parameters = list(self.network.parameters())
        for parameter in parameters:
            parameter.grad = None
        self._losses().mean().backward()
        nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
        self.optimizer.step()
        with torch.no_grad():
            averages = list(self.ema.model.parameters())
            moved = torch._foreach_sub(parameters, averages)
            torch._foreach_mul_(moved, self.pull)
            torch._foreach_add_(averages, moved)

    def record(self, drawn: dict[str, Any]) -> None:
        """Record the step on this thread's stream; weights and moments are as before."""
        self._set(drawn, 0)
        modules = (self.network, self.ema.model)
        before = [{k: v.clone() for k, v in module.state_dict().items()} for module in modules]
        for _ in range(3):  # libraries choose their kernels, and the optimiser takes its memory
            self._run()
        self.graph = torch.cuda.CUDAGraph()
        for parameter in self.network.parameters():
            parameter.grad = None  # the graph's own, in memory of the graph
        torch.cuda.current_stream().synchronize()
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self._run()
        except RuntimeError as error:  # a network that looks at numbers on its way is played step by step
            print(f"not recorded: {str(error).splitlines()[0]}", flush=True)
            self.graph = None
        for module, state in zip(modules, before):
            module.load_state_dict(state)
        for moments in self.optimizer.state.values():
            for moment in moments.values():
                moment.zero_()

    def play(self, drawn: dict[str, Any], number: int) -> None:
        """Make step ``number``."""
        self._set(drawn, number)
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()
