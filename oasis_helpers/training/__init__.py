"""Training: a loop that knows no diffusion, what diffusion asks of it, the files of a run, and weights.

:func:`train` computes, :func:`train_to` adds the files of a run, :func:`load_weights` gives what came of it.
"""

from .config import PROFILES, TrainConfig, learning_rate, pick_device
from .loop import EMA, TrainState, autocast, draw_step, faster_precision, train
from .objective import Denoising, LatentDenoising, validation_loss
from .reading import teach_reading
from .run import checkpoints, run_folder, train_to
from .weights import (
    GUIDED,
    WEIGHTS,
    Header,
    fingerprint,
    load_network,
    load_weights,
    read_header,
    read_tensors,
    save,
    save_checkpoint,
    save_weights,
)

__all__ = [
    "EMA", "GUIDED", "PROFILES", "WEIGHTS", "Denoising", "Header", "LatentDenoising", "TrainConfig",
    "TrainState", "autocast", "checkpoints", "draw_step", "faster_precision", "fingerprint", "learning_rate",
    "load_network", "load_weights", "pick_device", "read_header", "read_tensors", "run_folder", "save",
    "save_checkpoint", "save_weights", "teach_reading", "train", "train_to", "validation_loss",
]  # fmt: skip
