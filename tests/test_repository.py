"""What the repository promises besides code: one list of packages, notices, no machine's path."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from notebook_tools import all_notebooks, sections
from packaging.requirements import Requirement
from packaging.version import Version

from oasis_helpers.exercises import exercises

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOWEST = {
    "torch": "2.0.1",
    "numpy": "1.24.3",
    "pillow": "10.0.0",
    "torchvision": "0.15.2",
    "matplotlib": "3.7.2",
}


IGNORED = {"build", "runs", "__pycache__"}  # as in .gitignore, and so are names that begin with a dot …
HIDDEN = {".ci", ".github", ".gitignore"}  # … but for these


def _files():
    """What belongs to the repository: what git knows, or all but the ignored where there is no git."""
    try:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        files = [ROOT / name for name in names.splitlines()]
    except (OSError, subprocess.CalledProcessError):
        files = []
    return [path for path in files if path.is_file()] or _tree()


def _tree():
    def kept(part):
        return part in HIDDEN or not (part in IGNORED or part[0] == "." or part.endswith(".egg-info"))

    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = filter(kept, folders)
        found += [Path(folder, name) for name in names if kept(name)]
    return found


def _requirements():
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


def test_environment_yml_installs_the_list_of_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *from_conda, pip = environment["dependencies"]
    assert from_conda == [f"python{PROJECT['requires-python']}", "pip"]
    assert pip == {"pip": ["-e .[test,lint]"]}


def test_the_given_packages_are_required_and_not_held_too_low():
    direct = {Requirement(line).name: Requirement(line) for line in PROJECT["dependencies"]}
    given = {"torch", "torchvision", "numpy", "pillow", "matplotlib", "jupyterlab", "ipywidgets", "nbval"}
    assert given <= set(direct)
    for name, version in LOWEST.items():
        (bound,) = direct[name].specifier
        assert bound.operator == ">="
        assert Version(bound.version) >= Version(version)


def test_constraints_fix_every_package_within_its_range():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    fixed = dict(line.split("==") for line in lines)
    fixed = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in fixed.items()}
    for requirement in _requirements():
        # playwright is for looking at notebooks in a browser, not for tests; tests name our own extra
        if requirement.name in ("playwright", "oasis_helpers"):
            continue
        assert requirement.specifier.contains(fixed[requirement.name]), requirement


def test_notices_travel_along():
    assert "MIT License" in (ROOT / "LICENSE").read_text()
    assert "Copyright (C) 1993-2004 Louis Collins" in (ROOT / "oasis_helpers" / "NOTICE-ICBM.txt").read_text()
    readme = (ROOT / "README.md").read_text()
    for words in ("not for diagnosis", "P50 AG05681", "NOTICE-ICBM.txt", "make lab", "make test"):
        assert words in readme


@pytest.mark.parametrize("git", [True, False])
def test_the_files_are_found_with_git_and_without(monkeypatch, git):
    if not git:

        def missing(*_, **__):
            raise FileNotFoundError("git")

        monkeypatch.setattr(subprocess, "run", missing)
    found = {str(path.relative_to(ROOT)) for path in _files()}
    assert {
        "README.md",
        ".github/workflows/ci.yml",
        "oasis_helpers/data.py",
        "notebooks/03_unet.ipynb",
    } <= found
    assert not any(name.startswith((".git/", ".venv/")) for name in found)


def test_no_machines_path_and_no_slices():
    # A slice in the repository could be a patient's; phantoms are made, not stored.
    path = re.compile(r"(?<![\w.])/(?:home|root|Users|work|farm)/\w|/tmp/\w|C:\\\\Users")
    for file in _files():
        assert not re.search(r"(case|seg)_\d+_slice_\d+.*\.png$", file.name)
        if file.suffix in {".png", ".safetensors", ".npz"} or file == Path(__file__):
            continue
        found = path.search(file.read_text(encoding="utf-8"))
        assert not found, f"{file.relative_to(ROOT)}: {found}"


def _prose():
    yield ROOT / "README.md", (ROOT / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        yield path, "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def test_links_of_the_readme_and_notebooks_lead_somewhere():
    for file, text in _prose():
        links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
        assert links, f"{file.name} links to nothing"
        for target in links:
            assert (file.parent / target).exists(), f"{file.name} links to {target}"


def test_the_table_of_modules_names_what_is_there():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    named = {name for row in rows for name in re.findall(r"`(\w+\.py|\w+/)`", row)}
    assert {"data.py", "training/", "evaluation/"} <= named
    assert [name for name in sorted(named) if not (ROOT / "oasis_helpers" / name).exists()] == []


def test_ci_runs_the_command_of_the_readme():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    commands = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert "bash .ci/run" in commands


def test_no_workflow_may_write():
    files = list((ROOT / ".github" / "workflows").glob("*.yml"))
    assert {"ci.yml", "processors.yml"} <= {file.name for file in files}
    for file in files:
        assert yaml.safe_load(file.read_text())["permissions"] == {"contents": "read"}, file.name


def test_nothing_is_imported_without_need():
    """The command line starts without torch, evaluation without what it does not use; one process for all."""
    code = """
import sys
import oasis_helpers.__main__, oasis_helpers.intake.convert, oasis_helpers.intake.phantoms
assert "torch" not in sys.modules
sys.modules.update(dict.fromkeys(["accelerate", "IPython", "ipywidgets", "nilearn"]))  # fail if imported
import oasis_helpers.training, oasis_helpers.sampling
for name in ("IPython", "ipywidgets"):
    del sys.modules[name]
from oasis_helpers.exercises import exercise
exercise("4.1")
assert "torchvision" not in sys.modules  # half of the seconds that a notebook needs to begin
import oasis_helpers.evaluation
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_teaching_tells_the_minutes_of_the_notebooks():
    rows = re.findall(r"^\| (\w+) · .*? \| (\d+) \| (\d+|–) \|", (ROOT / "TEACHING.md").read_text(), re.M)
    told = {
        number: (int(reading), 0 if practice == "–" else int(practice)) for number, reading, practice in rows
    }
    found = {}
    for path in all_notebooks():
        number = path.stem.split("_")[0].lstrip("0")
        reading = sum(s.minutes for s in sections(nbformat.read(path, as_version=4)) if s.main)
        practice = [one.minutes for key, one in exercises().items() if key.split(".")[0] == number]
        found[number] = reading, sum(practice)
    assert told == {number: found[number] for number in told}
    assert set(told) >= {"1", "2", "3", "4", "5", "5b", "6", "7", "8"}
