"""The exercises of the course: solutions pass, mistakes get the message meant for them, stubs get help."""

import contextlib
import dataclasses
import functools
import io
import re

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from notebook_tools import all_notebooks

from oasis_helpers import exercises as course
from oasis_helpers.exercises import KINDS, Exercise, Wrong, compare, exercise, exercises, nb10
from oasis_helpers.exercises.editions import deck, make_editions, solved

ALL = {path.stem: nbformat.read(path, as_version=4) for path in all_notebooks()}


@pytest.fixture(autouse=True)
def _nobodys_progress(monkeypatch, tmp_path):
    monkeypatch.setattr(course, "progress_file", lambda: tmp_path / "progress.json")
    monkeypatch.delenv("OASIS_DRIVE_CONTROLS", raising=False)


def said(key, *answer):
    """What the check of an exercise prints of an answer."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exercise(key).check(*answer)
    return printed.getvalue()


def _of(name):
    """The exercises of a notebook."""
    number = name.split("_")[0].lstrip("0")
    return [one for key, one in exercises().items() if key.split(".")[0] == number]


@pytest.mark.parametrize("name", ALL)
def test_each_notebook_has_exercises_of_every_kind(name):
    found = _of(name)
    if name == "10_break_it":  # a fault is found and named, eight times
        assert [one.kind for one in found] == ["diagnosis"] * 8
    else:
        assert len(found) >= 4
        assert {one.kind for one in found} == set(KINDS) - {"diagnosis"}
    for one in found:
        assert 2 <= one.minutes <= 60
        assert len(one.hints) >= 2
        assert len(one.wrong) >= 2, f"{one.key}: two typical wrong answers"
        assert (one.prediction is not None) == (one.kind == "experiment"), one.key
    assert any(one.picture for one in found)


@pytest.mark.parametrize("key", exercises())
def test_a_stub_gets_help(key):
    one = exercise(key)

    def stub(*args, **kwargs): ...

    for answer in [(stub,)] if one.prediction is None else [(one.prediction, stub), (..., one.solution)]:
        printed = said(key, *answer)
        assert printed.startswith(f"{key} waits for you"), printed
        assert one.hints[0] in printed
    assert key not in course.passed()


def test_a_prediction_is_one_of_those_that_are_offered():
    for one in exercises().values():
        if one.prediction is not None:
            printed = said(one.key, "a cat", one.solution)
            assert printed.startswith(f"✗ {one.key}: the prediction is 'a cat': write down one of '"), printed
            assert repr(one.prediction) in printed


@pytest.mark.parametrize("name", ALL)
def test_a_notebook_holds_a_stub_for_each_exercise_and_its_minutes(name):
    cells = ALL[name].cells
    for one in _of(name):
        (place,) = [
            i for i, c in enumerate(cells) if c.cell_type == "code" and f'exercise("{one.key}")' in c.source
        ]
        stub = cells[place]
        text = [cell for cell in cells[:place] if cell.cell_type == "markdown"][-1]
        assert re.search(rf"^def {one.solution.__name__}\(", stub.source, re.M), one.key
        assert re.search(r"^\s+\.\.\.", stub.source, re.M), f"{one.key}: the stub has dots to fill in"
        if one.prediction is not None:
            offered = re.findall(r'"(.+?)"', re.search(r"^prediction = \.\.\.(.+)", stub.source, re.M)[1])
            assert sorted(offered) == sorted((one.prediction, *one.alternatives)), one.key
        assert f"### {one.key} · {one.title} · {one.minutes} min" in text.source
        (output,) = stub.outputs
        assert output.text.startswith(f"{one.key} waits for you"), output.text


@pytest.mark.parametrize("name", ALL)
def test_a_notebook_asks_before_and_after(name):
    text = "\n".join(c.source for c in ALL[name].cells if c.cell_type == "markdown")
    parts = re.findall(r"^## Quiz: (.+?)$(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert [heading for heading, _ in parts] == ["before you start", "what do you know now?"]
    for _, body in parts:
        questions = re.split(r"^\*\*\d\.\*\*", body, flags=re.M)[1:]
        assert len(questions) == 4
        for question in questions:
            answers = re.findall(r"<details><summary>(.+?)</summary>(.+?)</details>", question, re.S)
            assert len(answers) >= 3
            right = [said for _, said in answers if said.strip().startswith("Right: ")]
            assert len(right) == 1, question
            assert all(len(said.split()) >= 5 for _, said in answers), "each answer is explained"


def test_each_planted_fault_is_another_and_on_the_list():
    planted = list(nb10.PLANTED.values())
    assert len(set(planted)) == 8
    assert set(planted) < set(nb10.FAULTS)
    assert len(nb10.FAULTS) == 12
    with pytest.raises(ValueError, match="there is no run 'Z'"):
        nb10.run("Z")


def test_a_diagnosis_is_a_name_of_the_list():
    assert "'bad luck' is not on the list: wrong range, " in said("10.1", lambda: "bad luck")


@pytest.mark.parametrize("letter", nb10.LETTERS)
def test_every_other_fault_is_spoken_against(letter):
    key = f"10.{nb10.LETTERS.index(letter) + 1}"
    for name in nb10.FAULTS:
        printed = said(key, lambda name=name: name)
        assert printed.startswith("✓ " if name == nb10.PLANTED[letter] else f"✗ {key}: {name} does not fit: ")


# ---- the checks themselves ----------------------------------------------------------------------


def _doubled(x):
    return 2 * x


def test_a_nothing_that_is_written_down_is_a_nothing_told():
    def atrophy_only(denoise, x, t, y, s):
        second = denoise(x, t, y | {"atrophy": torch.full_like(y["atrophy"], torch.nan)})
        return second + s * (denoise(x, t, y) - second)

    assert "only the atrophy is exaggerated" in exercises()["7.2"].diagnose(atrophy_only)


def _diagnose(doubled):
    compare(doubled(3.0), 6.0, "the double of 3", {"that is the square": 9.0})
    return "doubled."


DOUBLE = Exercise("0.1", "Double", "line", 2, ("two times", "2 * x"), _diagnose, _doubled, ())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x * x, "✗ 0.1: that is the square\n"),
        (lambda x: x + 1, "✗ 0.1: the double of 3 is 4 where 6 is right.\n"),
        (lambda x: [x, x], "✗ 0.1: the double of 3 has the shape (2,): () is wanted.\n"),
        (lambda x: "six", "✗ 0.1: the double of 3 is a str: a number or a tensor is wanted.\n"),
        (lambda x: float("nan"), "✗ 0.1: the double of 3 is nan where 6 is right.\n"),
        (lambda x: x / 0, "✗ 0.1: ZeroDivisionError in <lambda>(): float division by zero\n"),
        (lambda: 6, "✗ 0.1: TypeError in call(): "),
        (_doubled, "✓ 0.1: doubled.\n"),
    ],
)
def test_a_check_says_what_it_saw(answer, message, capsys):
    DOUBLE.check(answer)
    assert capsys.readouterr().out.startswith(message)


def test_hints_come_one_by_one(capsys):
    DOUBLE.hint(2)
    assert capsys.readouterr().out == "Hint 2 of 2: 2 * x\n"
    with pytest.raises(ValueError, match="hints 1 to 2"):
        DOUBLE.hint(3)


def test_a_solution_can_be_looked_at(capsys):
    DOUBLE.show_solution()
    assert "return 2 * x" in capsys.readouterr().out


def test_an_unknown_exercise_is_one_line():
    with pytest.raises(ValueError, match=r"there is no exercise '99\.1'"):
        exercise("99.1")


def test_under_test_no_progress_is_kept(monkeypatch):
    monkeypatch.setenv("OASIS_DRIVE_CONTROLS", "1")
    DOUBLE.check(_doubled)
    assert course.passed() == set()


def test_progress_is_kept_and_damage_of_it_is_no_error():
    DOUBLE.check(_doubled)
    assert course.passed() == {"0.1"}
    for damaged in ("{", "5"):
        course.progress_file().write_text(damaged)
        assert course.passed() == set()


def test_compare_tells_places_apart():
    with pytest.raises(Wrong, match=r"it is 5 at place 1 where 2 is right"):
        compare([1, 5], [1, 2], "it")


# ---- editions -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_editions(tmp_path_factory.mktemp("course") / "out")


def test_the_students_edition_gives_nothing_away(made):
    for path in all_notebooks():
        notebook = nbformat.read(made / "student" / path.name, as_version=4)
        assert len(notebook.cells) == len(ALL[path.stem].cells)
        assert not any(cell.get("outputs") for cell in notebook.cells)
        for one in _of(path.stem):
            assert one.source not in "\n".join(cell.source for cell in notebook.cells)


@functools.cache
def _set_up(name):
    """The names that a notebook's first cell defines."""
    names = {}
    exec(next(cell.source for cell in ALL[name].cells if cell.cell_type == "code"), names)
    return names


@pytest.mark.parametrize(("name", "key"), [(name, one.key) for name in ALL for one in _of(name)])
def test_in_the_instructors_edition_solutions_pass_and_mistakes_get_their_messages(name, key, made, capsys):
    """A solution passed when the edition was made, and does where it stands, behind the set-up cell alone."""
    one = exercise(key)
    cells = nbformat.read(made / "instructor" / f"{name}.ipynb", as_version=4).cells
    (place,) = [i for i, c in enumerate(cells) if c.cell_type == "code" and f'exercise("{key}")' in c.source]
    solved, note = cells[place], cells[place + 1].source
    assert solved.outputs[0].text.startswith(f"✓ {key}: ")
    assert len(solved.outputs) == 1 + (one.picture is not None)
    assert f"**For the lecturer** · {key} · {one.minutes} min" in note
    answers = re.findall(rf"^- ✗ {re.escape(key)}: (.+)", note, re.M)
    for answer, (_, message) in zip(answers, one.wrong, strict=True):
        assert message in answer
    names = dict(_set_up(name))
    capsys.readouterr()
    exec(solved.source, names)
    assert capsys.readouterr().out.startswith(f"✓ {key}: "), solved.source
    assert key in course.passed()


def test_slides_need_no_network(made):
    for path in all_notebooks():
        page = (made / "slides" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert page.count("<section") > 10
        for address in re.findall(r'<(?:script|link|img)\b[^>]*?(?:src|href)="([^"]*)"', page):
            assert not re.match(r"(https?:)?//", address), address
            local = address.split("?")[0]
            assert address.startswith("data:") or (made / "slides" / local).exists(), address
        assert "GLOSSARY.md" not in page
    theme = (made / "slides" / "reveal.js" / "dist" / "theme" / "white.css").read_text()
    assert not re.search(r"@import[^;]*http", theme)


def test_slides_show_short_code_and_tell_the_rest_to_the_speaker():
    short, long = (new_code_cell("\n".join(f"x = {i}" for i in range(lines))) for lines in (3, 30))
    text = new_markdown_cell(
        "# 1 · Title\n\nShown.\n\nTold.\n\n- a list\n\n$$x = 1$$\n\n[word](GLOSSARY.md#word)"
    )
    cells = deck(
        new_notebook(cells=[text, short, long, new_markdown_cell("## Exercises\n\nNot here.")])
    ).cells
    kinds = [cell.metadata.slideshow.slide_type for cell in cells]
    assert kinds == ["slide", "notes", "fragment", "fragment"]
    assert cells[0].source == "# 1 · Title\n\nShown.\n\n- a list\n\n$$x = 1$$"
    assert cells[1].source == "Told.\n\nword"
    assert [cell.metadata.get("tags", []) for cell in cells[2:]] == [[], ["hide_code"]]


def test_a_solution_takes_the_place_of_a_stub():
    check = 'exercise("0.1").check(prediction, _doubled)'
    stub = (
        f'prediction = ...  # "up" or "down"\n\n\ndef _doubled(x):\n    """Twice x."""\n    ...\n\n\n{check}'
    )
    found = solved(stub, dataclasses.replace(DOUBLE, prediction="up"))
    assert found == f"prediction = 'up'\n\n\ndef _doubled(x):\n    return 2 * x\n\n\n{check}"


def test_editions_replace_nothing(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        make_editions(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
