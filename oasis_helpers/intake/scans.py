"""T1-weighted volumes as people keep them: which files there are, whose they are, and what is in them.

Files are NIfTI (``.nii``, ``.hdr`` + ``.img``) or Analyze 7.5 (``.hdr`` + ``.img``), each with or without
``.gz``. In a folder that has any ``…_T1w`` (BIDS, OASIS-3) only these count, in one that has any ``mpr-1``
(raw scans of OASIS-1 and OASIS-2) only those, in neurite-oasis's 3D set only ``aligned_norm``, else every
volume that is not named as a mask or another contrast. What lies under ``derivatives`` is passed over.

A subject is named by ``OAS1_0001``, ``OAS2_0001``, ``OAS30001`` or ``sub-…`` in a file's path; else it is
the folder below the source, or for files that lie in the source itself, each file.

A segmentation of the tissues counts if it lies beside its volume, on the same grid, as ``NAME_seg``,
``NAME_pveseg`` or ``NAME_fseg`` (FSL FAST: 1 CSF, 2 grey, 3 white), or ``NAME_dseg`` with or without the
``_T1w`` of NAME (BIDS: 1 grey, 2 white, 3 CSF).

Sources: Analyze 7.5 file format (Mayo Clinic); NIfTI-1 (Cox et al. 2004); BIDS 1.10, "Anatomy imaging
data", "Common image-derived labels"; OASIS-2: Marcus et al. 2010, J. Cogn. Neurosci. 22(12):2677–2684.
"""

from __future__ import annotations

import glob
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

from .sources import walk

logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # what is wrong is said once, in the report

_VOLUME = re.compile(r"^(?P<stem>[^.].*?)(?:\.nifti)?\.(?P<kind>nii|hdr|img)(?:\.gz)?$", re.IGNORECASE)
_MASK = re.compile(r"(?:_[a-z]*seg\d*|_pve_?\d?|mask|aseg|aparc[^/]*)$", re.IGNORECASE)
_OTHER = re.compile(
    r"_(?:T2w?|T2star|T2starw|T1map|T2map|PDw?|FLAIR|bold|sbref|dwi|epi|asl|swi|phase\w*|magnitude\d?|angio)$",
    re.IGNORECASE,
)
_SUBJECT = re.compile(r"(?P<oasis>OAS[12]_\d{4}|OAS3\d{4})|(?P<bids>sub-[A-Za-z0-9]+)")
_MPR = re.compile(r"(?:^|_)mpr-\d", re.IGNORECASE)
_PREFERRED = (re.compile(r"_T1w$", re.IGNORECASE), _MPR, re.compile(r"^aligned_norm$", re.IGNORECASE))
_FAST, _BIDS = (0, 1, 2, 3), (0, 2, 3, 1)  # class of the course for each value of the file
_SEGMENTATIONS = (("_seg", _FAST), ("_pveseg", _FAST), ("_fseg", _FAST), ("_dseg", _BIDS))
_MOST_VOXELS = 10**8
_LEAST, _MOST = 60.0, 600.0  # mm along each axis


class ScanUnusable(ValueError):
    """One volume cannot be used; the others can."""


@dataclass(frozen=True)
class Scan:
    """One volume on disk: whose it is, and the segmentation beside it with the class of each value."""

    subject: str
    path: Path
    segmentation: tuple[Path, tuple[int, ...]] | None = None


@dataclass(frozen=True)
class Volume:
    """``values`` float32 (X, Y, Z); ``affine`` takes voxels to mm: if ``trusted`` to right, front, top."""

    values: np.ndarray
    affine: np.ndarray
    trusted: bool


def _stem(path: Path) -> str | None:
    match = _VOLUME.match(path.name)
    return match["stem"] if match else None


def _kind(path: Path) -> str:
    """ "nii", "hdr" or "img"."""
    return _VOLUME.match(path.name)["kind"].lower()


def _beside(path: Path, kind: str) -> Path | None:
    """The other half of a pair, whatever the case of its ending and whether packed."""
    wanted = re.compile(rf"(?:\.nifti)?\.{kind}(?:\.gz)?", re.IGNORECASE)
    start = re.sub(r"(?:\.nifti)?\.(?:hdr|img)(?:\.gz)?$", "", path.name, flags=re.IGNORECASE)
    found = (p for p in path.parent.glob(glob.escape(start) + ".*") if wanted.fullmatch(p.name[len(start) :]))
    return min(found, default=None)


def is_volume(path: Path) -> bool:
    """Whether a file is named like a volume."""
    return path.is_file() and _stem(path) is not None


def _numbers_as_numbers(path: Path) -> list:
    return [(int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", path.as_posix())]


def find_scans(source: Path) -> list[Scan]:
    """The T1 volumes of a file or folder by subject, first sessions and runs first; maybe none."""
    if source.is_file():
        if _stem(source) is None:
            return []
        path = (_kind(source) == "img" and _beside(source, "hdr")) or source
        return [Scan(_subject(source.parent.absolute(), source.absolute()), path, _segmentation(path))]
    found: dict[Path, Path] = {}
    for path in walk(source):
        inside = path.relative_to(source).parts[:-1]
        if any(folder == "derivatives" or folder.startswith(".") for folder in inside):
            continue
        if (stem := _stem(path)) and not _MASK.search(stem) and not _OTHER.search(stem):
            key = path.with_name(stem)
            if key not in found or _kind(path) != "img":  # of a pair the header
                found[key] = path
    for kind in _PREFERRED:
        if chosen := {key: path for key, path in found.items() if kind.search(key.name)}:
            found = chosen
            break
    paths = sorted(found.values(), key=_numbers_as_numbers)
    scans = [Scan(_subject(source, path), path, _segmentation(path)) for path in paths]
    return sorted(scans, key=lambda s: _numbers_as_numbers(Path(s.subject)))


def _subject(source: Path, path: Path) -> str:
    inside = path.relative_to(source)
    if match := _SUBJECT.search(inside.as_posix()) or _SUBJECT.search(source.name):
        name = match["oasis"] or match["bids"]
        within = re.fullmatch(r"sub-(OAS3\d{4}|OAS[12]\d{4})", name)
        return within[1] if within else name
    return inside.parts[0] if len(inside.parts) > 1 else _stem(path)


def _segmentation(path: Path) -> tuple[Path, tuple[int, ...]] | None:
    stem = _stem(path)
    for start in (stem, re.sub(r"_T1w$", "", stem)):
        for end, classes in _SEGMENTATIONS:
            for kind in (".nii.gz", ".nii", ".hdr", ".hdr.gz"):
                if (beside := path.with_name(f"{start}{end}{kind}")).exists():
                    return beside, classes
    return None


def _wrong_byte_order(raw: np.ndarray) -> bool:
    """Whether neighbours differ like noise, and no longer do with the bytes the other way round."""
    if raw.dtype.kind not in "iu" or raw.dtype.itemsize == 1:
        return False
    plane = np.ascontiguousarray(raw[:, :, raw.shape[2] // 2])

    def roughness(values: np.ndarray) -> float:
        values = values.astype(np.float64)
        return np.abs(np.diff(values, axis=0)).mean() / (values.std() or np.inf)

    as_stored = roughness(plane)
    return as_stored > 0.2 and roughness(plane.byteswap()) < 0.6 * as_stored


def read_volume(path: Path) -> Volume:
    """A volume and where its axes run, or :class:`ScanUnusable` with what is wrong with it.

    The orientation is trusted if the file is NIfTI and says it (``sform_code`` or ``qform_code``). Analyze
    says none that can be trusted; its axes are taken to be left-handed, as Analyze defines (to the left,
    front and top).
    """
    pair = {_kind(path): path}
    for there, other in (("hdr", "img"), ("img", "hdr")):
        if there in pair:
            if (half := _beside(path, other)) is None:
                raise ScanUnusable(f"the .{other} beside it is missing; copy it too")
            pair[other] = half
    try:
        image = _loaded_pair(pair["hdr"], pair["img"]) if "hdr" in pair else nibabel.load(path)
        shape, dtype, affine = image.shape, image.get_data_dtype(), np.asarray(image.affine, np.float64)
    except Exception as error:  # nibabel raises many kinds for a file of noise
        raise ScanUnusable(f"it cannot be read ({_line(error)}); copy it again") from None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    shown = "×".join(map(str, shape))
    if len(shape) > 3:
        raise ScanUnusable(f"it is 4D ({shown}), and a T1 scan is one volume; give one of them")
    if len(shape) < 3 or min(shape) < 16:
        raise ScanUnusable(f"it is {shown}, too few planes for a head")
    if np.prod(shape, dtype=float) > _MOST_VOXELS:
        raise ScanUnusable(
            f"it has {np.prod(shape, dtype=float):,.0f} voxels, at most {_MOST_VOXELS:,} are read"
        )
    if dtype.kind not in "iuf":
        raise ScanUnusable(f"it has values of type {dtype}, should be whole or real numbers")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise ScanUnusable(
            "its header has no usable voxel sizes or axes; convert it again from the scanner's files"
        )
    extent = np.linalg.norm(affine[:3, :3], axis=0) * shape
    if extent.min() < _LEAST or extent.max() > _MOST:
        size = "×".join(f"{e:.0f}" for e in extent)
        raise ScanUnusable(f"it covers {size} mm, which is no head; are the voxel sizes in its header right?")
    values = _values(image, shape)
    header = image.header
    nifti = isinstance(header, nibabel.Nifti1Header)
    return Volume(values, affine, bool(nifti and (header["sform_code"] > 0 or header["qform_code"] > 0)))


def _loaded_pair(header: Path, image: Path):
    """A header and its image, each packed or not: nibabel.load wants both alike."""
    with nibabel.openers.ImageOpener(header) as file:
        is_nifti = file.read(348)[344:] == b"ni1\0"
    kind = nibabel.Nifti1Pair if is_nifti else nibabel.Spm2AnalyzeImage
    holders = {"header": header, "image": image, "mat": header.with_suffix(".mat")}  # the last of SPM
    return kind.from_file_map({k: nibabel.FileHolder(filename=str(p)) for k, p in holders.items()})


def _values(image, shape: tuple[int, ...]) -> np.ndarray:
    try:
        raw = np.asarray(image.dataobj.get_unscaled()).reshape(shape)
    except Exception as error:
        raise ScanUnusable(f"it ends early or is damaged ({_line(error)}); copy it again") from None
    if _wrong_byte_order(raw):
        raise ScanUnusable("its bytes are in another order than its header says; convert it again")
    slope, inter = image.dataobj.slope, image.dataobj.inter
    with np.errstate(over="ignore", invalid="ignore"):
        values = raw.astype(np.float32)
        if (slope, inter) != (1, 0):
            values = values * np.float32(slope) + np.float32(inter)
    if odd := int(values.size - np.isfinite(values).sum()):
        raise ScanUnusable(
            f"{odd:,} of its voxels are no numbers (NaN or infinite): export it again, or set them to 0"
        )
    if values.min() == values.max():
        raise ScanUnusable(f"all its voxels are {values.flat[0]:g}: export it again")
    return values


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:80] or type(error).__name__
