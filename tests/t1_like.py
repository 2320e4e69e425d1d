"""T1 volumes whose place is known: the ICBM 152 brain with a drawn skull and neck, as scanners store it."""

from functools import cache

import nibabel
import numpy as np
from scipy import ndimage

from oasis_helpers.intake.phantoms import _rotation

SCANNER = (200, 250, 230)  # mm that a scan covers
ORIENTATIONS = [
    nibabel.orientations.axcodes2ornt(codes)
    for x in "RL"
    for y in "AP"
    for z in "SI"
    for codes in ((x, y, z), (x, z, y), (y, x, z), (y, z, x), (z, x, y), (z, y, x))
]


@cache
def brain() -> tuple[np.ndarray, np.ndarray]:
    """The template, 0–1, at 1 mm with room around it, and from its voxels to MNI mm."""
    from nilearn.datasets import load_mni152_template

    image = load_mni152_template(resolution=1)
    affine = image.affine.copy()
    affine[:3, 3] -= 14
    return np.pad(np.asarray(image.dataobj, np.float32), 14), affine


@cache
def head() -> tuple[np.ndarray, np.ndarray]:
    """The same inside a dark skull, a scalp that is brighter than white matter, and on a neck."""
    t1, affine = brain()
    hull = ndimage.binary_closing(t1 > 0.05, iterations=8)
    away = ndimage.distance_transform_edt(~hull)
    found = t1 + 0.1 * ((away > 2) & (away <= 7)) + 1.3 * ((away > 7) & (away < 13))
    x, y, z = (i - n / 2 for i, n in zip(np.indices(t1.shape, sparse=True), t1.shape))
    neck = (x**2 + (y + 20) ** 2 < 55**2) & (z < 25 - t1.shape[2] / 2) & (away > 0)
    return np.where(neck, 0.6, found).astype(np.float32), affine


def world_map(rng: np.random.Generator, degrees: float, shift: float, stretch: float) -> np.ndarray:
    """A random map from MNI mm to a scanner's, (4, 4): turns, shifts and stretches are at most these."""
    found = np.eye(4)
    turn = _rotation(np.deg2rad(rng.uniform(-degrees, degrees, 3)))
    found[:3, :3] = turn @ np.diag(rng.uniform(1 - stretch, 1 + stretch, 3))
    found[:3, 3] = rng.uniform(-shift, shift, 3)
    return found


def scanned(
    made: tuple[np.ndarray, np.ndarray],
    world: np.ndarray,
    zooms=(1.0, 1.0, 1.0),
    rng: np.random.Generator | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A head or brain in the scanner, 0 to about 1000, axes to right, front and top; and its affine.

    With ``rng`` it has a coil's shading and noise.
    """
    affine = np.diag([*zooms, 1.0])
    affine[:3, 3] = [-SCANNER[0] / 2, -SCANNER[1] / 2 - 15, -SCANNER[2] / 2 + 5]
    shape = tuple(int(n / z) for n, z in zip(SCANNER, zooms))
    matrix = np.linalg.inv(made[1]) @ np.linalg.inv(world) @ affine
    found = 800 * ndimage.affine_transform(
        made[0], matrix[:3, :3], matrix[:3, 3], output_shape=shape, order=1
    )
    if rng is not None:
        few = ndimage.gaussian_filter(rng.standard_normal((12, 12, 12)), 3)
        coil = ndimage.zoom(few / few.std(), np.array(shape) / 12, order=1)[
            : shape[0], : shape[1], : shape[2]
        ]
        noise = rng.normal(0, 25, (2, *shape)).astype(np.float32)
        found = np.hypot(found * (1 + 0.12 * coil) + noise[0], noise[1])
    return found.astype(np.float32), affine


def stored(values: np.ndarray, affine: np.ndarray, orientation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same volume with its axes in another order and direction, and the affine that says so."""
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), orientation)
    back = nibabel.orientations.inv_ornt_aff(turn, values.shape)
    return nibabel.apply_orientation(values, turn), affine @ back


def errors(matrix: np.ndarray, affine: np.ndarray, world: np.ndarray) -> np.ndarray:
    """How far some places of the brain in the course's planes are from where they should be, in mm."""
    t1, own = brain()
    places = np.argwhere(t1 > 0.05)[::499] @ own[:3, :3].T + own[:3, 3]
    places = places[(places[:, 2] > 0) & (places[:, 2] < 34)]
    true = np.linalg.inv(affine) @ world
    found = np.linalg.inv(true) @ matrix
    return np.linalg.norm(places @ found[:3, :3].T + found[:3, 3] - places, axis=1)
