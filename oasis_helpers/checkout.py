"""What ``make lab`` and ``make test`` do once everything is installed, also where there is no make."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import joblib

from .intake.phantoms import fresh_heads, make_phantoms, phantom_cache

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"


def notebooks() -> list[Path]:
    """The notebooks in order. ValueError where the package is not in a checkout of the project."""
    found = sorted(NOTEBOOKS.glob("*.ipynb"))
    if not found:
        raise ValueError(f"no notebooks in {NOTEBOOKS}: this command needs a checkout of the project.")
    return found


def open_lab(port: int = 8888, browser: bool = True) -> int:
    """Make the phantoms if there are none and open notebook 1 in JupyterLab; returns its exit code."""
    first = notebooks()[0]
    make_phantoms(phantom_cache())
    options = [f"--port={port}"]
    options += [] if browser else ["--no-browser"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # in a container
        options.append("--allow-root")
    # One network has all cores; threads that sleep between layers would make it several times slower.
    return _run("jupyter", "lab", *options, str(first.relative_to(ROOT)), OMP_NUM_THREADS=joblib.cpu_count())


def run_tests() -> int:
    """Unit tests, and every notebook against its stored outputs; returns an exit code, 0 if all passed."""
    notebooks()
    make_phantoms(phantom_cache())  # now, for two processes that find none would both begin
    fresh_heads()
    # One thread a process: two torch processes with two threads each on two cores wait for each other.
    quiet = {"OMP_NUM_THREADS": 1, "OMP_WAIT_POLICY": "PASSIVE"}
    # A file is run by one process; all in one command, so that no core waits for the last file of a kind.
    pair = ["-n", "2", "--dist", "loadfile"]
    coverage = ["--cov=oasis_helpers", "--cov-report=term", "--cov-fail-under=90"]
    strict = ["--nbval", "--nbval-current-env", "--nbval-cell-timeout=600"]
    return _run("pytest", "tests", "notebooks", *strict, *pair, *coverage, "--durations=25", **quiet)


def _run(module: str, *arguments: str, **environment: object) -> int:
    """Run a module of this Python in the checkout; what the environment says already, holds."""
    environment = {name: str(value) for name, value in environment.items()} | os.environ
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment, check=False
    ).returncode
