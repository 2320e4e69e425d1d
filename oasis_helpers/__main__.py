"""Command line: ``python -m oasis_helpers lab|test|progress|course|phantoms|convert|check|train|…``."""

from __future__ import annotations

import argparse
import ast
import errno
import json
import os
import sys
import textwrap
from pathlib import Path

from tqdm import tqdm


def _lab(args: argparse.Namespace) -> int:
    from .checkout import open_lab

    return open_lab(args.port, browser=not args.headless)


def _test(args: argparse.Namespace) -> int:
    from .checkout import run_tests

    return run_tests()


def _progress(args: argparse.Namespace) -> int:
    from .exercises import exercises, passed

    done, before = passed(), ""
    for key, one in exercises().items():
        if (number := key.split(".")[0]) != before:
            print(f"notebook {number}")
            before = number
        print(f"  {'✓' if key in done else '·'} {key:6} {one.title} ({one.minutes} min)")
    print(f"{len(done & set(exercises()))} of {len(exercises())} exercises pass")
    return 0


def _course(args: argparse.Namespace) -> int:
    from .exercises.editions import make_editions

    out = make_editions(args.out)
    print(
        f"student, instructor and slides in {out}: begin with {out / 'slides' / '01_data_exploration.html'}"
    )
    return 0


def _phantoms(args: argparse.Namespace) -> int:
    from .intake.phantoms import make_phantoms, phantom_cache

    own = {key: getattr(args, key) for key in ("cases", "slices", "seed") if key in args}
    if args.out is None and own:
        named = ", ".join(f"--{key}" for key in own)
        raise ValueError(f"{named}: the default set has its own. Give a folder OUT for a set of yours.")
    location = make_phantoms(args.out or phantom_cache(), workers=args.workers, **own)
    print(f"{location} in {location.root}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from .intake.convert import convert

    report = convert(
        args.source, args.out, args.format, stripped=args.stripped, subjects=args.subjects,
        workers=args.workers, force=args.force, agree=args.agree, least_similarity=args.least_similarity,
    )  # fmt: skip
    print(report)
    return 0 if report.ok else 1


def _check(args: argparse.Namespace) -> int:
    from .intake.check import check_dataset

    report = check_dataset(args.root)
    print(report)
    return 0 if report.ok else 1


def _train(args: argparse.Namespace) -> int:
    from .data import OASISDataset, find_data
    from .training import PROFILES, pick_device, train_to

    config = _with_settings(PROFILES[args.profile], args.set)
    location = find_data(args.data)
    quiet = int(os.environ.get("RANK", 0)) > 0  # torchrun starts several; one talks
    device = pick_device()
    if not quiet:
        print(f"{location}; {args.profile} profile, {config.steps} steps on {device}", flush=True)
    config, data = _learned_from(config, location, args.autoencoder, device)
    if config.objective.kind == "denoiser" and config.objective.conditions and not quiet:
        print(f"told {', '.join(config.objective.conditions)}", flush=True)
    card = {"data": f"{location.kind}: {len(set(OASISDataset(location.train).case_ids))} cases"}
    states = train_to(args.out, config, data, resume=args.resume, every=args.every, device=device, card=card)
    with tqdm(total=config.steps, unit="step", disable=quiet) as bar:
        for state in states:
            # Only when the bar is drawn: to look at a loss is to wait for a GPU.
            if bar.update(state.step - bar.n):
                bar.set_postfix(loss=f"{state.loss:.4f}", img_s=f"{state.images_per_second:.0f}")
    if not quiet and Path(args.out).expanduser().exists():
        print(f"weights in {args.out}")
    return 0


def _learned_from(config, location, autoencoder: str | None, device):
    """The data for a configuration, and the configuration, which says what is known of them.

    That is the conditions that the data have, if any are wanted, or the autoencoder of the latents.
    """
    from .autoencoder import AUTOENCODER, FACTOR, load_autoencoder, load_latents
    from .conditions import load_conditioned
    from .data import load_slices
    from .training import LatentDenoising

    size = config.objective.image_size
    if isinstance(config.objective, LatentDenoising):
        between = load_autoencoder(autoencoder or AUTOENCODER, device)
        config = config.replace(autoencoder=between.sha256, in_channels=between.latent_channels)
        return config, load_latents(location, between, FACTOR * size)
    if autoencoder:
        raise ValueError("--autoencoder is for --profile latent: the other networks see pixels.")
    if not getattr(config.objective, "conditions", None):
        return config, load_slices(location.train, size)
    data = load_conditioned(location, size)
    return config.replace(conditions=data.conditions), data


def _with_settings(config, settings: list[str]):
    """``config`` with each ``key=value`` of ``--set`` in the place of the profile's."""
    known, changes = config.settings(), {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in known:
            raise ValueError(f"--set {setting}: give key=value with one of the keys {', '.join(known)}.")
        try:
            changes[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[key] = value  # a word, such as cosine
        if not _is_like(changes[key], known[key], optional=key == "min_snr_gamma"):
            raise ValueError(f"--set {setting}: {key} is now {known[key]!r}; give a value of the same kind.")
    return config.replace(**changes)


def _is_like(value, now, optional: bool) -> bool:
    if optional and (value is None or now is None):
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    if isinstance(now, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(now)


BATCH = 64  # images drawn at once


def _draw(args: argparse.Namespace, denoise, y=None):
    """As many samples as ``args`` name: the first batch from its seed, each next from one of its own.

    ``y``: conditions of one sample, (1, …) by name, which all get.
    """
    import torch

    from .sampling import sample
    from .seeds import generator

    counts = [min(BATCH, args.number - start) for start in range(0, args.number, BATCH)]
    steps = denoise.schedule.T if args.method == "ddpm" else args.steps
    images = []
    with tqdm(total=steps * len(counts), unit="step") as bar:
        for number, count in enumerate(counts):
            # The batch in the place of the seed: batch 1 of seed 0 is then not batch 0 of seed 1.
            seed = generator(number, args.seed).initial_seed()
            known = y and {name: v.expand(count, -1).to(denoise.device) for name, v in y.items()}
            for state in sample(denoise, count, method=args.method, steps=steps, seed=seed, y=known):  # noqa: B007
                bar.update()
            images.append(state.x.cpu())
    return torch.cat(images)


def _by_prompt(args: argparse.Namespace):
    """A guided denoiser of latents, the conditions of the phrase in ``args``, and the way to images."""
    from .autoencoder import LATENT, load_stable_diffusion
    from .prompts import tokenize
    from .sampling import guided
    from .training import pick_device

    y = {"prompt": tokenize(args.prompt)}
    denoise, autoencoder = load_stable_diffusion(args.weights or LATENT, device=pick_device())
    _check_drawing(args, denoise)
    return guided(denoise, args.guidance), y, lambda x: autoencoder.decode(x.to(denoise.device)).cpu()


def _denoiser(args: argparse.Namespace):
    """The denoiser that ``args`` name, once it is clear that samples can be drawn from it."""
    from .sampling import clipped
    from .training import WEIGHTS, load_weights, pick_device

    denoise = load_weights(args.weights or WEIGHTS, pick_device())
    if denoise.shape[0] != 1:
        shape = "×".join(map(str, denoise.shape))
        raise ValueError(f"{args.weights} makes latents of {shape}, not pictures: give sample a --prompt.")
    _check_drawing(args, denoise)
    return clipped(denoise)


def _check_drawing(args: argparse.Namespace, denoise) -> None:
    from .seeds import check_seed

    check_seed(args.seed)
    if args.number < 1:
        raise ValueError(f"--number {args.number}: ask for at least one.")
    if args.method != "ddpm" and not 1 <= args.steps <= denoise.schedule.T:
        raise ValueError(f"--steps {args.steps}: give 1 to {denoise.schedule.T}.")


def _new_file(path: Path) -> Path:
    """``path`` in a folder that is there and can be written to, or an error before any work is done."""
    if path.exists():
        raise FileExistsError(f"{path} exists. Give another --out: nothing is overwritten.")
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise NotADirectoryError(f"{path}: {parent} is a file, not a folder. Give another --out.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} cannot be written to. Give another --out.")
    return path


def _sample(args: argparse.Namespace) -> int:
    from .plots import grid

    out = Path(args.out).expanduser()
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {args.out}: the picture is a PNG; give a name that ends in .png.")
    if args.number is None:
        args.number = 16 if args.prompt is None else 1
    title, columns = "synthetic – not for diagnosis", min(8, args.number)
    if args.prompt is None:
        denoise = _denoiser(args)
        _new_file(out)
        images = _draw(args, denoise)
    else:
        denoise, y, decode = _by_prompt(args)
        _new_file(out)
        images, title = decode(_draw(args, denoise, y)), f"{args.prompt} · {title}"
    figure = grid(list(images), columns=columns, title=textwrap.fill(title, 20 * max(columns, 2)))
    figure.savefig(out, dpi=150)
    print(f"{args.number} samples in {out}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from . import evaluation, plots
    from .data import find_data
    from .training import WEIGHTS, pick_device, read_header

    if args.number < evaluation.LEAST:
        raise ValueError(f"--number {args.number}: give at least {evaluation.LEAST}.")
    out, judge = Path(args.out).expanduser(), Path(args.segmenter or evaluation.SEGMENTER)
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder: give a name for the two files, as {out / 'evaluation'}.")
    denoise, segmenter = _denoiser(args), evaluation.load_segmenter(judge, pick_device())
    table, picture = (_new_file(out.with_name(f"{out.name}.{ending}")) for ending in ("json", "png"))
    location = find_data(args.data)
    train, real = evaluation.load_split(location.train, segmenter), evaluation.load_real(location, segmenter)
    evaluation.check_real(real)
    images = _draw(args, denoise)
    found = evaluation.evaluate(images, train, real, segmenter)

    weights = Path(args.weights or WEIGHTS)
    steps = "" if args.method == "ddpm" else f"{args.steps} steps, "
    setting = (
        f"{weights.name}: {args.number} samples, {args.method}, {steps}seed {args.seed}; {location}; "
        f"compared with {len(set(real.reference.cases))} other heads"
    )
    notes = evaluation.notes(found, read_header(weights).card, location, read_header(judge).card)
    report = {"setting": setting, "notes": notes, "rows": found.rows}
    table.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    figure = plots.evaluation_panel(found.rows, found.anatomy, list(images[:16]), found.pairs, setting)
    picture.write_bytes(plots.png(figure))
    for name, row in found.rows.items():
        print(f"{name:<17} KID {row['KID']:8.3f}   95 %: {row['KID, low']:.3f} to {row['KID, high']:.3f}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"all figures in {table}, with pictures in {picture}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m oasis_helpers", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_course_commands(commands)
    _add_data_commands(commands)
    _add_network_commands(commands)
    return parser


def _add_course_commands(commands) -> None:
    p = commands.add_parser("lab", help="open the series in JupyterLab, as `make lab` does")
    p.add_argument("--port", type=int, default=8888, help="(default: %(default)s)")
    p.add_argument("--headless", action="store_true", help="open no browser")
    p.set_defaults(run=_lab)

    p = commands.add_parser("test", help="run all tests and notebooks, as `make test` does")
    p.set_defaults(run=_test)

    p = commands.add_parser("progress", help="which exercises have passed on this computer")
    p.set_defaults(run=_progress)

    p = commands.add_parser("course", help="make the student's and the instructor's edition, and slides")
    p.add_argument("out", help="new folder")
    p.set_defaults(run=_course)


def _add_data_commands(commands) -> None:
    p = commands.add_parser("phantoms", help="make phantom subjects in the layout of the OASIS course set")
    p.add_argument("out", nargs="?", help="new folder (without it: the default set, in the cache)")
    own = {"type": int, "default": argparse.SUPPRESS}
    p.add_argument(
        "--cases",
        nargs=3,
        metavar=("TRAIN", "VALIDATE", "TEST"),
        help="cases of each split (default: 36 6 6)",
        **own,
    )
    p.add_argument("--slices", help="planes per case, 1 to 32 (default: 32)", **own)
    p.add_argument("--seed", help="another seed, other subjects (default: 0)", **own)
    p.add_argument("--workers", type=int, help="processes (default: one per CPU)")
    p.set_defaults(run=_phantoms)

    p = commands.add_parser(
        "convert", help="bring your copy of OASIS, whatever its form, into the course set's layout"
    )
    p.add_argument(
        "source",
        help="course zip or folder, OASIS-1 disc archive, folder of discs, unpacked tree, neurite-oasis, or "
        "Kaggle's JPEGs (imagesoasis); any T1-weighted volume (NIfTI or Analyze) or a folder of them (BIDS, "
        "OASIS-2, OASIS-3, raw OASIS-1); or the word nilearn-oasis, which fetches maps of grey matter",
    )
    p.add_argument("out", help="new folder, or one where an earlier conversion goes on")
    p.add_argument(
        "--format",
        choices=("course", "oasis1", "neurite", "kaggle", "volumes"),
        help="instead of recognising it",
    )
    p.add_argument("--stripped", action="store_true", help="OASIS-1: the skull-stripped volume")
    p.add_argument("--subjects", help="OASIS's own table (CSV or .xlsx), for age, sex and CDR")
    p.add_argument("--agree", action="store_true", help="nilearn-oasis: you agree to OASIS's terms of use")
    p.add_argument(
        "--least-similarity",
        type=float,
        help="volumes: leave out what is less similar to the template after registration (default: 0.6)",
    )
    p.add_argument("--workers", type=int, help="threads (default: one per CPU)")
    p.add_argument("--force", action="store_true", help="overwrite what is in OUT")
    p.set_defaults(run=_convert)

    p = commands.add_parser("check", help="report what is missing, damaged or altered in a data set")
    p.add_argument("root", help="folder that holds keras_png_slices_train and its five sisters")
    p.set_defaults(run=_check)


def _add_network_commands(commands) -> None:
    p = commands.add_parser("train", help="train a network and write its weights")
    p.add_argument(
        "--profile",
        choices=("quick", "laptop", "guided", "full", "autoencoder", "latent"),
        default="quick",
        help="settings to start from (default: %(default)s)",
    )
    p.add_argument("--data", help="data set (default: $OASIS_ROOT, else phantoms)")
    p.add_argument("--autoencoder", help="for latent: file of the autoencoder (default: the one that ships)")
    p.add_argument(
        "--out", default="runs/weights.safetensors", help="file for the weights (default: %(default)s)"
    )
    p.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="instead of the profile's, as steps=1000",
    )
    p.add_argument("--every", type=int, default=500, help="steps between checkpoints (default: %(default)s)")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT.run")
    p.set_defaults(run=_train)

    p = commands.add_parser("sample", help="draw slices from weights into one picture")
    p.add_argument("--weights", help="file of weights (default: those that ship)")
    p.add_argument("--out", default="samples.png", help="PNG to write (default: %(default)s)")
    p.add_argument("--number", type=int, help="how many samples to draw (default: 16, for a prompt 1)")
    p.add_argument("--prompt", help="heads of 256×256 for a phrase, as 'marked atrophy, thin scalp'")
    p.add_argument(
        "--guidance",
        type=float,
        default=3.0,
        help="how much the prompt is exaggerated, 1 is not (default: 3)",
    )
    _add_drawing(p)
    p.set_defaults(run=_sample)

    p = commands.add_parser(
        "evaluate", help="judge weights by slices of other heads: a table (JSON) and a picture",
    )  # fmt: skip
    p.add_argument("weights", nargs="?", help="file of weights (default: those that ship)")
    p.add_argument("--data", help="data set (default: $OASIS_ROOT, else phantoms)")
    p.add_argument("--segmenter", help="file of a segmenter (default: the one that ships, made on phantoms)")
    p.add_argument(
        "--out", default="evaluation", help="files to write: OUT.json and OUT.png (default: %(default)s)"
    )
    p.add_argument(
        "--number",
        type=int,
        default=512,
        help="how many samples to draw, at least 100 (default: %(default)s)",
    )
    _add_drawing(p)
    p.set_defaults(run=_evaluate)


def _add_drawing(p: argparse.ArgumentParser) -> None:
    """How samples are drawn, for the commands that draw them."""
    p.add_argument(
        "--method",
        choices=("ddpm", "ddim", "dpm_solver", "heun"),
        default="dpm_solver",
        help="sampler (default: %(default)s)",
    )
    p.add_argument(
        "--steps", type=int, default=20, help="not for ddpm, which takes all (default: %(default)s)"
    )
    p.add_argument("--seed", type=int, default=0, help="another seed, other samples (default: %(default)s)")


_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def _said(error: Exception) -> str:
    """What an error says; what the system says of a file, with what to do."""
    if isinstance(error, OSError) and error.filename:
        if error.errno in _REFUSED:
            return (
                f"{error.filename} cannot be opened or made ({error.strerror}). Choose another folder, or "
                "change its permissions."
            )
        if error.errno == errno.ENOSPC:
            return f"{error.filename}: the disk is full. Make room, or choose a folder on another disk."
    return str(error)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a user's mistake is one line on stderr and exit code 1."""
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print("error:", " ".join(_said(error).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(stop.args[0] if stop.args else "stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
