"""OASIS's table as spreadsheets make it: decimal commas, lines that are no data, other encodings, .xlsx."""

import builtins

import pytest

from oasis_helpers.__main__ import main
from oasis_helpers.intake.subjects import Subject, read_subjects

TABLE = """ID;M/F;Hand;Age;Educ;SES;MMSE;CDR;eTIV;nWBV;ASF;Delay
OAS1_0001_MR1;F;R;74;2;3;29;0,5;1344;0,743;1,306;N/A
OAS1_0001_MR2;F;R;75;2;3;29;0;1344;0,743;1,306;20
OAS1_0402_MR1;M;R;21,0;;;;;1500;0,85;1,1;N/A
"""
FOUND = {1: Subject(74, "F", 0.5), 402: Subject(21, "M", None)}
ROWS = [line.split(";") for line in TABLE.splitlines()]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t,
        lambda t: "sep=;\n" + t,
        lambda t: "OASIS-1: cross-sectional\n\n" + t,
        lambda t: t + ";;;;;;;;;;;\n;;;;;;;;;;;\n",
        lambda t: t + "\nSource: Marcus et al., 2007;;;\nMean;;;47,5;;;;0,25\n".replace("47,5", ""),
        lambda t: t + "Mean;;;47,5;;;;0,25\n",
        lambda t: t + "Total;1;;95\n2;F=1;;47,5\n",
        lambda t: t.replace(";F;", ";Female;").replace(";;;;;1500", ";.;.;-;n/a;1500"),
        lambda t: t + t,
        lambda t: t.replace(";", "\t"),
        lambda t: t.replace(",", ".").replace(";", ","),
        lambda t: '"' + t.replace(";", '","').replace("\n", '"\n"')[:-1],
        lambda t: t.replace("\n", " \r\n").replace(";F;", "; f ;"),
        lambda t: t.replace("ID;M/F", "id;m/f").replace("OAS1_", "oas1_"),
        lambda t: "".join(f"{i};{line}" for i, line in enumerate(t.splitlines(True))),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_what_a_spreadsheet_adds_is_passed_over(change, encoding, tmp_path):
    path = tmp_path / "table.csv"
    text = change(TABLE) + ("Gerät;;;\n" if encoding == "cp1252" and ";" in change(TABLE) else "")
    path.write_bytes(text.encode(encoding))
    assert read_subjects(path) == FOUND


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("OAS1_0003_MR1;F;R;old;;;;0", "line 5: Age is 'old'"),
        ("OAS1_0003_MR1;X;R;70;;;;0", "line 5: M/F is 'X'"),
        ("OAS1_0003_MR1;F;R;70;;;;0,7", "line 5: CDR is '0,7'"),
        ("OAS1_003;F;R;70;;;;0", "line 5: ID is 'OAS1_003'"),
        ("0003;Female;R;70;;;;0", "line 5: ID is '0003'"),
        ("OAS1_003;;;;;;;0", "line 5: ID is 'OAS1_003'"),
        ("OAS1_0001_MR1;F;R;44;;;;0,5", "line 5: OAS1_0001_MR1 stands there twice and differs"),
    ],
)
def test_a_line_about_somebody_is_never_passed_over(line, message, tmp_path):
    (tmp_path / "t.csv").write_text(TABLE + line)
    with pytest.raises(ValueError, match=message):
        read_subjects(tmp_path / "t.csv")


def test_what_is_unknown_is_marked_in_many_ways(tmp_path):
    (tmp_path / "t.csv").write_text("ID,M/F,Age,CDR\nOAS1_0005_MR1,?,N/A,.\n")
    assert read_subjects(tmp_path / "t.csv") == {5: Subject(None, None, None)}


def test_a_folder_is_no_table(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is a folder\. Give OASIS's table"):
        read_subjects(tmp_path)


def test_decimal_commas_between_commas_are_no_guess(tmp_path):
    (tmp_path / "t.csv").write_text(TABLE.replace(";", ","))
    with pytest.raises(ValueError, match="line 2 has 15 cells, the columns are 12: are there decimal commas"):
        read_subjects(tmp_path / "t.csv")


def _workbook(path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["notes"])
    sheet = book.create_sheet("OASIS")
    sheet.append(["OASIS-1"])
    sheet.append(ROWS[0])
    for row in ROWS[1:]:
        numbers = [float(c.replace(",", ".")) if c[:1].isdigit() else c or None for c in row]
        sheet.append(numbers)
    book.save(path)


def test_a_spreadsheet_is_read(tmp_path):
    _workbook(tmp_path / "oasis_cross-sectional.xlsx")
    assert read_subjects(tmp_path / "oasis_cross-sectional.xlsx") == FOUND
    raw = (tmp_path / "oasis_cross-sectional.xlsx").read_bytes()
    (tmp_path / "cut.xlsx").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match=r"cut.xlsx is a spreadsheet that cannot be read .* as CSV"):
        read_subjects(tmp_path / "cut.xlsx")


@pytest.mark.parametrize("name", ["t.xlsx", "t.xls"])
def test_without_its_reader_one_line_says_how(name, tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def missing(wanted, *rest, **more):
        if wanted == "openpyxl":
            raise ImportError(wanted)
        return real(wanted, *rest, **more)

    (tmp_path / "in").mkdir()
    raw = b"PK\3\4" if name == "t.xlsx" else b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
    (tmp_path / name).write_bytes(raw + bytes(99))
    monkeypatch.setattr(builtins, "__import__", missing)
    assert (
        main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--subjects", str(tmp_path / name)])
        == 1
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "as CSV" in error
    assert ("pip install openpyxl" in error) == (name == "t.xlsx")
