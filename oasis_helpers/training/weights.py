"""One file format for all weights: safetensors, with what the network is and where it comes from beside it.

The metadata of a file holds its format, the ``kind`` of network, the ``settings`` it is built from, the
settings of its ``training``, and a ``card`` of what else should be known (data, fingerprint, hardware). A
checkpoint holds the moments of the optimiser as well. Files of format 1 are read too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..diffusion import Denoiser
from ..layout import replace_file
from .objective import Denoising, LatentDenoising

if TYPE_CHECKING:
    from .config import TrainConfig
    from .loop import EMA, TrainState

FORMAT = 2
WEIGHTS = Path(__file__).parents[1] / "weights" / "phantoms-64.safetensors"
GUIDED = WEIGHTS.with_name("guided-64.safetensors")
_DENOISERS = {c.kind: c for c in (Denoising, LatentDenoising)}
_NETWORK = ("base_channels", "channel_mult", "num_res_blocks", "attention_levels", "patch_size")


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    ``kind`` of network, its ``settings``, those of its ``training``, its ``card``, and the ``shapes`` of its
    tensors by name. A checkpoint also has the step, the updates of the average and the fingerprint of the
    data in ``run``.
    """

    kind: str
    settings: dict[str, Any]
    training: dict[str, Any]
    card: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    run: dict[str, Any] = field(default_factory=dict)


def fingerprint(data) -> str:
    """What tells one data set from another: how many images, and a digest of them.

    ``data``: a tensor, a ``TensorDataset``, or anything with a ``fingerprint`` of its own.
    """
    if known := getattr(data, "fingerprint", None):
        return known
    tensors = (data,) if isinstance(data, Tensor) else getattr(data, "tensors", ())
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy())
    return f"{len(data):,} images" + (f", sha256 {digest.hexdigest()[:16]}" if tensors else "")


# ---- writing -------------------------------------------------------------------------------------


def save(
    path: str | Path,
    tensors: dict[str, Tensor],
    kind: str,
    settings: dict[str, Any],
    *,
    training: dict[str, Any] | None = None,
    card: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    half: bool = False,
) -> None:
    """Write tensors and what they are to one file, atomically; the folder is made.

    ``card``: what JSON can hold. ``half`` stores float32 as float16, and the card says so.
    Raises ``TypeError`` for settings or a card that JSON cannot hold.
    """
    path = Path(path).expanduser()
    card = {**(card or {}), **({"stored": "float16"} if half else {})}
    metadata = {"format": str(FORMAT), "kind": kind}
    for name, part in (("settings", settings), ("training", training), ("card", card), ("run", run)):
        metadata[name] = json.dumps(part or {})
    kept = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    if half:
        kept = {name: t.half() if t.dtype == torch.float32 else t for name, t in kept.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: save_file(kept, temporary, metadata))


def save_weights(
    path: str | Path,
    network: nn.Module,
    config: TrainConfig,
    card: dict[str, Any] | None = None,
    *,
    half: bool = False,
) -> None:
    """Write a network with what is needed to build it and to know where it comes from: :func:`save`."""
    objective = config.objective
    save(
        path, network.state_dict(), objective.kind, objective.settings(), training=config.loop(), card=card,
        half=half,
    )  # fmt: skip


def save_checkpoint(path: str | Path, state: TrainState) -> None:
    """Everything needed to go on with a run, in one file, written atomically.

    Weights, EMA, both moments of AdamW, the step, the configuration and the fingerprint of the data; the
    random state needs no place, because step n's randomness comes from (seed, n). Raises
    ``FloatingPointError`` for a step whose loss was no number.
    """
    state.check()
    tensors = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in state.ema.model.state_dict().items()}
    for index, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in moments.items()}
    objective = state.config.objective
    run = {"step": state.step, "ema_updates": state.ema.updates, "data": state.data}
    save(path, tensors, objective.kind, objective.settings(), training=state.config.loop(), run=run)


# ---- reading -------------------------------------------------------------------------------------


def read_header(path: str | Path) -> Header:
    """What a file says of itself; ``FileNotFoundError``, or ``ValueError`` for one that is damaged."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Train it first, or give a file of save_weights or save_checkpoint."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return _header(metadata, shapes, path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}). Copy or train it again."
        ) from error
    except (json.JSONDecodeError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{path} has metadata that cannot be read ({error}). Copy or train it again."
        ) from error


def _header(metadata: dict[str, str], shapes: dict[str, tuple[int, ...]], path: Path) -> Header:
    number = metadata.get("format", "1")
    if not number.isdecimal() or int(number) > FORMAT:
        raise ValueError(f"{path} has format {number}, this version reads {FORMAT}: update oasis_helpers.")
    if int(number) == FORMAT:
        parts = {name: json.loads(metadata[name]) for name in ("settings", "training", "card", "run")}
        if not all(isinstance(part, dict) for part in parts.values()):
            raise TypeError("settings, training, card and run must be objects")
        return Header(metadata["kind"], shapes=shapes, **parts)
    if "config" in metadata:
        return _first_format(metadata, shapes)
    if "kind" in metadata:  # the first segmenters had no settings
        card = {k: v for k, v in metadata.items() if k != "kind"}
        return Header(metadata["kind"], {}, {}, card, shapes)
    raise ValueError(f"{path} holds no configuration: it was not written by save_weights.")


def _first_format(metadata: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> Header:
    """A file of format 1: one flat configuration, and the card's lines beside it."""
    flat = json.loads(metadata["config"])
    own = {f.name for f in fields(Denoising)}
    settings = {name: flat.pop(name) for name in [*flat] if name in own}
    settings["network"] = {name: flat.pop(name) for name in _NETWORK if name in flat}
    run = {name: int(metadata[name]) for name in ("step", "ema_updates") if "ema_updates" in metadata}
    card = {name: line for name, line in metadata.items() if name not in ("format", "config", *run)}
    return Header(Denoising.kind, settings, flat, card, shapes, run)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], Header]:
    """Tensors of a file, on the CPU, and what it says of itself; raises as :func:`read_header`."""
    header = read_header(path)
    try:
        return load_file(Path(path).expanduser()), header
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}). Copy or train it again."
        ) from error


def load_network(path: str | Path, make: Callable[[], nn.Module]) -> nn.Module:
    """The network that ``make`` builds, with the weights in a file, in eval mode on the CPU.

    It is built without memory first, and its shapes are compared with the file's: what a file asks for is
    not taken on trust. Raises ``ValueError`` where they differ or nothing can be built, and as
    :func:`read_header`.
    """
    shapes = read_header(path).shapes
    try:
        with torch.device("meta"):
            network = make()
    except (TypeError, ValueError, RuntimeError, KeyError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"{path} has settings that make no network ({error}): train it again.") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if wanted != shapes:
        odd = sorted(n for n in wanted.keys() | shapes.keys() if wanted.get(n) != shapes.get(n))
        raise ValueError(
            f"{path} holds weights of another architecture than its settings say: {odd[0]} is "
            f"{shapes.get(odd[0], 'not there')} and should be {wanted.get(odd[0], 'absent')}"
            f"{f' (and {len(odd) - 1} more)' if len(odd) > 1 else ''}."
        )
    network.to_empty(device="cpu").load_state_dict(read_tensors(path)[0])
    return network.eval()


def load_weights(path: str | Path = WEIGHTS, device: torch.device | str = "cpu") -> Denoiser:
    """The denoiser in a file of :func:`save_weights`, in eval mode.

    Without ``path``: the weights that ship, trained on 64×64 phantoms. ``read_header`` tells how they were
    trained. One of latents needs their autoencoder beside it: see
    :func:`~oasis_helpers.autoencoder.load_stable_diffusion`. Raises ``FileNotFoundError``, or ``ValueError``
    for a file that is damaged or of another kind.
    """
    header = read_header(path)
    if header.kind not in _DENOISERS:
        raise ValueError(f"{path} is of kind {header.kind!r}, not a denoiser.")
    if header.run:
        raise ValueError(f"{path} is a checkpoint: go on with its run (--resume), which writes the weights.")
    objective = _objective(path, header)
    return objective.denoiser(load_network(path, objective.make_network)).to(device).eval()


def _objective(path: str | Path, header: Header) -> Denoising:
    try:
        objective = _DENOISERS[header.kind].from_settings(header.settings)
        blocks = objective.network.get("num_res_blocks", 1) * len(objective.network.get("channel_mult", ()))
        layers = sum(getattr(c, "layers", 0) for c in objective.conditions.values())
        if blocks + layers > len(header.shapes):  # millions of empty blocks would take memory, too
            raise ValueError(f"{blocks + layers} blocks from {len(header.shapes)} tensors")
        return objective
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} has settings that this version cannot use ({error}): update oasis_helpers."
        ) from error


def load_checkpoint(
    path: str | Path,
    config: TrainConfig,
    data: str,
    model: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, TrainConfig]:
    """Restore all of a run from ``path``: the number of finished steps and the configuration in effect.

    ``data`` is the fingerprint of what the run goes on with. Raises ``ValueError`` for a file that is no
    checkpoint, or one of another configuration, of other data, or of more steps than are asked for.
    """
    tensors, header = read_tensors(path)
    if not header.run:
        raise ValueError(f"{path} holds weights only; resume needs a checkpoint of save_checkpoint.")
    if config.precision == "auto":
        config = replace(config, precision=header.training["precision"])
    check_same_run(path, header, config, data)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    try:
        model.load_state_dict(part("model."))
        ema.model.load_state_dict(part("ema."))
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds weights of another network ({str(error).splitlines()[0]})."
        ) from error
    ema.updates = header.run["ema_updates"]
    parameters, moments = [p for g in optimizer.param_groups for p in g["params"]], {}
    for name, tensor in part("optimizer.").items():
        index, key = name.split(".", 1)
        # Copied, because the file is mapped; the moments laid out in memory as their weights are.
        copied = tensor.clone() if key == "step" else torch.empty_like(parameters[int(index)]).copy_(tensor)
        moments.setdefault(int(index), {})[key] = copied
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return header.run["step"], config


# What may differ when a run goes on: how long it lasts, how a batch is divided, and in which precision.
_MAY_CHANGE = ("steps", "accumulate", "precision")


def check_same_run(path: str | Path, header: Header, config: TrainConfig, data: str) -> None:
    """``ValueError`` unless a run with ``config`` on ``data`` (a fingerprint) can go on from a checkpoint."""
    # A setting that came after the checkpoint had its default then.
    before = {f.name: f.default for f in fields(config.objective) if f.default is not MISSING}
    ours, theirs = (
        {**settings, **settings.pop("network", {}), **loop}
        for settings, loop in (
            (json.loads(json.dumps(config.objective.settings())), config.loop()),
            (before | header.settings, header.training),
        )
    )
    differing = ", ".join(
        f"{name} {theirs.get(name)} ≠ {ours.get(name)}"
        for name in {**ours, **theirs}
        if name not in _MAY_CHANGE and name in ours and name in theirs and theirs[name] != ours[name]
    )
    if differing:
        raise ValueError(f"{path} was trained otherwise ({differing}). Use its configuration, or start anew.")
    if header.run.get("data", data) != data:
        raise ValueError(
            f"{path} learned from other data ({header.run['data']}; here are {data}). "
            "Give that data, or start anew."
        )
    if header.run["step"] > config.steps:
        raise ValueError(
            f"{path} is at step {header.run['step']}: give steps of at least that, not {config.steps}."
        )
