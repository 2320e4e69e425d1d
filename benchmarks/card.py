"""Write what was measured into the tables of the weights' cards.

``python benchmarks/card.py`` after ``minutes.py``, ``samplers.py``, ``evaluation.py``, ``segmenter.py`` and
``obedience.py`` replaces the cells of the rows named here by what the JSON files say, and leaves all else as
it is. Tests compare the cards with the files.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from oasis_helpers.evaluation import SEGMENTER
from oasis_helpers.layout import write_file
from oasis_helpers.training import GUIDED, WEIGHTS, read_header

HERE = Path(__file__).parent
COLUMNS = ("weights that ship", "perfect generator", "mean of training", "noise")

# A row of the report's table → its figures, how each is multiplied and written.
REPORT = {
    "KID (95 % interval by head)": (("KID", "KID, low", "KID, high"), 1, "{:.3f} ({:.3f} to {:.3f})"),
    "FID (segmenter's features)": (("FID",), 1, "{:.1f}"),
    "precision, recall (neighbours in other heads)": (("precision", "recall"), 1, "{:.2f}, {:.2f}"),
    "density, coverage": (("density", "coverage"), 1, "{:.2f}, {:.2f}"),
    "MS-SSIM of pairs": (("MS-SSIM of pairs",), 1, "{:.3f}"),
    "nearer to training than the limit: pixels, features": (
        ("nearer to training, images", "nearer to training, features"), 100, "{:.1f} %, {:.1f} %",
    ),
    "Wasserstein distance (deviations): ventricles, symmetry": (
        ("anatomy: ventricles", "anatomy: symmetry"), 1, "{:.2f}, {:.2f}",
    ),
}  # fmt: skip


def recorded(name: str) -> dict:
    """What the benchmark ``name`` has stored."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def fill(text: str, rows: dict[str, Sequence[str]]) -> str:
    """Markdown with the cells of these table rows replaced, found by name and number of cells.

    Raises ``ValueError`` for a row that is not there.
    """
    lines, left = text.splitlines(), dict(rows)
    for number, line in enumerate(lines):
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if line.startswith("|") and len(left.get(name, ())) == len(cells):
            lines[number] = "| " + " | ".join([name, *left.pop(name)]) + " |"
    if left:
        raise ValueError(f"the card has no row {', '.join(map(repr, left))}.")
    return "\n".join(lines) + "\n"


def weights_rows() -> dict[str, list[str]]:
    """The rows of the card of the weights that ship."""
    minutes, samplers, report = recorded("minutes"), recorded("samplers"), recorded("evaluation")
    header, losses = read_header(WEIGHTS), report["loss by t"]
    steps, batch = header.training["steps"], header.training["batch_size"]
    longest, *shorter = reversed(minutes["runs"])
    rows = {
        "steps": [f"{steps:,} of {batch} slices, in {header.training['precision']}"],
        "time": [
            f"{longest} minutes' worth of steps on two cores: {minutes['steps per second']:.2f} a second, "
            "measured while nothing else ran"
        ],
        "hardware": [f"the run itself: {header.card['trained on']}, TF32 in the convolutions"],
        "the same profile for " + ", ".join(f"{m} minute{'s' * (m != '1')}" for m in shorter): [
            ", ".join(f"{minutes['runs'][m]['KID']:.3f}" for m in shorter)
        ],
        "a perfect generator: other fresh heads": [f"{samplers['perfect generator']['KID']:.3f}"],
    }
    for name in ("held out", "training"):
        rows[name] = [f"{loss:.4f}" for loss in (*losses[name], statistics.mean(losses[name]))]
    names = {("ddim", 20): "DDIM", ("dpm_solver", 10): "DPM-Solver++"}
    for row in samplers["rows"]:
        if name := names.get((row["method"], row["steps"])):
            title = f"this network, {row['samples']} samples, {name}, {row['steps']:,} steps"
            rows[title] = [f"{row['KID']:.3f}"]
    for name, (figures, factor, form) in REPORT.items():
        values = ([factor * report["rows"][column][figure] for figure in figures] for column in COLUMNS)
        rows[name] = [form.format(*found) for found in values]
    return rows


def segmenter_rows() -> dict[str, list[str]]:
    """The rows of the card of the segmenter."""
    result = recorded("segmenter")
    return {
        split: [f"{dice:.3f}" for dice in result[f"Dice, {split}"].values()] for split in ("validate", "test")
    }


def guided_rows() -> dict[str, list[str]]:
    """The rows of the card of the guided network."""
    rows = {}
    for name, row in recorded("obedience")["rows"].items():
        height, atrophy = row["height"], row["atrophy"]
        rows[name] = [
            f"{height['r']:.3f}, {height['slope']:.2f}, {height['error']:.2f}",
            f"{atrophy['r']:.3f}, {atrophy['slope']:.2f}, {atrophy['error']:.3f}",
            f"{row['head']['right']:.0%}",
            f"{row['KID']:.3f}",
            f"{row['spread']:.2f}",
            f"{row['calls a step']:.1f}",
        ]
    return rows


def main() -> None:
    cards = ((WEIGHTS, weights_rows()), (SEGMENTER, segmenter_rows()), (GUIDED, guided_rows()))
    for weights, rows in cards:
        card = weights.with_suffix(".md")
        write_file(card, fill(card.read_text(encoding="utf-8"), rows).encode())
        print(card.name)


if __name__ == "__main__":
    main()
