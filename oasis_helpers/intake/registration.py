"""Where a T1-weighted head lies in the frame of the ICBM 152 template: an affine map, by SimpleITK.

The template (shipped with nilearn) is a brain without its skull, so only what lies in it and up to 4 mm
around it is compared: there every T1 image has bright white matter, grey cortex and a dark rim, with skull
or without. First a few starts are registered coarsely with seven parameters (rotation, shift, size), then
the best with all twelve. The template is symmetric: which side is left comes from the file and from nothing
else.

SimpleITK: Lowekamp et al. 2013, Front. Neuroinform. 7:45. Mutual information: Mattes et al. 2003, IEEE
Trans. Med. Imaging 22:120. Template: Fonov et al. 2011, NeuroImage 54:313.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

import nibabel
import numpy as np
from scipy import ndimage

_FINE, _COARSE = 2, 6  # mm: grids that are compared
_RIM = 4  # mm around the brain that are compared too
_HEAD = 150.0  # mm from the top of a head to below its brain
_NODS = (-25, 0, 25)  # degrees: a head on its chin or in its neck is the commonest tilt


@dataclass(frozen=True)
class Fit:
    """A registered volume: ``matrix`` (4, 4) takes template mm to voxels of the volume as it is stored.

    ``similarity`` is the correlation with the template in and around the brain, at most 1. ``axes`` names
    where the stored axes run, as "RAS", by which the registration began.
    """

    matrix: np.ndarray
    similarity: float
    axes: str


def need_simpleitk():
    """SimpleITK, or ``ValueError`` with what to install."""
    try:
        import SimpleITK
    except ImportError:
        raise ValueError(
            "Volumes are registered by SimpleITK, which is not installed: pip install SimpleITK, or "
            "pip install -e '.[volumes]' in the project's folder."
        ) from None
    return SimpleITK


@dataclass(frozen=True)
class _Grid:
    """A T1 volume on a regular grid along its own axes: ``corner`` and ``step`` in mm."""

    values: np.ndarray
    corner: np.ndarray
    step: np.ndarray

    def image(self):
        sitk = need_simpleitk()
        image = sitk.GetImageFromArray(np.ascontiguousarray(self.values.T, dtype=np.float32))
        image.SetSpacing([float(s) for s in self.step])
        image.SetOrigin([float(c) for c in self.corner])
        return image


@cache
def _template(step: int) -> tuple[_Grid, np.ndarray]:
    """The template every ``step`` mm, and where it is compared."""
    from nilearn.datasets import load_mni152_template

    image = load_mni152_template(resolution=1)
    t1 = np.asarray(image.dataobj, dtype=np.float32)
    near = ndimage.binary_dilation(t1 > 0.05, iterations=_RIM)
    every = (slice(None, None, step),) * 3
    smooth = ndimage.gaussian_filter(t1, step / 2.4)
    return _Grid(smooth[every], image.affine[:3, 3].copy(), np.full(3, float(step))), near[every]


def _reduced(values: np.ndarray, zooms: np.ndarray, step: float) -> _Grid:
    """Means over blocks of about ``step`` mm, the fat above the 99.5th percentile cut off."""
    blocks = np.maximum(1, np.round(step / zooms)).astype(int)
    for axis, n in enumerate(blocks):
        if n > 1:
            starts = np.arange(0, values.shape[axis] - n + 1, n)
            total = sum(values.take(starts + i, axis).astype(np.float32) for i in range(n))
            values = total / n
    bright = values[values > values.mean()]
    values = np.clip(values, 0, np.percentile(bright, 99.5) if len(bright) else None)
    return _Grid(values.astype(np.float32), (blocks - 1) / 2 * zooms, blocks * zooms)


def _rotations() -> list[np.ndarray]:
    """The 24 turns of a cube, as nibabel's orientations: where each axis goes, and whether it is flipped."""
    found = []
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        matrix = np.zeros((3, 3))
        matrix[range(3), order] = signs
        if np.linalg.det(matrix) > 0:
            found.append(np.stack([order, signs], axis=1).astype(float))
    return found


def _middle(grid: _Grid, to_world: np.ndarray) -> np.ndarray:
    """World mm of the middle of the head without its neck: what lies at most 150 mm below its top."""
    values = grid.values
    inside = values > 0.5 * values[values > values.mean()].mean() if values.any() else values > 0
    inside = ndimage.binary_opening(inside) if inside.any() else inside
    places = np.argwhere(inside if inside.any() else values >= values.mean())
    world = (places * grid.step + grid.corner) @ to_world[:3, :3].T + to_world[:3, 3]
    top = np.percentile(world[:, 2], 99.8)
    return world[world[:, 2] > top - _HEAD].mean(axis=0)


def _turn_about_x(degrees: float) -> np.ndarray:
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def _method(share: float, rate: float, iterations: int):
    sitk = need_simpleitk()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # sums in one order: the same bytes each time
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricSamplingStrategy(method.RANDOM if share < 1 else method.NONE)
    method.SetMetricSamplingPercentage(share, seed=1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(rate, 1e-3, iterations, 0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    return method


def _optimised(fixed: _Grid, near: np.ndarray, moving: _Grid, start, share, rate, iterations):
    """``start`` (a transform from fixed to moving mm) moved to the nearest optimum."""
    sitk = need_simpleitk()
    method = _method(share, rate, iterations)
    mask = sitk.Cast(_Grid(near, fixed.corner, fixed.step).image(), sitk.sitkUInt8)
    method.SetMetricFixedMask(mask)
    method.SetInitialTransform(start, inPlace=True)
    try:
        method.Execute(fixed.image(), moving.image())
    except RuntimeError:  # nothing of the two overlaps: no start to go on from
        return None
    return start


def _matrix_of(transform) -> np.ndarray:
    linear = np.array(transform.GetMatrix()).reshape(3, 3)
    centre, shift = np.array(transform.GetCenter()), np.array(transform.GetTranslation())
    found = np.eye(4)
    found[:3, :3], found[:3, 3] = linear, centre + shift - linear @ centre
    return found


def _similarity(moving: _Grid, matrix: np.ndarray, step: int) -> float:
    """Correlation of template and volume under ``matrix`` (template to moving mm), where compared."""
    fixed, near = _template(step)
    places = np.argwhere(near) * fixed.step + fixed.corner
    voxels = ((places @ matrix[:3, :3].T + matrix[:3, 3]) - moving.corner) / moving.step
    seen = ndimage.map_coordinates(moving.values, voxels.T, order=1, cval=0.0)
    if seen.std() == 0:
        return 0.0
    return float(np.corrcoef(seen, fixed.values[near])[0, 1])


def _starts(moving: _Grid, to_world: np.ndarray, nods: tuple[int, ...]):
    """Transforms from template mm to moving mm: middle on middle, upright by the header, and nodding."""
    sitk = need_simpleitk()
    fixed, _ = _template(_COARSE)
    origin = _middle(fixed, np.eye(4))
    goal = np.linalg.inv(to_world) @ np.append(_middle(moving, to_world), 1)
    u, _, v = np.linalg.svd(np.linalg.inv(to_world[:3, :3]))
    for nod in nods:
        start = sitk.Similarity3DTransform()
        start.SetCenter([float(c) for c in origin])
        start.SetMatrix((u @ v @ _turn_about_x(nod)).ravel().tolist(), 1e-6)
        start.SetTranslation((goal[:3] - origin).tolist())
        yield start


def _coarse(moving: _Grid, starts, iterations: int):
    """The best similarity transform near ``starts`` on the coarse grid, and how similar it makes them."""
    fixed, near = _template(_COARSE)
    best = (-1.0, None)
    for start in starts:
        found = _optimised(fixed, near, moving, start, 1.0, 4.0, iterations)
        if found is not None:
            best = max(best, (_similarity(moving, _matrix_of(found), _COARSE), found), key=lambda b: b[0])
    return best


def _affine(moving: _Grid, start) -> np.ndarray:
    sitk = need_simpleitk()
    found = sitk.AffineTransform(3)
    found.SetCenter(start.GetCenter())
    found.SetMatrix(start.GetMatrix())
    found.SetTranslation(start.GetTranslation())
    fixed, near = _template(_FINE)
    for share, rate, iterations in ((0.05, 1.0, 60), (0.25, 0.3, 60)):
        found = _optimised(fixed, near, moving, found, share, rate, iterations) or found
    return _matrix_of(found)


def register(values: np.ndarray, affine: np.ndarray, *, trusted: bool = True) -> Fit:
    """Register a T1 volume ``values`` (X, Y, Z) to the template.

    ``affine`` (4, 4) takes voxels to mm, the axes to right, front and top. If it is not ``trusted``, only
    its voxel sizes and its handedness are believed, and the 24 ways in which a head can lie in the file are
    compared. Raises ``ValueError`` if SimpleITK is not installed.
    """
    towards = nibabel.io_orientation(affine)
    upright = nibabel.apply_orientation(values, towards)
    stored = nibabel.orientations.inv_ornt_aff(towards, values.shape)  # voxels of ``upright`` → of ``values``
    affine = affine @ stored
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    if trusted:
        turns, nods = [np.array([[0, 1], [1, 1], [2, 1]], float)], _NODS
    else:
        turns, nods = _rotations(), (0,)
    found = []
    for turn in turns:
        turned = nibabel.apply_orientation(upright, turn)
        back = nibabel.orientations.inv_ornt_aff(turn, upright.shape)  # voxels of ``turned`` → of ``upright``
        steps = np.abs(back[:3, :3].T) @ zooms
        coarse = _reduced(turned, steps, _COARSE)
        to_world = affine @ np.diag([*(1 / zooms), 1]) if trusted else np.eye(4)
        similarity, start = _coarse(coarse, _starts(coarse, to_world, nods), 80 if trusted else 15)
        if start is not None:
            found.append((similarity, start, turn, back, steps, coarse))
    best = sorted(found, key=lambda f: -f[0])[:2]
    if not trusted:  # of many, looked at briefly, the likeliest again
        best = [(*_coarse(f[-1], [f[1], *_starts(f[-1], np.eye(4), _NODS)], 80), *f[2:]) for f in best]
    best = [f for f in best if f[1] is not None]
    if not best:
        return Fit(np.eye(4), 0.0, "".join(nibabel.aff2axcodes(affine)))
    _, start, turn, back, steps, _ = max(best, key=lambda f: f[0])
    fine = _reduced(nibabel.apply_orientation(upright, turn), steps, _FINE)
    matrix = _affine(fine, start)
    similarity = _similarity(fine, matrix, _FINE)
    to_stored = stored @ back @ np.diag([*(1 / steps), 1])
    axes = nibabel.aff2axcodes(np.linalg.inv(stored @ back))
    return Fit(to_stored @ matrix, similarity, "".join(axes))
