"""Does Stable Diffusion in miniature do what a prompt says? Every slot of the grammar, asked for and read.

``python benchmarks/prompts.py ROOT OUT`` needs the large phantom set (``python -m oasis_helpers phantoms ROOT
--cases 302 35 17``); the reader of ``reader.py`` is trained into the folder OUT the first time. Two minutes
on a GPU, an hour on two cores. 300 unseen slices say what is asked for: all that is true of the slice in one
prompt. What comes is read, and beside it stands what the reader reads off the very slices, after the
autoencoder, which is what a perfect generator of latents would reach. Guidance has its price: the KID of the
samples, by the features of ``judge.py`` at 64×64 and by the reader's at 128×128. ``--beside WEIGHTS`` asks
other weights the same, and takes the differences. Prints and stores the tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from judge import METHOD, SPACING, STEPS, judge_of, machine
from obedience import obedience
from reader import Reader, load_reader, reconstructed, unseen_heads
from runs import DEVICE
from torch import Tensor

from oasis_helpers.autoencoder import load_stable_diffusion
from oasis_helpers.data import Slices, load_factors, read_slices, to_unit_range
from oasis_helpers.evaluation import bootstrap, kid, kid_of
from oasis_helpers.phantoms import fresh_heads
from oasis_helpers.prompts import OPENERS, SLOTS, Slot, tokenize, truths
from oasis_helpers.sampling import guided, sample_images

RESULT = Path(__file__).with_name("prompts.json")
SCALES, BEST = (1, 2), 2
BATCH, ROUNDS = 100, 400


# ---- what is asked for ---------------------------------------------------------------------------


def _beyond(slot: Slot, values: Tensor) -> Tensor:
    """How far each value, (N,), lies outside the range of each word, negative inside: (N, words)."""
    low, high = torch.tensor(list(slot.words.values()), dtype=values.dtype).T
    return torch.maximum(low - values[:, None], values[:, None] - high)


def words_at(slot: Slot, values: Tensor) -> Tensor:
    """The place of the word that is true of each value, (N,), and −1 for values between two words."""
    beyond, place = _beyond(slot, values).min(1)
    return torch.where(beyond <= 0, place, -1)


def nearest_words(slot: Slot, values: Tensor) -> Tensor:
    """The place of the word whose range is nearest to each value, (N,)."""
    return _beyond(slot, values).argmin(1)


def nearest_numbers(slot: Slot, values: Tensor) -> Tensor:
    """The number that can be said of each value, (N,), NaN where none is near enough."""
    numbers = torch.tensor(slot.numbers, dtype=values.dtype)
    away, place = (values[:, None] - numbers).abs().min(1)
    return torch.where(away <= slot.step / 2 + 1e-9, numbers[place], torch.nan)


def said(slot: Slot, truth: float, number: bool) -> str:
    """How a prompt says it, in its first wording by a number or by a word; "" where it cannot be said so."""
    wording = next((w for w in slot.wordings if (w[0] == "#") == number), None)
    if wording is None:
        return ""
    value = torch.tensor([truth], dtype=torch.double)
    if number:
        nearest = nearest_numbers(slot, value)
        return wording[1:].format(slot.written(nearest.item())) if nearest.isfinite() else ""
    place = words_at(slot, value).item()
    return wording.format([*slot.words][place]) if place >= 0 else ""


def together(row: Tensor) -> str:
    """All that is true of a slice in one prompt: a number where it can be said, else a word."""
    parts = (said(slot, t, True) or said(slot, t, False) for slot, t in zip(SLOTS, row.tolist()))
    return ", ".join([OPENERS[0], *filter(None, parts)])


# ---- what came -----------------------------------------------------------------------------------


def draw_heads(denoise, between, texts: list[str], seed: int = 0) -> Tensor:
    """A head (N, 1, 256, 256) for each prompt, on the CPU."""
    found = []
    for number, first in enumerate(range(0, len(texts), BATCH)):
        part = texts[first : first + BATCH]
        how = {"method": METHOD, "steps": STEPS, "spacing": SPACING, "seed": 1000 * seed + number}
        latents = sample_images(denoise, len(part), y={"prompt": tokenize(part)}, **how)
        found.append(between.decode(latents).cpu())
    return torch.cat(found)


def with_intervals(figures: Callable[[Tensor], dict[str, float]], cases: list[int]) -> dict[str, float]:
    """What a function of rows finds in all of them, each with its interval (95 %, bootstrap by head)."""
    found, again = figures(torch.arange(len(cases))), []

    def once_more(rows: Tensor) -> float:  # all figures of the same heads at once
        again.append(figures(rows))
        return 0.0

    bootstrap(once_more, cases, rounds=ROUNDS)
    for name in [*found]:
        low, high = np.quantile([figure[name] for figure in again], (0.025, 0.975))
        found |= {f"{name}, low": low, f"{name}, high": high}
    return {name: round(float(value), 4) for name, value in found.items()} | {"asked": len(cases)}


def by_word(slot: Slot, asked: Tensor, read: Tensor, cases: list[int]) -> dict[str, float]:
    """The share whose word, read, is the one asked for: ``asked`` are places of words."""
    right = (nearest_words(slot, read) == asked).double()
    return with_intervals(lambda rows: {"right": float(right[rows].mean())}, cases)


def by_number(asked: Tensor, read: Tensor, cases: list[int]) -> dict[str, float]:
    """r, slope and mean error of what was read over the numbers asked for."""
    return with_intervals(lambda rows: obedience(asked[rows], read[rows]), cases)


def wishes(slot: Slot, truth: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What can be asked of a slot by "word" and by "number": in which rows, (N,) bool, and what, (N,)."""
    word = words_at(slot, truth)
    found = {"word": (word >= 0, word)}
    if slot.numbers:
        number = nearest_numbers(slot, truth)
        found["number"] = number.isfinite(), number
    return found


def compared(kind: str, slot: Slot, asked: Tensor, read: Tensor, cases: list[int]) -> dict[str, float]:
    """What came of wishes of one kind."""
    return by_word(slot, asked, read, cases) if kind == "word" else by_number(asked, read, cases)


def summary(known: Tensor, read: Tensor, cases: Tensor) -> dict[str, dict[str, dict]]:
    """Slot → "word" and "number" → what was found, of images read as (N, 6) that ``known`` was asked of."""
    found = {}
    for place, slot in enumerate(SLOTS):
        seen = read[:, place].double()
        found[slot.name] = {
            kind: compared(kind, slot, asked[rows], seen[rows], cases[rows].tolist())
            for kind, (rows, asked) in wishes(slot, known[:, place].double()).items()
        }
    return found


def more_right(known: Tensor, read: Tensor, other: Tensor, cases: Tensor) -> dict[str, dict]:
    """Slot → by how much the share whose word is right is larger in what was read than in the other."""
    found = {}
    for place, slot in enumerate(SLOTS):
        rows, asked = wishes(slot, known[:, place].double())["word"]
        right, others = (
            (nearest_words(slot, seen[rows, place].double()) == asked[rows]).double()
            for seen in (read, other)
        )
        gap = right - others
        found[slot.name] = with_intervals(
            lambda some, gap=gap: {"more right": float(gap[some].mean())}, cases[rows].tolist()
        )
    return found


class Distances:
    """KID to the fresh heads by two kinds of features."""

    def __init__(self, reader: Reader):
        self.reader, self.judge = reader, judge_of()
        fresh = read_slices(fresh_heads().test, 256)
        rows = torch.isin(fresh.case, torch.tensor(self.judge.real.reference.cases))
        features = reader.features(to_unit_range(fresh.images[rows]))
        self.mean, self.deviation = features.mean(0), features.std(0) + 1e-6
        self.cases, self.features = fresh.case[rows].tolist(), (features - self.mean) / self.deviation

    def __call__(self, images: Tensor, cases: list[int] | None = None) -> dict[str, float]:
        """By the segmenter's at 64×64 and the reader's at 128×128, with intervals by head."""
        cases = list(range(len(images))) if cases is None else cases
        found, heads = self.judge.distance(images, cases), (self.cases, cases)
        features = (self.reader.features(images) - self.mean) / self.deviation
        value, _ = kid(self.features, features, cases=heads)
        low, high = bootstrap(kid_of(self.features, features, cases=heads), *heads)
        sharp = {"KID 128": value, "KID 128, low": low, "KID 128, high": high}
        return {name: round(float(number), 4) for name, number in (found | sharp).items()}


# ---- the run -------------------------------------------------------------------------------------


def asked_slices() -> tuple[Slices, Tensor]:
    """Two slices of each unseen head, with masks, and what is true of them."""
    location = unseen_heads()
    found = read_slices(location.test, 256, masks=True)
    head = found.case.unique(return_inverse=True)[1]
    rows = (found.plane - 7 * head) % 16 == 0
    some = Slices(found.images[rows], found.case[rows], found.plane[rows], found.masks[rows])
    return some, truths(load_factors(location), some.case, some.plane)


def show(result: dict) -> None:
    """Print the tables."""
    print(result["machine"], "·", result["setting"])
    print("\n| together | slot | word right | r | slope | error |\n|---|---|---|---|---|---|")
    for name, slots in result["together"].items():
        for slot, row in slots.items():
            w, n = row["word"], row.get("number")
            cells = [f"{w['right']:.0%} ({w['right, low']:.0%} to {w['right, high']:.0%})"]
            cells += [
                f"{n[k]:.3f} ({n[f'{k}, low']:.3f} to {n[f'{k}, high']:.3f})" if n else ""
                for k in ("r", "slope", "error")
            ]
            print(f"| {name} | {slot} | " + " | ".join(cells) + " |")
    for name, slots in result.get("beside", {}).items():
        for slot, row in slots.items():
            more, low, high = (row[f"more right{end}"] for end in ("", ", low", ", high"))
            print(f"{name}: {slot} more often right by {more:+.0%} ({low:+.0%} to {high:+.0%})")
    for name, row in result["distances"].items():
        print(f"{name:40} KID {row['KID']:.3f}, at 128×128 {row['KID 128']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="folder of the large phantom set")
    parser.add_argument("out", type=Path, help="folder for the reader")
    parser.add_argument("--beside", type=Path, metavar="WEIGHTS", help="other weights, asked the same")
    args = parser.parse_args()
    denoise, between = load_stable_diffusion(device=DEVICE)
    reader, (slices, known) = load_reader(args.root, args.out, between), asked_slices()
    images, cases = to_unit_range(slices.images), slices.case
    through, distances = reconstructed(images, between), Distances(reader)
    print(f"{len(images)} slices are asked for", flush=True)
    result = {
        "machine": machine(),
        "setting": f"prompts for {len(images)} slices of {len(cases.unique())} unseen heads; {STEPS} "
        "DPM-Solver++ steps, not clipped; read by a ResNet-18 at 128×128; intervals 95 % by head",
        "together": {
            "slices": summary(known, reader(images), cases),
            "slices through the autoencoder": summary(known, reader(through), cases),
        },
        "distances": {
            "slices": distances(images, cases.tolist()),
            "slices through the autoencoder": distances(through, cases.tolist()),
        },
    }

    def stored() -> None:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")

    texts, seen = [together(row) for row in known], {}
    for scale in (0, *SCALES):
        way, name = guided(denoise, scale), f"s = {scale}"
        made = draw_heads(way, between, texts)
        seen[scale] = reader(made)
        result["together"][name] = summary(known, seen[scale], cases)
        result["distances"][name] = distances(made)
        print(name, result["distances"][name], flush=True)
        stored()
    if args.beside:
        other, _ = load_stable_diffusion(args.beside, device=DEVICE)
        others = reader(draw_heads(guided(other, BEST), between, texts))
        result["together"][f"s = {BEST}, {args.beside.stem}"] = summary(known, others, cases)
        result["beside"] = {f"s = {BEST}": more_right(known, seen[BEST], others, cases)}
    stored()
    show(result)


if __name__ == "__main__":
    main()
