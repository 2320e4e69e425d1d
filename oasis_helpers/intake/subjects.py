"""Who the cases are: age, sex and clinical dementia rating, from OASIS's own table.

OASIS-1 gives one row a session, with the columns ``ID, M/F, Hand, Age, Educ, SES, MMSE, CDR, …``
(Marcus et al. 2007, table 1). Four of them are used. The CDR (Morris 1993, Neurology 43:2412) is
0 for no dementia, 0.5 very mild, 1 mild, 2 moderate, 3 severe; young subjects were not rated.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ..layout import write_file
from .archives import members

FILE = "subjects.csv"
COLUMNS = ("ID", "M/F", "Age", "CDR")
_BEFORE = 50  # lines that may stand before the names of the columns
_UNKNOWN = ("", "na", "n/a", "nan", "#n/a", "#nv", "null", "none", ".", "-", "–", "?")
_SEXES = {"M": "M", "F": "F", "MALE": "M", "FEMALE": "F"}
RATINGS = (0.0, 0.5, 1.0, 2.0, 3.0)


@dataclass(frozen=True)
class Subject:
    """One person: ``age`` in years, ``sex`` "M" or "F", ``cdr`` one of RATINGS; None what is not known."""

    age: float | None
    sex: str | None
    cdr: float | None


def read_subjects(path: Path) -> dict[int, Subject]:
    """OASIS's table by case id, as CSV or spreadsheet; repeat sessions are left out.

    What a spreadsheet adds is passed over: lines before the names of the columns, empty ones, and lines
    that are about nobody. Decimals may have a comma. Raises ``FileNotFoundError`` or ``ValueError``, which
    names the line and what is wrong with it.
    """
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder. Give OASIS's table, a CSV file.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there. Give OASIS's table as CSV.")
    begin, names, rows = _table(path, _rows_of(path))
    found = {}
    for number, cells in enumerate(rows, begin):
        place = f"{path}, line {number}"
        row = dict(zip(names, cells))
        match = re.fullmatch(r"OAS1_(\d{4})_MR(\d+)", row["ID"], re.IGNORECASE)
        named = re.search(r"OAS|MR\d", row["ID"], re.IGNORECASE)
        if not named and row["M/F"].upper() not in _SEXES:
            continue  # about nobody: empty, a sum, a mean, a source
        if not match:
            raise ValueError(f"{place}: ID is {row['ID']!r}, should be like OAS1_0001_MR1.")
        if any(cells[len(names) :]):
            raise ValueError(
                f"{place} has {len(cells)} cells, the columns are {len(names)}: are there decimal commas "
                "between commas? Save it with semicolons."
            )
        if int(match[2]) == 1:
            case, subject = int(match[1]), _subject(row, place)
            if found.setdefault(case, subject) != subject:
                raise ValueError(f"{place}: {row['ID']} stands there twice and differs. Keep the right line.")
    return found


def _rows_of(path: Path) -> list[list[list[str]]]:
    """The cells of a table, line by line; of a CSV for each delimiter that it may have, of a spreadsheet of
    each sheet."""
    raw = path.read_bytes()
    if raw[:2] == b"PK":
        return _sheets_of(path)
    if raw[:8] == b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1":
        raise ValueError(
            f"{path} is an old spreadsheet (.xls). Save it as CSV (comma separated) and give that."
        )
    # UTF-16 is what Excel calls Unicode text; its CSV is in the code page of the computer
    of_excel = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
    for encoding in ("utf-8-sig", of_excel):
        try:
            lines = raw.decode(encoding).splitlines()
            break
        except UnicodeDecodeError:
            continue
    else:
        raise ValueError(f"{path} is not text. Give OASIS's table as CSV.")
    try:
        return [
            [[cell.strip() for cell in next(csv.reader([line], delimiter=d), [])] for line in lines]
            for d in ",;\t"
        ]
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as CSV ({error}).") from None


def _sheets_of(path: Path) -> list[list[list[str]]]:
    try:
        import openpyxl
    except ImportError:
        raise ValueError(
            f"{path} is a spreadsheet. Save it as CSV (comma separated) and give that, or install what reads "
            "it: pip install openpyxl."
        ) from None
    try:
        for _ in members(path):  # no bomb
            pass
        with closing(openpyxl.load_workbook(path, read_only=True, data_only=True)) as book:
            return [
                [["" if c is None else str(c).strip() for c in row] for row in sheet.values]
                for sheet in book.worksheets
            ]
    except Exception as error:  # openpyxl raises many kinds
        raise ValueError(
            f"{path} is a spreadsheet that cannot be read ({' '.join(str(error).split())[:80]}). Save it as "
            "CSV (comma separated) and give that."
        ) from None


def _table(path: Path, forms: list[list[list[str]]]) -> tuple[int, list[str], list[list[str]]]:
    """Number of the first line below the names of the columns, the names, and the cells from there on."""
    known = {name.upper(): name for name in COLUMNS}
    best: tuple[int, list[str], list[list[str]]] = (1, [], [])
    for lines in forms:
        for number, cells in enumerate(lines[:_BEFORE], 1):
            names = [known.get(cell.upper(), cell) for cell in cells]
            if len(known.keys() & {n.upper() for n in names}) > len(
                known.keys() & {n.upper() for n in best[1]}
            ):
                best = number + 1, names, lines[number:]
    begin, names, rows = best
    if missing := [c for c in COLUMNS if c not in names]:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}. Give OASIS's table as it is published (its "
            "first line is ID,M/F,Hand,Age,…,CDR,…), or name the columns of yours so."
        )
    return begin, names, [row + [""] * (len(names) - len(row)) for row in rows]


def _number(text: str) -> float | None:
    """A number with a decimal point or comma, or None."""
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return None


def _subject(row: dict[str, str], place: str) -> Subject:
    age, sex, cdr = ("" if row[c].lower() in _UNKNOWN else row[c] for c in ("Age", "M/F", "CDR"))
    years = _number(age)
    if age and (years is None or not 0 < years < 120):
        raise ValueError(f"{place}: Age is {age!r}, should be a number of years, or empty.")
    if sex and sex.upper() not in _SEXES:
        raise ValueError(f"{place}: M/F is {row['M/F']!r}, should be M, F or empty.")
    sex, rating = _SEXES.get(sex.upper()), _number(cdr)
    if cdr and rating not in RATINGS:
        raise ValueError(f"{place}: CDR is {cdr!r}, should be empty, 0, 0.5, 1, 2 or 3.")
    return Subject(years, sex, rating)


def write_subjects(root: Path, subjects: dict[int, Subject]) -> None:
    """Write ``subjects.csv`` into a data set, with OASIS's names of the columns and no others."""
    lines = [",".join(COLUMNS)]
    for case, s in sorted(subjects.items()):
        age, cdr = ("" if value is None else format(value, "g") for value in (s.age, s.cdr))
        lines.append(f"OAS1_{case:04d}_MR1,{s.sex or ''},{age},{cdr}")
    write_file(root / FILE, ("\n".join(lines) + "\n").encode())


def join_subjects(root: Path, people: dict[int, Subject], cases: Iterable[int], table: str) -> list[str]:
    """Write who the cases of a data set are; a line if ``table`` lacks some of them."""
    write_subjects(root, {case: people[case] for case in cases if case in people})
    unknown = sorted(set(cases) - set(people))
    return [f"{len(unknown)} cases are not in {table}, the first is {unknown[0]}"] if unknown else []


def load_subjects(root: str | Path) -> dict[int, Subject] | None:
    """The subjects of the data set at ``root`` by case id, or None if it has no ``subjects.csv``."""
    path = Path(root) / FILE
    return read_subjects(path) if path.exists() else None
