"""Run notebooks, store their outputs in one canonical form, and compare pictures.

``python tests/notebook_tools.py [NOTEBOOK …]`` executes the notebooks (default: all) and writes
the outputs back. An unchanged notebook run again is an empty diff. It is the only way in which
the committed outputs are made; ``make notebooks`` calls it.
"""

from __future__ import annotations

import base64
import copy
import io
import itertools
import math
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from PIL import Image
from scipy.ndimage import grey_closing, uniform_filter

from oasis_helpers.widgets import DRIVE

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
CELL_TIMEOUT = 600  # seconds; a dead kernel would otherwise hold the run for long
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

# What means of 2×2 and of 4×4 pixels (0–1) may differ by, where a window of 8×8 may also have moved by one
# pixel, as text does that another build of the font library draws. The small size catches strokes, the large
# one shades: one changed digit, 7 to 10 points high, differs by more in one of them.
TOLERANCES = {2: 0.15, 4: 0.1}
WINDOW = 8  # about a letter: what is moved is moved as a whole
RMS_TOLERANCE = 0.02  # of means over 4×4 pixels, everywhere together

TRAINED = "trained"  # tag of cells whose figures hang on training in the notebook: see conftest.py
TRAINED_RMS, TRAINED_RELATIVE, TRAINED_ABSOLUTE = 0.05, 0.10, 0.02


def all_notebooks() -> list[Path]:
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def _pixels(png: str) -> np.ndarray:
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    return np.asarray(image, dtype=np.float32) / 255


def _means(pixels: np.ndarray, size: int) -> np.ndarray:
    return uniform_filter(pixels, (size, size, 1))


def _largest(a: np.ndarray, b: np.ndarray, size: int) -> float:
    """The largest difference of means that no move of b by one pixel explains.

    A pixel of a is explained if it lies in some window that is as in b, at its place or one pixel beside it.
    """
    least = np.inf
    for move in itertools.product((0, -1, 1), repeat=2):
        difference = np.abs(_means(a - np.roll(b, move, (0, 1)), size)).max(2)
        least = np.minimum(least, grey_closing(difference, (WINDOW, WINDOW)))
    return float(least.max())


def picture_difference(stored: str, fresh: str, trained: bool = False) -> str | None:
    """What differs between two base64 PNGs beyond the tolerances, or None."""
    a, b = _pixels(stored), _pixels(fresh)
    if a.shape != b.shape:
        return f"size {b.shape[1]}×{b.shape[0]} instead of {a.shape[1]}×{a.shape[0]} pixels"
    rms, most_rms = float(np.sqrt((_means(a - b, 4) ** 2).mean())), TRAINED_RMS if trained else RMS_TOLERANCE
    if rms > most_rms:
        return f"rms {rms:.3f} (at most {most_rms})"
    for size, most in {} if trained else TOLERANCES.items():
        if np.abs(_means(a - b, size)).max() <= most:
            continue  # nothing was moved: the usual case, and a quick one
        if (largest := max(_largest(a, b, size), _largest(b, a, size))) > most:
            return f"{largest:.3f} in {size}×{size} pixels (at most {most})"
    return None


_NUMBER = re.compile(r"[-−]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def numbers_agree(stored: str, fresh: str) -> bool:
    """The same words, and numbers that differ by no more than training on another processor explains."""
    if _NUMBER.sub("#", stored).split() != _NUMBER.sub("#", fresh).split():
        return False
    pairs = zip(_NUMBER.findall(stored), _NUMBER.findall(fresh))
    return all(
        math.isclose(
            *(float(n.replace("−", "-")) for n in pair), rel_tol=TRAINED_RELATIVE, abs_tol=TRAINED_ABSOLUTE
        )
        for pair in pairs
    )


def with_stored_numbers(fresh: list, stored: list) -> list:
    """The fresh outputs, with each text that agrees with the stored one in the sense above replaced by it."""
    outputs = copy.deepcopy(fresh)
    for new, old in zip(outputs, stored):
        texts = [(new, old, "text")]
        texts += [(new.get("data", {}), old.get("data", {}), kind) for kind in ("text/plain", "text/html")]
        for ours, theirs, kind in texts:
            if kind in ours and kind in theirs and numbers_agree(theirs[kind], ours[kind]):
                ours[kind] = theirs[kind]
    return outputs


def pictures(outputs: list) -> list[str]:
    """The PNGs of a cell's outputs, base64, in order."""
    return [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]


# ---- how long a notebook is -----------------------------------------------------------------

WORDS_A_MINUTE, LINES_A_MINUTE = 100, 8  # of prose that teaches, and of code that is read and run
BESIDE = ("Exercises", "Quiz", "References", "Appendix")  # sections that are not the main path
_HEADING = re.compile(r"^## (.+?)(?: · (\d+) min)?$", re.M)


@dataclass
class Section:
    """A part of a notebook under a heading of the second order: how much there is to read."""

    heading: str
    words: int = 0
    lines: int = 0

    @property
    def minutes(self) -> int:
        return max(1, round(self.words / WORDS_A_MINUTE + self.lines / LINES_A_MINUTE))

    @property
    def main(self) -> bool:
        return not self.heading.startswith(BESIDE)


def sections(notebook) -> list[Section]:
    """The sections in order; what stands before the first heading has the name "start"."""
    found = [Section("start")]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            found[-1].lines += sum(bool(line.strip()) for line in cell.source.splitlines())
            continue
        before, *parts = _HEADING.split(cell.source)
        found[-1].words += len(before.split())
        for heading, _, body in zip(parts[::3], parts[1::3], parts[2::3]):
            found.append(Section(heading))
            found[-1].words += len(body.split())
    return found


def _write_minutes(notebook) -> None:
    """Headings that tell minutes tell how many the section takes; "**N minutes**" is the main path's sum."""
    told = {section.heading: section.minutes for section in sections(notebook)}
    whole = sum(section.minutes for section in sections(notebook) if section.main)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _HEADING.sub(
                lambda found: f"## {found[1]} · {told[found[1]]} min" if found[2] else found[0], cell.source
            )
    if notebook.cells:
        first = notebook.cells[0]
        first.source = re.sub(r"\*\*\d+ minutes\*\*", f"**{whole} minutes**", first.source)


# ---- one form for what is stored ---------------------------------------------------------------


def _merge_streams(outputs: list) -> list:
    merged = []
    for output in outputs:
        if (
            merged
            and output.output_type == "stream" == merged[-1].output_type
            and output.name == merged[-1].name
        ):
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def normalise(notebook, previous=None):
    """Drop what changes from run to run: widget state, model ids, timing, versions, cell ids. Tell minutes.

    A picture that equals the previous one within the tolerances keeps the previous bytes.
    """
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    _write_minutes(notebook)
    count = 0
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:03d}"
        cell.metadata = nbformat.from_dict({"tags": cell.metadata.tags} if cell.metadata.get("tags") else {})
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = _merge_streams(cell.outputs)
        old = previous.cells[number] if previous and number < len(previous.cells) else None
        old_pictures = iter(pictures(old.outputs) if old is not None and old.cell_type == "code" else [])
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if "data" not in output:
                continue
            output.data.pop(WIDGET_VIEW, None)
            if "image/png" in output.data:
                fresh = output.data["image/png"].strip()
                stored = next(old_pictures, None)
                keep = stored is not None and picture_difference(stored, fresh) is None
                output.data["image/png"] = stored if keep else fresh
    return notebook


def kernel_environment() -> dict[str, str]:
    """Environment of a notebook under test: one thread unless more are asked for, controls are moved before
    they are shown, phantoms, no network."""
    env = {k: v for k, v in os.environ.items() if k != "OASIS_ROOT"}
    return env | {
        "OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", "1"),
        "OMP_WAIT_POLICY": "PASSIVE",
        DRIVE: "1",
        "HF_HUB_OFFLINE": "1",
    }


def execute(path: Path) -> float:
    """Run one notebook from a fresh kernel and store the outputs; returns seconds."""
    previous = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env=kernel_environment())
    seconds = time.perf_counter() - started
    for number, cell in enumerate(notebook.cells):
        expected = "raises-exception" in cell.metadata.get("tags", [])
        for output in cell.get("outputs", []):
            if output.output_type == "error" and not expected:  # of what is shown: it stops no cell
                raise RuntimeError(f"{path.name}, cell {number}: {output.ename}: {output.evalue}")
    text = nbformat.writes(normalise(notebook, previous)) + "\n"
    if text != path.read_text(encoding="utf-8"):
        path.write_text(text, encoding="utf-8")
    return seconds


def main(arguments: list[str]) -> int:
    paths = [Path(a) for a in arguments] or all_notebooks()
    with ThreadPoolExecutor(2) as pool:
        for path, seconds in zip(paths, pool.map(execute, paths)):
            print(f"{path.name}: {seconds:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
