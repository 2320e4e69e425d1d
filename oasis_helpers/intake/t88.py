"""OASIS-1's volumes on the Talairach grid, as published or saved again by somebody.

Published is Analyze 7.5 (``.hdr`` + ``.img``), whose header says nothing of the axes that can be trusted;
the order of the file is taken. People save it again as NIfTI, packed or not. If such a header says where the
axes run, they are turned to the left, front and top, as nibabel takes the published files; an affine that is
the identity says nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import nibabel
import numpy as np

from ..layout import COLS, ROWS
from .scans import ScanUnusable

T88 = (ROWS, COLS, 176)
LARGEST = 52 * 2**20  # bytes: a T88 volume in float64 has 52 MB
_AXES = "LAS"


def gunzipped(name: str, content: bytes, largest: int) -> bytes:
    """``content`` without gzip, at most ``largest`` bytes of it, or :class:`ScanUnusable`."""
    unpacker = zlib.decompressobj(wbits=31)
    try:
        raw = unpacker.decompress(content, largest)
    except zlib.error as error:
        raise ScanUnusable(f"{name} cannot be read ({error}); copy it again") from None
    if unpacker.unconsumed_tail:
        raise ScanUnusable(f"{name} unpacks to more than {largest / 1e6:.0f} MB: a bomb")
    if not unpacker.eof:
        raise ScanUnusable(f"{name} ends early; copy it again")
    return raw


def read_t88(role: str, files: dict[str, Callable[[], bytes]]) -> np.ndarray:
    """The volume or mask of a case, (176, 208, 176), first axis left–right, then to the front and the top.

    ``files`` has the bytes of its "hdr" and "img", or of its "nii". Raises :class:`ScanUnusable`.
    """
    if "nii" in files and not {"hdr", "img"} <= files.keys():
        content = files["nii"]()
        header, where = content[:348], f"the {role}"
    else:
        for gone, there in (("hdr", "img"), ("img", "hdr")):
            if gone not in files:
                raise ScanUnusable(
                    f"the .{gone} beside the .{there} of the {role} is missing; unpack it again"
                )
        header, content, where = files["hdr"](), files["img"](), f"the .img of the {role}"
    is_nifti = header[344:348] in (b"n+1\0", b"ni1\0")
    kind = nibabel.Nifti1Pair.header_class if is_nifti else nibabel.AnalyzeHeader
    try:
        parsed = kind(header[:348], check=False)
        shape, dtype = parsed.get_data_shape(), parsed.get_data_dtype()
        offset = int(parsed["vox_offset"])
        slope, inter = parsed.get_slope_inter() if is_nifti else (None, None)
    except Exception as error:  # nibabel raises many kinds for a header of noise
        raise ScanUnusable(f"the header of the {role} cannot be read ({str(error)[:80]})") from None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if sorted(shape) != sorted(T88):
        raise ScanUnusable(f"the {role} is {_shown(shape)}, should be {_shown(T88)}")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise ScanUnusable(f"the {role} has values of type {dtype}, should be whole or real numbers")
    needed = int(np.prod(T88)) * dtype.itemsize
    if offset < 0 or len(content) != offset + needed:
        raise ScanUnusable(f"{where} has {len(content):,} bytes, its header says {offset + needed:,}")
    volume = np.frombuffer(content, dtype, offset=offset).reshape(shape, order="F")
    volume = volume.astype(dtype.newbyteorder("="))
    if (slope, inter) not in ((None, None), (1, 0)):
        volume = volume * np.float32(slope) + np.float32(inter or 0)
    if is_nifti and (parsed["sform_code"] > 0 or parsed["qform_code"] > 0):
        volume = _turned(volume, parsed.get_best_affine())
    if volume.shape != T88:
        raise ScanUnusable(f"the {role} is {_shown(volume.shape)}, should be {_shown(T88)}")
    return volume


def _shown(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _turned(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """A volume whose header says where its axes run, with them to the left, front and top."""
    says_nothing = np.array_equal(affine, np.eye(4)) or not np.isfinite(affine).all()
    if says_nothing or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        return volume
    wanted = nibabel.orientations.axcodes2ornt(_AXES)
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), wanted)
    return nibabel.apply_orientation(volume, turn)
