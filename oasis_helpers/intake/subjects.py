"""Who the cases are: age, sex and clinical dementia rating, from OASIS's own table.

OASIS-1 gives one row a session, with the columns ``ID, M/F, Hand, Age, Educ, SES, MMSE, CDR, …``
(Marcus et al. 2007, table 1). Four of them are used. The CDR (Morris 1993, Neurology 43:2412) is
0 for no dementia, 0.5 very mild, 1 mild, 2 moderate, 3 severe; young subjects were not rated.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from ..layout import write_file

FILE = "subjects.csv"
COLUMNS = ("ID", "M/F", "Age", "CDR")
RATINGS = (0.0, 0.5, 1.0, 2.0, 3.0)


@dataclass(frozen=True)
class Subject:
    """One person: ``age`` in years, ``sex`` "M" or "F", ``cdr`` one of RATINGS; None what is not known."""

    age: float | None
    sex: str | None
    cdr: float | None


def read_subjects(path: Path) -> dict[int, Subject]:
    """OASIS's table by case id; repeat sessions are left out.

    Raises ``FileNotFoundError`` or ``ValueError``, which names the line and what is wrong with it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there. Give OASIS's table as CSV.")
    raw = path.read_bytes()
    if raw[:2] == b"PK":
        raise ValueError(f"{path} is a spreadsheet. Save it as CSV (comma separated) and give that.")
    try:
        lines = raw.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text. Give OASIS's table as CSV.") from None
    header = lines[0] if lines else ""
    rows = csv.DictReader(lines, delimiter=max(",;\t", key=header.count))
    if missing := [c for c in COLUMNS if c not in (rows.fieldnames or [])]:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}. Its first line should be ID,M/F,Hand,Age,…,CDR,…"
        )
    found = {}
    for row in rows:
        place = f"{path}, line {rows.line_num}"
        match = re.fullmatch(r"OAS1_(\d{4})_MR(\d+)", (row["ID"] or "").strip())
        if not match:
            raise ValueError(f"{place}: ID is {row['ID']!r}, should be like OAS1_0001_MR1.")
        if int(match[2]) == 1:
            found[int(match[1])] = _subject(row, place)
    return found


def _subject(row: dict[str, str], place: str) -> Subject:
    age, sex, cdr = ((row[c] or "").strip() for c in ("Age", "M/F", "CDR"))
    try:
        years = float(age) if age else None
    except ValueError:
        years = -1.0
    if years is not None and not 0 < years < 120:
        raise ValueError(f"{place}: Age is {age!r}, should be a number of years, or empty.")
    if sex not in ("M", "F", ""):
        raise ValueError(f"{place}: M/F is {sex!r}, should be M, F or empty.")
    sex = sex or None
    if cdr.lower() in ("", "na", "n/a", "nan"):
        return Subject(years, sex, None)
    try:
        rating = float(cdr)
    except ValueError:
        rating = -1.0
    if rating not in RATINGS:
        raise ValueError(f"{place}: CDR is {cdr!r}, should be empty, 0, 0.5, 1, 2 or 3.")
    return Subject(years, sex, rating)


def write_subjects(root: Path, subjects: dict[int, Subject]) -> None:
    """Write ``subjects.csv`` into a data set, with OASIS's names of the columns and no others."""
    lines = [",".join(COLUMNS)]
    for case, s in sorted(subjects.items()):
        age, cdr = ("" if value is None else format(value, "g") for value in (s.age, s.cdr))
        lines.append(f"OAS1_{case:04d}_MR1,{s.sex or ''},{age},{cdr}")
    write_file(root / FILE, ("\n".join(lines) + "\n").encode())


def load_subjects(root: str | Path) -> dict[int, Subject] | None:
    """The subjects of the data set at ``root`` by case id, or None if it has no ``subjects.csv``."""
    path = Path(root) / FILE
    return read_subjects(path) if path.exists() else None
