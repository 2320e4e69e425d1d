"""The files of a run: a folder of metrics and checkpoints while it lasts, the weights at its end.

Beside the weights ``X`` stands the folder ``X.run`` with ``metrics.csv``, a ``step-N.safetensors`` for each
checkpoint kept and, where TensorBoard is installed, ``tensorboard``. No other file is touched.
"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..layout import remove_leftovers
from .config import TrainConfig
from .loop import TrainState, train
from .weights import (
    check_same_run,
    fingerprint,
    read_header,
    read_tensors,
    save_checkpoint,
    save_weights,
)


def run_folder(out: str | Path) -> Path:
    """The folder of the run that will end in the weights ``out``."""
    out = Path(out).expanduser()
    return out.with_name(f"{out.name}.run")


def checkpoints(out: str | Path) -> list[Path]:
    """The checkpoints of the run that will end in the weights ``out``, oldest first."""
    folder = run_folder(out)
    found = [p for p in folder.iterdir() if _CHECKPOINT.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=_step_of)


_OURS = {"metrics.csv", "tensorboard"}  # what a run leaves that was stopped before its first checkpoint
_CHECKPOINT = re.compile(r"step-(\d+)\.safetensors")


def _checkpoint_of(out: Path, step: int) -> Path:
    return run_folder(out) / f"step-{step:07d}.safetensors"


def _step_of(checkpoint: Path) -> int:
    return int(_CHECKPOINT.fullmatch(checkpoint.name)[1])


def train_to(
    out: str | Path,
    config: TrainConfig,
    data,
    objective=None,
    *,
    device: torch.device | str | None = None,
    resume: bool = False,
    every: int = 500,
    keep: int = 2,
    card: dict[str, Any] | None = None,
) -> Iterator[TrainState]:
    """:func:`train` with the files of a run, and a way to stop it.

    The weights ``out`` are written at the end, with ``card`` and the data's fingerprint in their card. Until
    then :func:`run_folder` holds a line of metrics a step and the state at every ``every``-th step, of which
    the last ``keep`` are kept. ``resume`` goes on from the newest that is whole. Ctrl-C lets the step end,
    writes a checkpoint and raises ``KeyboardInterrupt`` that names it; a second Ctrl-C stops at once. Raises
    ``FileExistsError`` rather than overwrite a run, ``ValueError`` for a ``card`` that JSON cannot hold, and
    what :func:`train` raises.
    """
    out = Path(out).expanduser()
    if objective is not None:
        config = config.replace(objective=objective)
    card = {**_checked(card), "data_fingerprint": fingerprint(data)}
    for name, number in (("every", every), ("keep", keep)):
        if number < 1:
            raise ValueError(f"{name} is {number}: give 1 or more.")
    start = _claim(out, resume)
    if start is not None and _step_of(start) == config.steps:  # it died between the last step and the weights
        _finish_from(start, out, config, data, card)
        return
    state, rows = None, _Rows(run_folder(out), start)
    with _ends_after_the_step() as interrupted, rows:
        try:
            for state in train(config, data, device=device, resume=start):
                if state.is_main:
                    rows.write(state)
                    if state.step % every == 0:
                        _keep(out, state, keep)
                yield state
                if _agreed(bool(interrupted), state):
                    if state.is_main:
                        _keep(out, state, keep)
                    break
        except FloatingPointError as error:
            last = checkpoints(out)
            raise FloatingPointError(
                f"{error} {f'The last is {last[-1]}.' if last else 'There is none yet.'}"
            ) from None
    if state.step < config.steps:
        checkpoint = _checkpoint_of(out, state.step)
        raise KeyboardInterrupt(f"stopped after step {state.step}; {checkpoint} has all to go on")
    if state.is_main:
        _write_weights(out, state.ema.model, state.config, data, card | {"steps": state.step})


def _checked(card: dict[str, Any] | None) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(card or {}))
    except TypeError as error:
        raise ValueError(f"the card cannot be stored ({error}): give strings and numbers.") from None


def _claim(out: Path, resume: bool) -> Path | None:
    """Take ``out`` and its folder for this run: the checkpoint to go on from, or None for a new one."""
    if out.exists():
        raise FileExistsError(f"{out} exists: that run is finished. Give another name.")
    folder = run_folder(out)
    if resume:
        start = _newest_whole(out)
        if _is_main():
            remove_leftovers(folder)  # a checkpoint cut by a hard stop
        return start
    if _is_main():  # the others may come when the folder is made already
        if found := checkpoints(out):
            raise FileExistsError(
                f"{found[-1]} exists. Give another name, or resume (--resume) to go on with that run."
            )
        if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - _OURS):
            raise FileExistsError(f"{folder} is there and is no run of ours. Give another name.")
        folder.mkdir(parents=True, exist_ok=True)
    return None


def _finish_from(checkpoint: Path, out: Path, config: TrainConfig, data, card: dict[str, Any]) -> None:
    """Write the weights of a run whose last step is in ``checkpoint``."""
    tensors, header = read_tensors(checkpoint)
    check_same_run(checkpoint, header, config, card["data_fingerprint"])
    average = config.make_network().eval()
    average.load_state_dict({k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")})
    if _is_main():
        # "auto" stood for the precision that the run chose
        config = replace(config, precision=header.training["precision"])
        _write_weights(out, average, config, data, card | {"steps": header.run["step"]})


def _write_weights(
    out: Path, network: torch.nn.Module, config: TrainConfig, data, card: dict[str, Any]
) -> None:
    """The weights at the end of a run, in place of its checkpoints.

    An objective may have a last thing to do with its network, ``finish(network, data)``: what can be
    measured only when it is trained, and belongs to its weights.
    """
    if finish := getattr(config.objective, "finish", None):
        finish(network, data)
    save_weights(out, network, config, card)
    for path in checkpoints(out):
        path.unlink()


def _keep(out: Path, state: TrainState, keep: int) -> None:
    """Write a checkpoint of ``state`` and delete all but the last ``keep``."""
    save_checkpoint(_checkpoint_of(out, state.step), state)
    for old in checkpoints(out)[:-keep]:
        old.unlink()


def _newest_whole(out: Path) -> Path:
    found = checkpoints(out)
    for path in reversed(found):
        try:
            if read_header(path).run:
                return path
        except ValueError:
            continue  # cut short by a full disk or a hard stop; the one before is whole
    raise FileNotFoundError(
        f"{run_folder(out)} has no whole checkpoint ({len(found)} found): start without resume."
    )


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _agreed(stop: bool, state: TrainState) -> bool:
    """Whether any process was told to stop, so that all end after the same step."""
    if not torch.distributed.is_initialized():
        return stop
    told = torch.tensor(float(stop), device=next(state.model.parameters()).device)
    torch.distributed.all_reduce(told)
    return bool(told)


class _Rows:
    """Metrics of a run: a CSV, and TensorBoard where it is installed.

    A step is written when the next one comes: on a GPU its numbers are known by then, and nobody waits.
    """

    COLUMNS = ("step", "loss", "lr", "grad_norm", "images_per_second")

    def __init__(self, folder: Path, start: Path | None):
        self._waiting, self._file, self._board = None, None, None
        if not _is_main():
            return
        path, kept = folder / "metrics.csv", []
        if start is not None and path.exists():  # what came after the checkpoint will come again
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                kept = [
                    r for r in csv.reader(file) if r and r[0].isdecimal() and int(r[0]) <= _step_of(start)
                ]
        self._file = path.open("w", newline="", encoding="utf-8", buffering=1)
        self._csv = csv.writer(self._file, lineterminator="\n")
        self._csv.writerows([self.COLUMNS, *kept])
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / "tensorboard")
        except (ImportError, AttributeError):  # not installed, or together with a TensorFlow it does not fit
            self._board = None

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *error) -> None:
        self._write_waiting()
        for open_file in (self._file, self._board):
            if open_file is not None:
                open_file.close()

    def write(self, state: TrainState) -> None:
        """Note a step."""
        self._write_waiting()
        self._waiting = state

    def _write_waiting(self) -> None:
        state, self._waiting = self._waiting, None
        if state is None:
            return
        values = {name: getattr(state, name) for name in self.COLUMNS[1:]}
        self._csv.writerow([state.step, *(f"{value:.6g}" for value in values.values())])
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, state.step)


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
