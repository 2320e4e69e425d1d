"""The editions of the course, made of its notebooks and exercises: for students, for a lecturer, and slides.

The notebooks as they stand, with stubs and outputs, are the one source. The *student* edition is without
outputs, so that nothing is given away before it is predicted. The *instructor* edition has solutions in the
place of stubs, what their checks say and the pictures they give, and for each exercise hints and the answers
to typical mistakes. *Slides* are a deck of reveal.js for each notebook, which works without a network.
"""

from __future__ import annotations

import base64
import copy
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from importlib.resources import files
from io import StringIO
from pathlib import Path

import nbformat
from nbformat.v4 import new_markdown_cell, new_output

from ..checkout import NOTEBOOKS, notebooks
from ..plots import png
from . import Exercise, exercises

LONGEST_CODE = 14  # lines that can be read from the last row; longer code is left to the notebook
PREDICTION = re.compile(r"^prediction = \.\.\..*$", re.M)

# nbconvert's page for reveal.js, without the scripts that it would fetch.
DECK = """
{%- extends 'index.html.j2' -%}
{%- block html_head_js -%}{%- endblock html_head_js -%}
{%- block html_head_css -%}<style>
.reveal .slides { text-align: left; }
.reveal .slides section { height: 100%; overflow-y: auto; }
.reveal h1, .reveal h2, .reveal h3 { text-transform: none; }
.jp-InputPrompt, .jp-OutputPrompt { display: none; }
.jp-RenderedImage img { max-height: 620px; width: auto; }
</style>{%- endblock html_head_css -%}
{%- block footer_js -%}
<script src="reveal.js/dist/reveal.js"></script>
<script src="reveal.js/plugin/notes/notes.js"></script>
<script>
Reveal.initialize({width: 1280, height: 720, center: false, hash: true, slideNumber: "c/t",
                   transition: "none", plugins: [RevealNotes]});
</script>
{%- endblock footer_js -%}
"""


def make_editions(out: str | Path) -> Path:
    """Write ``student``, ``instructor``, ``slides`` and the figures they show into the new folder ``out``.

    Links to code, which is not beside an edition, become words. Raises ``ValueError`` where ``out`` holds
    something, or where the notebooks do not lie beside the package.
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: give a new folder, nothing in it is replaced.")
    sources = notebooks()
    for edition, make in (("student", student), ("instructor", instructor)):
        (out / edition).mkdir(parents=True)
        for page in NOTEBOOKS.glob("*.md"):
            shutil.copy(page, out / edition)
        for source in sources:
            nbformat.write(make(_read(source)), out / edition / source.name)
    shutil.copytree(NOTEBOOKS.with_name("figures"), out / "figures", ignore=shutil.ignore_patterns("*.py"))
    _write_decks(sources, out / "slides")
    return out


def _read(path: Path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", cell.source)
    return notebook


# ---- for students ------------------------------------------------------------------------------


def student(notebook):
    """The notebook without outputs."""
    made = copy.deepcopy(notebook)
    for cell in made.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return made


# ---- for a lecturer ------------------------------------------------------------------------------


def exercise_of(cell) -> Exercise | None:
    """The exercise whose stub a cell holds."""
    found = re.search(r'^exercise\("([\w.]+)"\)\.check\(', cell.source, re.M)
    return exercises().get(found[1]) if found and cell.cell_type == "code" else None


def solved(source: str, one: Exercise) -> str:
    """The code of an exercise's cell with the solution in the place of the stub."""
    stub = re.compile(rf"^def {one.solution.__name__}\(.*?(?=^\S(?!.*:$)|\Z)", re.M | re.S)
    source = stub.sub(lambda _: one.source + "\n\n\n", source, count=1)
    return PREDICTION.sub(f"prediction = {one.prediction!r}", source)


def said_of(one: Exercise, answer: tuple) -> str:
    """What the check of an exercise says of an answer."""
    with redirect_stdout(StringIO()) as printed:
        one.check(*answer)
    return printed.getvalue()


def instructor(notebook):
    """The notebook with solutions, what their checks say, and notes."""
    made = copy.deepcopy(notebook)
    cells = []
    for cell in made.cells:
        cells.append(cell)
        if one := exercise_of(cell):
            cell.source = solved(cell.source, one)
            cell.outputs = [new_output("stream", name="stdout", text=said_of(one, one.answer))]
            if one.picture:
                data = {"image/png": base64.b64encode(png(one.picture(*one.answer))).decode()}
                cell.outputs.append(new_output("display_data", data=data))
            cells.append(new_markdown_cell(_notes(one)))
    made.cells = cells
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number:03d}"
    return made


def _notes(one: Exercise) -> str:
    hints = "\n".join(f"{number}. {hint}" for number, hint in enumerate(one.hints, 1))
    mistakes = "\n".join(f"- {said_of(one, answer).strip()}" for answer, _ in one.wrong)
    return (
        f"**For the lecturer** · {one.key} · {one.minutes} min · {one.kind}\n\n"
        f"Hints:\n\n{hints}\n\nWhat the check answers to typical mistakes:\n\n{mistakes}"
    )


# ---- slides --------------------------------------------------------------------------------------


def deck(notebook):
    """The notebook as slides: a section each from left to right, its cells below each other.

    Of a text the first paragraph of each cell, headings, lists, tables and equations are shown; the rest goes
    to the speaker's notes (key S). Code too long to be read from afar is left out, its output is not.
    Exercises, references and appendices are for the notebook.
    """
    made = copy.deepcopy(notebook)
    cells, section = [], ""
    for cell in made.cells:
        if exercise_of(cell):
            continue
        for part, kind in _slides_of(cell):
            if heading := re.match(r"##? (.+)", part.source):
                section = heading[1]
            if re.match(r"Exercises|References|Appendix", section):
                continue
            part.metadata["slideshow"] = {"slide_type": kind}
            cells.append(part)
    made.cells = cells
    return made


def _slides_of(cell) -> Iterator[tuple]:
    """The parts of a cell, each with its kind of slide."""
    if cell.cell_type == "code":
        if len(cell.source.splitlines()) > LONGEST_CODE:
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide_code"]
        outputs = any("image/png" in o.get("data", {}) for o in cell.outputs)
        yield cell, "subslide" if outputs else "fragment"
        return
    for text in re.split(r"^(?=##? )", cell.source, flags=re.M):
        if not text.strip():
            continue
        shown, told = [], []
        for block in re.split(r"\n\s*\n", text.strip()):
            structure = re.match(r"[#|$!>-]|\d+\. |\*\*|<details|- ", block) or "$$" in block
            prose = [b for b in shown if not b.startswith("#")]
            (shown if structure or not prose else told).append(_linked(block))
        yield new_markdown_cell("\n\n".join(shown)), "slide" if text.startswith("#") else "subslide"
        if told:
            yield new_markdown_cell("\n\n".join(told)), "notes"


def _linked(text: str) -> str:
    """Links to the glossary as words, and those to notebooks as links to their slides."""
    text = re.sub(r"\[([^\]]+)\]\(GLOSSARY\.md[^)]*\)", r"\1", text)
    return re.sub(r"\((\d\w+)\.ipynb(#[^)]*)?\)", r"(\1.html)", text)


def _write_decks(sources: list[Path], out: Path) -> None:
    exporter = _exporter()
    out.mkdir()
    for source in sources:
        page, _ = exporter.from_notebook_node(deck(_read(source)), {"metadata": {"name": source.stem}})
        (out / f"{source.stem}.html").write_text(page, encoding="utf-8")
    reveal = _packaged("sphinx_revealjs", "_static/revealjs")
    for part in ("dist", "plugin/notes", "LICENSE"):
        copied = shutil.copytree if (reveal / part).is_dir() else shutil.copy
        (out / "reveal.js" / part).parent.mkdir(parents=True, exist_ok=True)
        copied(reveal / part, out / "reveal.js" / part)
    shutil.copytree(_packaged("jupyter_server_mathjax", "static"), out / "mathjax")


def _packaged(package: str, folder: str) -> Path:
    try:
        return Path(str(files(package))) / folder
    except ModuleNotFoundError:
        hint = "pip install '.[slides]' in the project's folder"
        raise ValueError(f"{package} is not installed, and slides need it: {hint}.") from None


def _exporter() -> Callable:
    from jinja2 import DictLoader
    from nbconvert import SlidesExporter
    from nbconvert.preprocessors import TagRemovePreprocessor

    _packaged("sphinx_revealjs", "")
    exporter = SlidesExporter(
        extra_loaders=[DictLoader({"deck.html.j2": DECK})],
        template_file="deck.html.j2",
        reveal_url_prefix="reveal.js",
        reveal_theme="white",  # "simple", the default, fetches its fonts
        mathjax_url="mathjax/MathJax.js?config=TeX-AMS-MML_HTMLorMML-full,Safe",
    )
    exporter.register_preprocessor(TagRemovePreprocessor(remove_input_tags={"hide_code"}, enabled=True), True)
    return exporter
