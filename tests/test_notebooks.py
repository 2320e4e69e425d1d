"""The shape of the notebooks, and a check that the strict comparison catches planted faults."""

import base64
import copy
import io
import itertools
import os
import re
import statistics
import subprocess
import sys

import nbformat
import numpy as np
import processors
import pytest
from matplotlib.figure import Figure
from notebook_tools import (
    ROOT,
    TRAINED,
    WIDGET_VIEW,
    all_notebooks,
    normalise,
    numbers_agree,
    picture_difference,
    sections,
)
from PIL import Image

from oasis_helpers import plots

ALL = {path.stem: nbformat.read(path, as_version=4) for path in all_notebooks()}


def _code(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def _text(notebook):
    return [c for c in notebook.cells if c.cell_type == "markdown"]


def _lines(cell):
    return len([line for line in cell.source.splitlines() if line.strip()])


def test_the_series_is_complete():
    assert list(ALL) == [
        "01_data_exploration",
        "02_forward_noising",
        "03_unet",
        "04_gpu_training",
        "05_reverse_sampling",
        "05b_editing",
        "06_evaluation",
        "07_guidance",
        "08_stable_diffusion",
        "10_break_it",
    ]


@pytest.mark.parametrize("name", ALL)
def test_rhythm(name, capsys):
    notebook = ALL[name]
    code, text = _code(notebook), _text(notebook)
    lines = [_lines(c) for c in code]
    words = sum(len(c.source.split()) for c in text) / sum(lines)
    size = (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size / 1e6
    short = sum(n <= 10 for n in lines) / len(lines)
    with capsys.disabled():
        print(
            f"\n{name}: {len(code)} code and {len(text)} text cells; "
            f"code lines mean {statistics.mean(lines):.1f} "
            f"median {statistics.median(lines):.0f} most {max(lines)}; {short:.0%} short; "
            f"{words:.1f} words a code line; {size:.2f} MB"
        )
    assert 30 <= len(code) + len(text) <= 80
    assert statistics.mean(lines) <= 9
    assert statistics.median(lines) <= 9
    assert max(lines) <= 30
    assert short >= 0.7
    assert 0.95 <= len(text) / len(code) <= 1.7
    assert size < 2.5


@pytest.mark.parametrize("name", ALL)
def test_outputs_are_stored_whole(name):
    for number, cell in enumerate(_code(ALL[name]), 1):
        assert cell.execution_count == number, "not run from top to bottom: make notebooks"
        tags = cell.metadata.get("tags", [])
        assert set(tags) <= {"raises-exception", TRAINED}, "no cell is skipped or left uncompared"
        for output in cell.outputs:
            assert output.output_type != "error" or "raises-exception" in tags
            assert output.get("name") != "stderr", output.get("text")


@pytest.mark.parametrize("name", ALL)
def test_outputs_are_canonical(name):
    again = normalise(copy.deepcopy(ALL[name]))
    assert nbformat.writes(again) == nbformat.writes(ALL[name])
    whole = nbformat.writes(ALL[name])
    assert WIDGET_VIEW not in whole
    assert "widgets" not in ALL[name].metadata
    assert not re.search(r"<[^>\n]* at 0x[0-9a-f]+>", whole)


@pytest.mark.parametrize("name", ALL)
def test_every_picture_has_words(name):
    found = [o for c in _code(ALL[name]) for o in c.outputs if "image/png" in o.get("data", {})]
    assert len(found) >= 5
    for output in found:
        alt = output.metadata.get("image/png", {}).get("alt", "")
        assert len(alt) >= 20, output.data.get("text/plain")


@pytest.mark.parametrize("name", ALL)
def test_it_teaches_as_promised(name):
    notebook = ALL[name]
    text = "\n".join(c.source for c in _text(notebook))
    number = name.split("_")[0].lstrip("0")
    assert notebook.cells[0].source.startswith(f"# {number} · ")
    for heading in ("Break it", "Summary", "Why these choices", "References"):
        assert re.search(rf"^## .*{heading}", text, re.M), heading
    assert "**Try it" in text
    code = "\n".join(c.source for c in _code(notebook))
    names = re.findall(r"^(\w+) = widgets\.Live\(", code, re.M)
    assert names
    assert code.count("Live(") == len(names)
    for live in names:  # what is shown under test is driven
        assert re.search(rf"^{live}$", code, re.M), f"{live} is never shown"
    assert not re.search(r"\b(plt|pyplot|clear_output|interact|\.cuda\(\))", code)


PLUMBING = re.compile(r"OASIS_TEST|\.check\(\)|fmt: (skip|off)|noqa|set_num_threads|needs_whole_cases")


@pytest.mark.parametrize("name", ALL)
def test_it_fills_an_hour_and_shows_no_plumbing(name, capsys):
    found = sections(ALL[name])
    main = [section for section in found if section.main]
    words, lines = sum(s.words for s in main), sum(s.lines for s in main)
    with capsys.disabled():
        told = ", ".join(f"{s.heading} {s.minutes}" for s in found)
        print(f"\n{name}: {words} words and {lines} code lines in {sum(s.minutes for s in main)} min: {told}")
    assert 1500 <= words <= 1900
    assert lines <= 200
    whole = "\n".join(cell.source for cell in ALL[name].cells)
    for section in main[1:]:
        assert f"## {section.heading} · {section.minutes} min" in whole
    assert f"**{sum(s.minutes for s in main)} minutes**" in ALL[name].cells[0].source
    assert not PLUMBING.search(whole), PLUMBING.search(whole)


def _glossary():
    """Terms and the anchor of each."""
    text = (ROOT / "notebooks" / "GLOSSARY.md").read_text(encoding="utf-8")
    return re.findall(r'<a id="([\w-]+)"></a>', text), text


@pytest.mark.parametrize("name", ALL)
def test_terms_are_linked_to_the_glossary(name):
    anchors, _ = _glossary()
    assert len(anchors) == len(set(anchors))
    text = "\n".join(c.source for c in _text(ALL[name]))
    text = re.sub(r"^#+ .*$", "", text, flags=re.M)  # a heading has no links
    links = re.findall(r"\[([^\]]+)\]\(GLOSSARY\.md#([\w-]+)\)", text)
    assert len(links) >= 8
    assert [anchor for _, anchor in links if anchor not in anchors] == []
    assert len({anchor for _, anchor in links}) == len(links), "a term is linked once, where it comes first"
    for word, anchor in links:
        before = text[: text.index(f"[{word}](GLOSSARY.md#{anchor})")]
        assert not re.search(rf"\b{re.escape(word)}\b", before), f"{word} comes before its link"


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_left_to_be_written(name):
    cells = ALL[name].cells
    for cell, following in zip(cells, [*cells[1:], None]):
        if cell.cell_type != "markdown":
            continue
        assert not re.search(r"XXX|TODO|FIXME|@@", cell.source), cell.source[:80]
        _, *sections = re.split(r"^#+ (.*)$", cell.source, flags=re.M)
        for heading, body in zip(sections[::2], sections[1::2]):
            last = body is sections[-1]
            assert body.strip() or (last and following and following.cell_type == "code"), heading


@pytest.mark.parametrize("name", ALL)
def test_every_equation_is_followed_by_code(name):
    cells = ALL[name].cells
    for number, cell in enumerate(cells):
        if cell.cell_type == "markdown" and "$$" in cell.source:
            following = cells[number + 1 : number + 4]
            assert any(c.cell_type == "code" for c in following), cell.source[:80]


# ---- are faults caught? ---------------------------------------------------------------------

SOUND = """
import ipywidgets, numpy as np
from matplotlib.figure import Figure
from oasis_helpers import plots, widgets
rng = np.random.default_rng(0)
print(round(float(rng.normal()), 3))
#---
figure = plots.lines({"loss": (range(50), 1 / np.arange(1, 51))}, "step", "loss", title="loss")
plots.show(figure, alt="a curve that falls")
#---
image = np.outer(np.arange(8), np.arange(8)) / 49
figure = Figure(figsize=(2, 2)); axis = figure.subplots(); axis.imshow(image, cmap="gray")
plots.show(figure, alt="a grey ramp")
#---
def draw(t):
    figure = Figure(figsize=(2, 1)); figure.text(0.1, 0.4, f"t = {t}", fontsize=20)
    return figure
live = widgets.Live(draw, "a number", [{"t": 0}], t=ipywidgets.IntSlider(3, 0, 9))
live
#---
print("the time is", live.values["t"])
#---
import os
blown_up = float(os.environ.get("OASIS_TEST_ROUNDING", 1))  # what another processor and training make of 1
print(f"loss {0.314 * blown_up:.3f} after 150 steps")
#---
figure = plots.lines({"v": (range(50), blown_up / np.arange(1, 51))}, "step", "loss", title="trained")
plots.show(figure, alt="a curve that falls fast")
#---
errors = {"always the mean": 2.62, "by slice": 0.418, "by subject": 2.42}
plots.show(plots.bars(errors, "percentage points"), alt="three bars with their values")
"""
FROM_TRAINING = (5, 6)  # the cells of it with the tag

# name: what is changed into what, and the cell that must fail for it
FAULTS = {
    "another seed": ("default_rng(0)", "default_rng(1)", 0),
    "one letter of a title": ('title="loss"', 'title="lost"', 1),
    "a dropped figure": ('plots.show(figure, alt="a grey ramp")', "", 2),
    "a film strip of another moment": ('[{"t": 0}]', '[{"t": 8}]', 3),
    "an error at one end of the slider": (
        "    figure = Figure(figsize=(2, 1))",
        "    assert t < 9\n    figure = Figure(figsize=(2, 1))",
        3,
    ),
    "a curve moved": ("1 / np.arange(1, 51)", "1.05 / np.arange(1, 51)", 1),
    "a changed colour map": ('cmap="gray"', 'cmap="viridis"', 2),
    "a control that shows one picture at both ends": ('f"t = {t}"', 'f"t = {t % 9}"', 3),
    "a loss a fifth higher": ("{0.314 *", "{0.377 *", 5),
    "a word beside a loss": ('f"loss {', 'f"lost {', 5),
    "another curve of training": ("blown_up / np.arange(1, 51))", "blown_up * np.linspace(1, 0, 50))", 6),
    "a figure of training dropped": ('plots.show(figure, alt="a curve that falls fast")', "", 6),
    "one digit of a bar's label": ('"by slice": 0.418', '"by slice": 0.417', 7),
}
# Faults of different cells share a notebook: in which each comes.
ROUNDS = [[], [], []]
for _name, (_, _, _cell) in FAULTS.items():
    next(r for r in ROUNDS if _cell not in [FAULTS[other][2] for other in r]).append(_name)


def _notebook(source):
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(part.strip()) for part in source.split("#---")]
    for number in FROM_TRAINING:
        notebook.cells[number].metadata["tags"] = [TRAINED]
    return notebook


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The sound notebook with its outputs, in a folder that has our conftest."""
    from notebook_tools import execute

    folder = tmp_path_factory.mktemp("faults")
    path = folder / "sound.ipynb"
    nbformat.write(_notebook(SOUND), path)
    execute(path)
    return nbformat.read(path, as_version=4)


# A machine so busy that each message of a kernel comes after a minute: nbval alone waits 5 seconds for it.
LATE_MESSAGES = """
from queue import Empty
from nbval.plugin import IPyNbFile

at_once = IPyNbFile.get_kernel_message

def after_a_minute(self, timeout=None, stream="iopub"):
    if timeout < 60:
        raise Empty
    return at_once(self, timeout, stream)

IPyNbFile.get_kernel_message = after_a_minute
"""


def _nbval(folder, **environment):
    (folder / "late_messages.py").write_text(LATE_MESSAGES)
    environment["PYTHONPATH"] = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "--nbval-current-env",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    command += [
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(ROOT),
        "-p",
        "conftest",
        "-p",
        "late_messages",
    ]
    command += [str(folder)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_planted_faults_are_caught(stored, tmp_path):
    nbformat.write(stored, tmp_path / "sound.ipynb")
    for number, names in enumerate(ROUNDS):
        faulty = copy.deepcopy(stored)
        for old, new, _ in (FAULTS[name] for name in names):
            assert SOUND.count(old) == 1
            for cell in faulty.cells:
                cell.source = cell.source.replace(old, new)
        nbformat.write(faulty, tmp_path / f"round{number}.ipynb")
    result = _nbval(tmp_path)
    failed = set(re.findall(r"FAILED \S*?(\w+)\.ipynb::Cell (\d+)", result.stdout))
    missed = [
        name
        for number, names in enumerate(ROUNDS)
        for name in names
        if (f"round{number}", str(FAULTS[name][2])) not in failed
    ]
    assert missed == [], result.stdout[-3000:]
    assert not [name for name, _ in failed if name == "sound"], result.stdout[-3000:]


def test_an_unchanged_run_is_an_empty_diff(stored, tmp_path):
    from notebook_tools import execute

    path = tmp_path / "sound.ipynb"
    nbformat.write(stored, path)
    before = path.read_bytes()
    execute(path)
    assert path.read_bytes() == before


def _pixels(figure):
    return np.array(Image.open(io.BytesIO(plots.png(figure))).convert("RGB"))


def _difference(a, b):
    buffers = io.BytesIO(), io.BytesIO()
    for pixels, buffer in zip((a, b), buffers):
        Image.fromarray(pixels).save(buffer, "PNG")
    return picture_difference(*(base64.b64encode(buffer.getvalue()).decode() for buffer in buffers))


@pytest.mark.parametrize("move", [(0, 1), (-1, 0), (-1, -1)])
def test_a_label_drawn_one_pixel_beside_is_tolerated(move):
    figure = plots.bars({"always the mean": 2.62, "by slice": 0.418}, "percentage points")
    stored = _pixels(figure)
    for text in figure.axes[0].texts:
        text.set_visible(False)
    bare = _pixels(figure)
    label = np.roll(np.where((stored != bare).any(2, keepdims=True), stored, 255), move, (0, 1))
    moved = np.minimum(bare, label)
    assert (moved != stored).any(2).sum() > 40
    assert _difference(stored, moved) is None
    assert _difference(stored, bare)


def test_another_shade_of_one_pixel_is_tolerated():
    stored = _pixels(plots.bars({"always the mean": 2.62, "by slice": 0.418}, "percentage points"))
    changed = stored.copy()
    changed[40, 100] //= 2
    assert _difference(stored, changed) is None


@pytest.mark.parametrize("size", [7, 8, 10])
def test_every_digit_of_a_label_counts(size):
    labels = []
    for digit in range(10):
        figure = Figure(figsize=(0.7, 0.3))
        figure.text(0.2, 0.3, f"0.41{digit}", fontsize=size)
        labels.append(_pixels(figure))
    assert [_difference(a, a) for a in labels] == [None] * 10
    assert all(_difference(a, b) for a, b in itertools.combinations(labels, 2))


def test_rounding_blown_up_by_training_is_tolerated_where_it_may_occur(stored, tmp_path):
    nbformat.write(stored, tmp_path / "trained.ipynb")
    untagged = copy.deepcopy(stored)
    for cell in untagged.cells:
        cell.metadata = {}
    nbformat.write(untagged, tmp_path / "untagged.ipynb")
    result = _nbval(tmp_path, OASIS_TEST_ROUNDING="1.06")
    failed = set(re.findall(r"FAILED \S*?(\w+)\.ipynb::Cell (\d+)", result.stdout))
    assert failed == {("untagged", str(number)) for number in FROM_TRAINING}, result.stdout[-3000:]


@pytest.mark.parametrize(
    ("fresh", "agrees"),
    [
        ("step 100: loss 0.314, KID −1.02e-3", True),
        ("step  100:  loss 0.330, KID −1.1e-3", True),
        ("step 100: loss 0.37, KID −1.02e-3", False),
        ("step 150: loss 0.314, KID −1.02e-3", False),
        ("step 100: lost 0.314, KID −1.02e-3", False),
        ("step 100: loss 0.314", False),
    ],
)
def test_numbers_of_training(fresh, agrees):
    assert numbers_agree("step 100: loss 0.314, KID −1.02e-3", fresh) == agrees


# ---- other processors -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "cells"),
    [
        ("33 passed in 40.12s", (33, 0)),
        ("2 failed, 33 passed, 1 warning in 40.12s", (33, 2)),
        ("1 error in 3.20s", (0, 1)),
    ],
)
def test_cells_are_counted(last, cells):
    assert processors.counted(f"FAILED notebooks/01.ipynb::Cell 7\n{last}\n") == cells


@pytest.mark.parametrize("passes", [True, False])
def test_one_failure_on_one_processor_is_a_failure(passes, monkeypatch, capsys):
    def run(notebook, processor):
        return f"of {processor}", passes or (processor, notebook.stem) != ("AVX2", "03_unet")

    monkeypatch.setattr(processors, "run", run)
    monkeypatch.setattr(processors, "capability", str.upper)
    assert bool(processors.main()) == (not passes)
    table = capsys.readouterr().out.rpartition("\n\n")[2]
    assert "| SSE 4.1 (SSE 4.1) | AVX2 (AVX2) | this one (THIS ONE) |" in table
    assert table.count("| of AVX2 |") == len(ALL)


def test_a_processor_that_has_no_more_than_avx2_runs_the_notebooks_once(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(
        processors, "run", lambda notebook, processor: (ran.append(processor) or processor, True)
    )
    monkeypatch.setattr(processors, "capability", lambda name: "DEFAULT" if name == "SSE 4.1" else "AVX2")
    assert not processors.main()
    assert "| AVX2 (AVX2) | this one (AVX2) | this one, two threads (AVX2) |" in capsys.readouterr().out
    assert set(ran) == {"SSE 4.1", "AVX2", "this one, two threads"}
