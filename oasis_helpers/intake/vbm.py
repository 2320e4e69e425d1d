"""Maps of grey matter of OASIS-1 as nilearn fetches them; slices in the course set's layout, out.

No agreement on paper is needed, but OASIS's terms hold: they are shown, and the download begins when they
are agreed to. What comes are no pictures of a scanner but *densities of grey matter* by SPM8, warped to MNI
space and multiplied by how much was stretched (``mwc1…``, 2 mm; Marcus et al. 2007; Ashburner & Friston
2000, NeuroImage 11:805). So grey matter is bright and all else dark, and there is no skull.

Geometry: as :mod:`.volumes` places planes, by the map's own header (NIfTI in MNI space, 91×109×91 voxels of
2 mm), linearly interpolated, so that a slice of 1 mm pixels holds no detail below 2 mm. Masks from both
maps: where grey and white together reach 0.5, the larger of the two; CSF is in neither map, so it is
background here. nilearn leaves out the subjects whose warping went wrong; the ids of the others are in the
names of the files.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..layout import PLANES, DataLocation, check_space, pad, png_bytes
from .cases import Unusable, split_of
from .convert import ConversionReport, scaled
from .scans import ScanUnusable, read_volume
from .subjects import RATINGS, Subject, join_subjects
from .target import claimed, finished_bytes
from .volumes import CASE_BYTES, course_planes

SOURCE = "nilearn-oasis"
VERSION = 1
TERMS = """\
nilearn fetches maps of grey and white matter of OASIS-1 (415 subjects, one archive from nitrc.org), made
from the Open Access Series of Imaging Studies. Their use requires agreement to OASIS's Data
Usage Agreement: https://sites.wustl.edu/oasisbrains/ (a copy comes with the data). Publications acknowledge
OASIS-1 Cross-Sectional: D. Marcus, R. Buckner, J. Csernansky, J. Morris; P50 AG05681, P01 AG03991, P01
AG026276, R01 AG021910, P20 MH071616, U24 RR021382."""


def _agreed(agree: bool) -> None:
    print(TERMS, flush=True)
    if agree:
        return
    if not sys.stdin or not sys.stdin.isatty():
        raise ValueError("Nothing is fetched before you agree to these terms: read them, then add --agree.")
    if input("Do you agree to the Data Usage Agreement? Type yes: ").strip().lower() != "yes":
        raise ValueError("You did not agree, so nothing was fetched.")


def _fetched(fetch: Callable | None, n_subjects: int | None):
    """nilearn's bunch of file names; whatever a missing network raises as one line."""
    if fetch is None:
        from nilearn.datasets import fetch_oasis_vbm as fetch
    try:
        return fetch(n_subjects=n_subjects, dartel_version=False, resume=True, verbose=1)
    except Exception as error:  # requests, urllib3, tarfile and nilearn raise many kinds
        raise OSError(
            f"nilearn could not fetch the maps ({' '.join(str(error).split())[:80]}…). They come from "
            "www.nitrc.org: check the network and run this again; or copy nilearn's folder "
            "(nilearn_data, or where NILEARN_DATA points) from a machine that has it."
        ) from None


def _subject(row) -> Subject:
    """One row of nilearn's table, whose columns are OASIS's in small letters and without ``/``."""
    cdr = float(row["cdr"])
    subject = Subject(float(row["age"]), str(row["mf"]), None if np.isnan(cdr) else cdr)
    if not 0 < subject.age < 120 or subject.sex not in ("M", "F") or subject.cdr not in (None, *RATINGS):
        raise ValueError(f"nilearn's table says of {row['id']}: {subject}. Delete it and fetch it again.")
    return subject


def _slices(grey_path: Path, white_path: Path) -> tuple[list[bytes], list[bytes]]:
    maps = []
    for path in (grey_path, white_path):
        volume = read_volume(path)
        sizes = np.linalg.norm(volume.affine[:3, :3], axis=0)
        if not volume.trusted or not np.allclose(sizes, 2, atol=0.1):
            raise ScanUnusable(f"{path.name} is no map in MNI space at 2 mm; delete it and fetch it again")
        maps.append(course_planes(volume.values, np.linalg.inv(volume.affine), order=1))
    grey, white = maps
    images = [png_bytes(pad(scaled(grey[:, :, k], f"slice {k}"))) for k in range(PLANES)]
    labels = np.where(grey + white < 0.5, 0, np.where(grey >= white, 2, 3)).astype(np.uint8)
    return images, [png_bytes(pad(85 * labels[:, :, k])) for k in range(PLANES)]


def convert_vbm(
    root: Path,
    *,
    agree: bool = False,
    force: bool = False,
    n_subjects: int | None = None,
    fetch: Callable | None = None,
) -> ConversionReport:
    """Fetch nilearn's maps of OASIS-1 and bring them into the layout of the course set, with who they are.

    Age, sex and CDR go to ``subjects.csv``. ``agree`` says that OASIS's terms are agreed to; without it
    they are asked about. The files stay where nilearn keeps its data, and what is there is not fetched
    again. ``n_subjects`` is how many to take (default: all 415). ``fetch`` stands in for nilearn's
    ``fetch_oasis_vbm``. Raises ``ValueError`` if the terms are not agreed to, ``OSError`` if nothing can be
    fetched, and ``FileExistsError`` rather than overwrite something (unless ``force``).
    """
    _agreed(agree)
    there = 0 if force else finished_bytes(root)
    check_space(root, max(0, CASE_BYTES * (n_subjects or 415) - there), "the slices")
    bunch = _fetched(fetch, n_subjects)
    with claimed(root, {"version": VERSION, "format": SOURCE}, force=force) as target:
        report = ConversionReport(DataLocation(root, "oasis"), SOURCE, kept=len(target.rows))
        pairs = list(zip(map(Path, bunch.gray_matter_maps), map(Path, bunch.white_matter_maps)))
        for grey, white in tqdm(pairs, desc="converting", unit="subject", file=sys.stderr):
            case = int(re.search(r"OAS1_(\d{4})", grey.name)[1])
            if case in target.rows:
                continue
            try:
                images, masks = _slices(grey, white)
            except (ScanUnusable, Unusable, OSError) as error:
                report.left_out.append(f"case {case:03d}: {error}")
                continue
            target.add(case, split_of(case), images, masks)
            report.converted += 1
        people = {int(row["id"][5:9]): _subject(row) for _, row in bunch.ext_vars.iterrows()}
        report.notes.append(f"the terms of use are in {bunch.data_usage_agreement}")
        if target.rows:
            report.notes += join_subjects(root, people, target.rows, "nilearn's table")
        else:
            report.left_out.append(f"{SOURCE}: no map could be used")
    return report
