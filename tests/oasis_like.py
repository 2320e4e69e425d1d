"""Make what OASIS publishes, in miniature and without a pixel of it: files in its forms and names."""

import io
import tarfile
import zipfile
from pathlib import Path

import nibabel
import numpy as np

from oasis_helpers.intake import phantoms
from oasis_helpers.intake.convert import FIRST_PLANE, NEURITE, T88
from oasis_helpers.layout import COLS, DATASET_FOLDER, PLANES, ROWS, SIDE, png_bytes

SCAN = "OAS1_{case:04d}_MR{session}"


def phantom_volume() -> tuple[np.ndarray, np.ndarray]:
    """A head (int16, up to about 3,000) and its labels (0–3) on the T88 grid, from one phantom."""
    images, masks, _ = phantoms._render(phantoms._load_template(), 1, "train", slice(PLANES), 0)
    top, left = (SIDE - ROWS) // 2, (SIDE - COLS) // 2
    planes = np.moveaxis(images[:, top : top + ROWS, left : left + COLS], 0, 2)
    labels = np.moveaxis(masks[:, top : top + ROWS, left : left + COLS], 0, 2) // 85
    head, tissue = np.zeros(T88, np.int16), np.zeros(T88, np.uint8)
    where = np.s_[:, :, FIRST_PLANE : FIRST_PLANE + PLANES]
    head[where] = planes.astype(np.int16) * 11  # a scanner's units, not 8 bits
    tissue[where] = labels
    head[:, :, :FIRST_PLANE] = (
        head[:, :, FIRST_PLANE : FIRST_PLANE + 1] // 2
    )  # something below, nothing above
    return head, tissue


def analyze(
    volume: np.ndarray, *, big: bool = True, trailing: bool = True, orient: int = 0
) -> tuple[bytes, bytes]:
    """A volume as Analyze 7.5: the bytes of its .hdr and of its .img."""
    header = nibabel.AnalyzeHeader(endianness=">" if big else "<")
    header.set_data_dtype(volume.dtype)
    header.set_data_shape((*volume.shape, 1) if trailing else volume.shape)
    header.set_zooms((1.0,) * (len(volume.shape) + trailing))
    written = io.BytesIO()
    header.write_to(written)
    raw = bytearray(written.getvalue())
    raw[252] = orient  # a field that nobody may trust
    return bytes(raw), volume.astype(volume.dtype.newbyteorder(">" if big else "<")).tobytes(order="F")


def subject_files(
    case: int,
    head: np.ndarray,
    labels: np.ndarray | None,
    *,
    session: int = 1,
    scans: int = 4,
    stripped: np.ndarray | None = None,
    **header,
) -> dict[str, bytes]:
    """The files of one session by their path below a disc, as far as they matter, and two that do not."""
    scan = SCAN.format(case=case, session=session)
    stem = f"{scan}_mpr_n{scans}_anon_111_t88"
    place = f"{scan}/PROCESSED/MPRAGE/T88_111/{stem}"
    files = {f"{scan}/{scan}.txt": b"SESSION ID: ", f"{scan}/RAW/{scan}_mpr-1_anon.img": b"\0" * 512}
    files[f"{place}_gfc.hdr"], files[f"{place}_gfc.img"] = analyze(head, **header)
    if stripped is None and labels is not None:
        stripped = np.where(labels > 0, head, 0).astype(head.dtype)
    if stripped is not None:
        files[f"{place}_masked_gfc.hdr"], files[f"{place}_masked_gfc.img"] = analyze(stripped, **header)
    if labels is not None:
        segmentation = f"{scan}/FSL_SEG/{stem}_masked_gfc_fseg"
        files[f"{segmentation}.hdr"], files[f"{segmentation}.img"] = analyze(labels, **header)
    return files


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_tar(path: Path, files: dict[str, bytes], *, packed: bool = True) -> Path:
    with tarfile.open(path, "w:gz" if packed else "w", **({"compresslevel": 1} if packed else {})) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def course_files(
    cases: dict[int, str], *, top: str = "keras_png_slices_data/", seed: int = 0
) -> dict[str, bytes]:
    """Slices and masks of the course set by name: every slice a square that tells case and slice."""
    files = {}
    for case, split in cases.items():
        for k in range(PLANES):
            image, mask = np.zeros((SIDE, SIDE), np.uint8), np.zeros((SIDE, SIDE), np.uint8)
            image[60:180, 60:180] = (case * 7 + k * 3 + seed) % 200 + 10
            image[100, 100], mask[90:120, 90:120] = 255, 170
            files[f"{top}{DATASET_FOLDER}_{split}/case_{case:03d}_slice_{k}.nii.png"] = png_bytes(image)
            files[f"{top}{DATASET_FOLDER}_seg_{split}/seg_{case:03d}_slice_{k}.nii.png"] = png_bytes(mask)
    return files


def nifti(values: np.ndarray) -> bytes:
    import gzip

    return gzip.compress(nibabel.Nifti1Image(values, np.eye(4)).to_bytes(), 1, mtime=0)


def neurite_files(cases: list[int]) -> dict[str, bytes]:
    files = {"neurite-oasis.v1.0/subjects.txt": b"OASIS_OAS1_0001_MR1\n"}
    for case in cases:
        norm = np.zeros(NEURITE, np.float32)
        norm[30:130, 40:150] = 0.5
        norm[40, 50] = 1.0
        labels = np.zeros(NEURITE, np.float32)
        labels[30:130, 40:150] = 1 + np.arange(110) % 4
        place = f"neurite-oasis.v1.0/OASIS_OAS1_{case:04d}_MR1"
        files[f"{place}/slice_norm.nii.gz"], files[f"{place}/slice_seg4.nii.gz"] = nifti(norm), nifti(labels)
        files[f"{place}/slice_orig.nii.gz"] = nifti(norm)
    return files
