"""Phantom subjects: brain slices in the exact form of the OASIS course set, made offline.

Nobody may redistribute OASIS pixels, so this module *makes* subjects. Each is a random, smooth
deformation of the ICBM 152 average brain (shipped with nilearn, see ``NOTICE-ICBM.txt``) with
its right half a little in front of the left. An average has no sulci but the great fissures, so a
cortex is folded around its nuclei; then the brain is aged by a random amount of atrophy and
wrapped in a CSF gap, skull, temporal muscle and scalp. The causes that differ most between subjects, and
what came of them, are written to ``phantoms.csv``: true factors that real data never tells.

Sources: template Fonov et al. 2011 (NeuroImage 54:313) and 2009, Collins et al. 1999;
diffeomorphism by scaling and squaring, Arsigny et al. 2006 (MICCAI); Rician noise,
Gudbjartsson & Patz 1995 (MRM 34:910).
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import get_type_hints

import joblib
import numpy as np
from filelock import FileLock
from platformdirs import user_cache_path
from scipy import ndimage
from tqdm.auto import tqdm

from ..layout import (
    COLS,
    DATASET_FOLDER,
    PLANES,
    ROWS,
    SPLITS,
    DataLocation,
    check_space,
    image_name,
    is_clutter,
    make_folders,
    mask_name,
    pad,
    png_bytes,
    remove_leftovers,
    write_file,
)

RECIPE = 3  # raise when the same seed would no longer give the same bytes

# The course's id ranges. Keeping them means a case has the same split in a small and in a
# large set, so weights trained on the large one never saw the small one's held-out cases.
FIRST_ID = {"train": 1, "validate": 402, "test": 441}
MOST_CASES = {"train": 401, "validate": 39, "test": 559}

FIRST_HEAD, MOST_HEADS, FRESH_HEADS = 1001, 99_000, 1200  # heads of one slice: see make_heads

_FIRST_Z = 1.0  # MNI z of slice 0 in mm: basal ganglia and third ventricle
_CENTRE = np.array([0.0, -16.0, _FIRST_Z + PLANES / 2])  # turning point of a head, MNI mm
_CROP_Z = (-24, 60)  # part of the template kept, MNI mm
_FOLD = 4.8  # scale of the folds: neighbouring sulci are about four times that apart
_SULCUS = (16.0, 5.5)  # depth in mm: mean and deviation
_UPRIGHT = 0.75  # share of a pixel's depth that the field of the folds is read above it
_ROUND = 10  # mm over which the head's outline is smoothed
_MARGIN = 30.0  # mm around the pixels in which that may be
_T88_SCALE = 0.972  # the Talairach atlas head is a little smaller than the MNI one


@dataclass(frozen=True)
class PhantomFactors:
    """The causes of one phantom subject, and the tissue volumes that came of them.

    Volumes are in mm³ over the slices made (1 mm apart, 1 mm² pixels); thicknesses and
    ``ventricle_growth`` in mm; ``atrophy`` in [0, 1]; ``head_scale`` relative to the atlas.
    """

    case: int
    split: str
    atrophy: float
    ventricle_growth: float
    head_scale: float
    csf_gap: float
    skull: float
    scalp: float
    bias: float
    noise: float
    csf_mm3: int
    grey_mm3: int
    white_mm3: int
    ventricle_mm3: int


@dataclass(frozen=True)
class _Template:
    """Fields on the cropped 1 mm ICBM grid, float32; ``origin`` is the MNI mm of voxel 0."""

    grey: np.ndarray
    white: np.ndarray
    texture: np.ndarray  # T1 relative to what its tissue mix predicts
    surface: np.ndarray  # signed distance to the brain hull in mm, negative inside
    outline: np.ndarray  # the same for a rounder hull, which skull and scalp follow
    pial: np.ndarray  # depth in mm below hull and great fissures, positive inside
    ventricle: np.ndarray  # signed distance to the lateral and third ventricles in mm
    origin: np.ndarray


_edt = ndimage.distance_transform_edt


def _signed_distance(region: np.ndarray) -> np.ndarray:
    """Distance to the border of ``region`` in voxels, negative inside."""
    with ThreadPoolExecutor(2) as both:  # scipy computes without the interpreter lock
        outside, inside = both.map(_edt, (~region, region))
    return outside - inside


def _box_around(region: np.ndarray, margin: int) -> tuple[slice, ...]:
    found = ndimage.find_objects(region.astype(np.uint8))[0]
    return tuple(slice(max(s.start - margin, 0), s.stop + margin) for s in found)


def _load_template() -> _Template:
    # nilearn takes seconds to import, and only the parent process needs it
    from nilearn.datasets import (
        load_mni152_gm_template,
        load_mni152_template,
        load_mni152_wm_template,
    )

    image = load_mni152_template(resolution=1)
    origin = image.affine[:3, 3].copy()
    t1, grey, white = (
        np.asarray(i.dataobj, dtype=np.float32)
        for i in (image, load_mni152_gm_template(resolution=1), load_mni152_wm_template(resolution=1))
    )
    low, high = (int(z - origin[2]) for z in _CROP_Z)
    t1, grey, white = (np.pad(v[:, :, low:high], ((12, 12), (12, 12), (0, 0))) for v in (t1, grey, white))
    origin += (-12, -12, low)

    brain = t1 > 0.05
    # Closing over the fissure and the sulci gives the hull that the skull follows.
    near = _box_around(brain, 11)[:2]
    hull = brain.copy()
    hull[near] |= _edt(_edt(~brain[near]) < 10) >= 10
    distance = _signed_distance(hull)
    surface = ndimage.gaussian_filter(distance, 2.0)
    outline = ndimage.gaussian_filter(distance, 7.0)

    csf = np.clip(brain - grey - white, 0, 1)
    x, y, z = np.meshgrid(*(np.arange(n) + o for n, o in zip(t1.shape, origin)), indexing="ij", sparse=True)
    # Deep CSF only: the box holds the lateral and third ventricles and no fissure or sulcus.
    deep = (np.abs(x) < 36) & (y > -52) & (y < 40) & (z > -8) & (z < 30) & (surface < -22)
    deep &= (y > -32) | (z > 2)
    labels, count = ndimage.label((csf > 0.5) & deep)
    sizes = ndimage.sum_labels(np.ones_like(labels), labels, range(1, count + 1))
    inside = np.isin(labels, 1 + np.flatnonzero(sizes > 150))
    # Only the neighbourhood matters: farther than the margin, a distance is as good as another.
    margin = 25
    box = _box_around(inside, margin)
    ventricle = np.full(inside.shape, float(margin), np.float32)
    ventricle[box] = _signed_distance(inside[box])

    # The average keeps the fissures that everybody has at one place; of the other sulci it keeps a blur.
    fissures = (csf > 0.5) & (surface < -3) & (ventricle > 3)
    box = _box_around(brain, 1)
    pial = np.zeros(brain.shape, np.float32)
    pial[box] = np.minimum(-surface[box], _edt(~fissures[box]))
    pial = ndimage.gaussian_filter(pial, 1.0)

    predicted = 0.35 * csf + 0.72 * grey + 0.92 * white
    texture = np.where(brain, t1 - predicted, 0)
    texture = ndimage.gaussian_filter(texture, 1.0) * (surface < -3)
    fields_ = (grey, white, texture, surface, outline, pial, ventricle)
    as_float = (np.ascontiguousarray(v, dtype=np.float32) for v in fields_)
    return _Template(*as_float, origin=origin)


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """Gaussian-filtered white noise with unit standard deviation (float32)."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap")
    return field / field.std()


def _upsample(field: np.ndarray, planes: slice, step: float, margin: float = 0.0) -> np.ndarray:
    """Linear interpolation of a field sampled every ``step`` mm onto the pixels, axis by axis."""
    wanted = (range(ROWS), range(COLS), range(PLANES)[planes])
    for axis, places in reversed(list(enumerate(wanted))):  # the shortest axis first: less to multiply
        position = (np.array(places) + margin) / step
        below = np.minimum(position.astype(int), field.shape[axis] - 2)
        weight = (position - below).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        field = field.take(below, axis) * (1 - weight) + field.take(below + 1, axis) * weight
    return field


def _blobs(rng: np.random.Generator, sigma: float, planes: slice) -> np.ndarray:
    """Smooth noise of scale ``sigma`` mm on the pixels of ``planes``."""
    # A whole case is always drawn, so that fewer slices show the same subject.
    step = max(1.0, sigma / 2.5)  # a smooth field needs few samples
    few = tuple(int(np.ceil(n / step)) + 1 for n in _EXTENT)
    return _upsample(_smooth_noise(rng, few, sigma / step), planes, step)


def _deformation(rng: np.random.Generator, shape: tuple[int, ...], step: float) -> np.ndarray:
    """A random diffeomorphism as a displacement in mm on a grid of spacing ``step`` mm.

    The velocity has two scales (shape of the head, course of the gyri); scaling and squaring
    (Arsigny et al. 2006) integrates it, so that the map never folds.
    """
    velocity = np.stack(
        [
            1.6 * _smooth_noise(rng, shape, 24 / step) + 1.1 * _smooth_noise(rng, shape, 8 / step)
            for _ in range(3)
        ]
    )
    grid = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij"))
    halvings = 5
    displacement = velocity / 2**halvings
    for _ in range(halvings):
        where = grid + displacement / step
        displacement = displacement + np.stack(
            [ndimage.map_coordinates(d, where, order=1, mode="nearest") for d in displacement]
        )
    return displacement


def _rotation(angles: np.ndarray) -> np.ndarray:
    """Rotation matrix from three small angles in radians about x, y and z."""
    (ca, cb, cc), (sa, sb, sc) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    about_y = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    about_z = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


@dataclass(frozen=True)
class _Causes:
    """What makes one subject, drawn from (seed, case) alone. Lengths in mm, intensities as drawn."""

    atrophy: float
    growth: float
    left_growth: float  # how much larger the left ventricle is
    torque: float  # how far the right half lies in front of the left, each way
    cortex: float  # thickness
    sulcus: float  # width
    scale: float
    stretch: np.ndarray
    angles: np.ndarray
    shift: np.ndarray
    gap: float
    skull: float
    scalp: float
    muscle: float
    fat: float
    bias: float
    noise: float
    contrast: np.ndarray  # CSF, grey, white
    field_of_view: np.ndarray  # half widths of the scanned box

    @classmethod
    def draw(cls, rng: np.random.Generator) -> _Causes:
        atrophy = float(rng.beta(1.2, 1.6))
        return cls(
            atrophy=atrophy,
            growth=float(-1.2 + 5.6 * atrophy + 0.45 * rng.standard_normal()),
            left_growth=float(np.clip(rng.normal(0.5, 0.3), -0.3, 1.3)),
            torque=float(np.clip(rng.normal(1.6, 0.8), -0.5, 3.5)),
            cortex=float(np.clip(rng.normal(2.5, 0.2), 2.0, 3.0)),
            sulcus=float(1.7 + 2.0 * atrophy + 0.1 * rng.standard_normal()),
            scale=float(np.clip(rng.normal(0.982, 0.015), 0.94, 1.015)),
            stretch=np.clip(rng.normal(1.0, 0.012, 3), 0.97, 1.03),
            angles=np.deg2rad(np.clip(rng.normal(0, (1.6, 1.2, 1.6)), -4, 4)),
            shift=rng.normal(0, (0.8, 0.6, 1.0)),
            gap=float(rng.uniform(0.8, 1.8) + 1.6 * atrophy),
            skull=float(rng.uniform(4.0, 6.0)),
            scalp=float(rng.uniform(4.4, 6.4)),
            muscle=float(rng.uniform(2.0, 5.0)),
            fat=float(rng.uniform(166, 190)),
            bias=float(rng.uniform(0.04, 0.10)),
            noise=float(rng.uniform(2.8, 4.4)),
            contrast=rng.normal((27, 79, 120), (3.0, 2.0, 2.0)).astype(np.float32),
            field_of_view=np.array([rng.uniform(87, 92), rng.uniform(105, 110)]),
        )

    @property
    def matrix(self) -> np.ndarray:
        """From a subject's mm to the template's, around the centre."""
        return _rotation(self.angles) @ np.diag(1 / (self.scale * _T88_SCALE * self.stretch))


# MNI mm of the pixels, one axis each (x left to right, y to the front, z up), for broadcasting
_X = (np.arange(ROWS, dtype=np.float32) - (ROWS - 1) / 2).reshape(-1, 1, 1)
_Y = (np.arange(COLS, dtype=np.float32) - (COLS - 1) / 2 + np.float32(_CENTRE[1])).reshape(1, -1, 1)
_Z = (_FIRST_Z + np.arange(PLANES, dtype=np.float32)).reshape(1, 1, -1)
_EXTENT = (ROWS, COLS, PLANES)


def _affine(matrix: np.ndarray, z: np.ndarray) -> Iterator[np.ndarray]:
    """Each coordinate of ``matrix @ (pixel - centre)``."""
    for a, b, c in matrix.astype(np.float32):
        yield (
            a * (_X - np.float32(_CENTRE[0]))
            + b * (_Y - np.float32(_CENTRE[1]))
            + c * (z - np.float32(_CENTRE[2]))
        )


def _sources(causes: _Causes, rng: np.random.Generator, origin: np.ndarray, planes: slice) -> np.ndarray:
    """The template voxel that each pixel shows: affine after diffeomorphism, float32 (3, …)."""
    # The grid is sized for a whole case, so that fewer slices show the same subject.
    step, margin = 4.0, 8.0
    displacement = _deformation(rng, tuple(int(np.ceil((n + 2 * margin) / step)) + 1 for n in _EXTENT), step)
    # Interpolation is linear, so turning the few vectors of the grid turns all those between.
    displacement = np.einsum("ij,jxyz->ixyz", causes.matrix.astype(np.float32), displacement)
    voxel = np.stack([_upsample(d, planes, step, margin) for d in displacement])
    offset = (_CENTRE + causes.shift - origin).astype(np.float32)
    for axis, position in enumerate(_affine(causes.matrix, _Z[:, :, planes])):
        voxel[axis] += position + offset[axis]
    # The right half of a brain lies a little in front of the left (Yakovlevian torque).
    voxel[1] -= causes.torque * np.tanh((voxel[0] + np.float32(origin[0])) / 15)
    return voxel


def _rounded(distance: np.ndarray) -> np.ndarray:
    """The distance to a rounder hull, (rows, columns, slices): a skull does not follow every gyrus."""
    around = ((_ROUND * 3,) * 2,) * 2 + ((0, 0),)
    wide = np.pad(distance, around, mode="reflect", reflect_type="odd")  # a distance goes on growing
    wide = ndimage.gaussian_filter(wide, (_ROUND, _ROUND, 0), truncate=3)
    return wide[_ROUND * 3 : -_ROUND * 3, _ROUND * 3 : -_ROUND * 3]


@dataclass(frozen=True)
class _Cortex:
    """Where the sulci are, at some pixels: all in mm, arrays of one shape."""

    depth: np.ndarray  # below hull and fissures
    below: np.ndarray  # below the hull alone
    across: np.ndarray  # distance within the plane to the middle of the nearest sulcus
    bottom: np.ndarray  # how deep that sulcus reaches

    def __getitem__(self, at: np.ndarray) -> _Cortex:
        return _Cortex(*(f.ravel()[at] for f in (self.depth, self.below, self.across, self.bottom)))


def _fold(depth: np.ndarray, outline: np.ndarray, rng: np.random.Generator, planes: slice) -> _Cortex:
    """Sulci for a brain of the given ``depth`` (rows, columns, slices) in mm below its hull.

    A sulcus is where a smooth random field is zero: a sheet. The field is read near the hull, above each
    pixel, so that it changes along the hull and hardly with depth, and the sheets stand upright on it.
    """
    step = _FOLD / 2.5
    few = tuple(int(np.ceil((n + 2 * _MARGIN) / step)) + 1 for n in _EXTENT)
    noise = rng.standard_normal(few, dtype=np.float32)
    fine, coarse = (
        ndimage.gaussian_filter(noise, width / step, mode="wrap") for width in (_FOLD, 1.5 * _FOLD)
    )
    field = (fine - coarse) / (fine - coarse).std()  # a band of scales, so that sulci keep their distance
    bottom = np.clip(_SULCUS[0] + _SULCUS[1] * _blobs(rng, 7, planes), 4, 26)
    winding = [2.0 * _blobs(rng, 5, planes) for _ in range(2)]

    near = np.nonzero((outline > -30) & (outline < 3))  # no sulcus is deeper
    rise = np.stack([r[near] for r in np.gradient(outline, axis=(0, 1))])
    upward = rise * (_UPRIGHT * np.clip(-outline[near], 0, 26) / np.maximum((rise**2).sum(0), 0.25))
    places = np.stack(near).astype(np.float32)
    places[2] += range(PLANES)[planes][0]
    places[:2] += upward + np.stack([w[near] for w in winding])
    there = np.zeros(depth.shape, np.float32)
    there[near] = ndimage.map_coordinates(field, (places + _MARGIN) / step, order=1, mode="nearest")
    slope = np.hypot(*np.gradient(there, axis=(0, 1)))
    return _Cortex(depth, -outline, np.abs(there) / np.maximum(slope, 0.08), bottom)


def _brain(
    template: _Template,
    voxel: np.ndarray,
    causes: _Causes,
    surface: np.ndarray,
    cortex: _Cortex,
    edge: np.ndarray,
    folds: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Intensity and label (0–3) at some pixels, all arrays ``(n,)``, and the ventricles' volume in mm³.

    The nuclei come from the average's soft maps, sharpened; around them a cortex is folded; both age.
    """
    half = 0.5 * causes.sulcus * (1 + 0.8 * np.exp(-cortex.depth / 3))  # sulci open towards the surface
    wall = np.hypot(np.maximum(cortex.across - half, 0), np.maximum(cortex.below - cortex.bottom, 0))
    shell = 1.0 + 1.3 * causes.atrophy + 0.3 * folds
    pia = np.where(wall > 0, np.minimum(wall, cortex.depth - shell), cortex.across - half)
    fluid = _sigmoid(-pia / 0.45)
    of_grey = _sigmoid((causes.cortex + 0.15 * folds - pia) / 0.5)  # the share of grey in the tissue

    # ---- nuclei, inner white matter and ventricles: nothing of them is left farther out
    inner = np.flatnonzero(surface < -14)
    voxel, edge, folds = voxel[:, inner], edge[inner], folds[inner]
    grey, white, texture, ventricle = (
        ndimage.map_coordinates(volume, voxel, order=1, mode="nearest")
        for volume in (template.grey, template.white, template.texture, template.ventricle)
    )
    logits = 2.4 * np.log(np.clip(np.stack([1 - grey - white, grey, white]), 1e-3, None))
    logits[0] += 0.6 + 0.8 * causes.atrophy
    logits[2] += 0.25 - 0.5 * causes.atrophy - 0.3 * folds
    average = np.exp(logits - logits.max(axis=0))
    average /= average.sum(axis=0)
    nuclei = _sigmoid((-surface[inner] - 24) / 2.0)
    left = _sigmoid(-(voxel[0] + template.origin[0]) / 3)
    growth = causes.growth + causes.left_growth * left
    rim = _sigmoid((growth - ventricle + 0.35 * edge) / 0.45)  # the ventricle wall moves outward
    fluid[inner] = 1 - (1 - np.maximum(fluid[inner], nuclei * average[0])) * (1 - rim)
    nucleus = nuclei * average[1] / np.maximum(1 - average[0], 1e-3)
    of_grey[inner] = np.maximum(of_grey[inner], nucleus)

    tissue = 1 - fluid
    probability = np.stack([fluid, tissue * of_grey, tissue * (1 - of_grey)])
    labels = np.where(surface < 0, 1 + probability.argmax(axis=0), 0).astype(np.uint8)
    ventricles = int(((ventricle < growth + 1.5) & (labels[inner] == 1)).sum())
    image = np.tensordot(causes.contrast, probability, 1) * _sigmoid(-surface / 0.5)
    image[inner] += 95 * texture * nuclei * tissue[inner]
    return image, labels, ventricles


def _skull_and_scalp(
    causes: _Causes,
    front: np.ndarray,
    temporal: np.ndarray,
    surface: np.ndarray,
    outline: np.ndarray,
    edge: np.ndarray,
    folds: np.ndarray,
    inner: np.ndarray,
    outer: np.ndarray,
    spongy: np.ndarray,
    fat: np.ndarray,
    fat_grain: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Intensity at some pixels, outward from the brain's hull, and how much they lie in air (0–1).

    All arrays ``(n,)``: ``front`` 0 at the centre to 1 at forehead and occiput, ``temporal`` 1
    where the temporal muscle lies, the distances to the brain's hull and to the rounder one in mm, and smooth
    noise.
    """
    bone_from = causes.gap * (1 + 0.2 * inner)
    muscle_from = bone_from + causes.skull * (1 + 0.03 * edge)
    scalp_from = muscle_from + causes.muscle * temporal + 0.6
    # Thinner over the temples than over forehead and occiput, as in people.
    air_from = scalp_from + causes.scalp * (0.82 + 0.25 * front) * (1 + 0.03 * outer)

    def beyond(start: np.ndarray | float) -> np.ndarray:
        return _sigmoid((outline - start) / 0.45)

    marrow_depth = (outline - bone_from) / np.maximum(muscle_from - bone_from, 1)
    marrow = np.exp(-(((marrow_depth - 0.5) / 0.17) ** 2)) * np.clip(0.55 + 0.5 * spongy, 0, 1.4)
    skin = np.exp(-(((air_from - outline - 1.0) / 1.1) ** 2))
    bone, muscle, scalp, air = map(beyond, (bone_from, muscle_from, scalp_from, air_from))
    hull = _sigmoid(surface / 0.45)
    bone *= hull  # where the brain bulges
    image = 34 * hull * (1 - bone)
    image += (14 + 62 * marrow) * bone * (1 - muscle)
    image += (64 + 7 * folds) * muscle * (1 - scalp)
    image += (causes.fat * (1 + 0.13 * fat + 0.07 * fat_grain) - 85 * skin) * scalp * (1 - air)
    return image, _sigmoid((outline - air_from - 2) / 1.5)


def _render(template: _Template, case: int, split: str, planes: slice, seed: int):
    """One subject: images and masks of ``planes`` as uint8 ``(slices, 256, 256)``, and its factors."""
    # ---- everything random, in this order: the causes first, so that they depend on (seed, case) alone
    rng = np.random.default_rng([seed, case])
    causes = _Causes.draw(rng)
    voxel = _sources(causes, rng, template.origin, planes)
    edge, folds, inner, outer, spongy, fat, fat_grain, coil = (
        _blobs(rng, sigma, planes) for sigma in (14, 2.2, 9, 14, 5, 3.5, 1.2, 38)
    )
    z = _Z[:, :, planes]
    shape = (ROWS, COLS, z.size)
    depth, surface, outline = (
        ndimage.map_coordinates(field, voxel, order=1, mode="nearest")
        for field in (template.pial, template.surface, template.outline)
    )
    outline = _rounded(outline)
    cortex = _fold(depth, outline, rng, planes)

    # ---- the subject. Beyond ten widths of their soft borders nothing is left of brain or
    # skull, so each is computed on its own side of the hull only.
    image = np.zeros(shape, np.float32)
    labels = np.zeros(shape, np.uint8)
    in_air = np.zeros(shape, np.float32)
    at = np.flatnonzero(surface < 5)
    image.flat[at], labels.flat[at], ventricles = _brain(
        template,
        voxel.reshape(3, -1)[:, at],
        causes,
        surface.ravel()[at],
        cortex[at],
        edge.ravel()[at],
        folds.ravel()[at],
    )
    at = np.flatnonzero((surface > -5) | (outline > -5))
    front = np.broadcast_to(np.abs(_Y - np.float32(_CENTRE[1])) / 90, shape)
    temporal = np.exp(-(((_Y - 22) / 26) ** 2)) * (_sigmoid((np.abs(_X) - 48) / 4) * _sigmoid((16 - z) / 5))
    fields = (front, temporal, surface, outline, edge, folds, inner, outer, spongy, fat, fat_grain)
    outside, in_air.flat[at] = _skull_and_scalp(causes, *(f.ravel()[at] for f in fields))
    image.flat[at] += outside

    # ---- the scanner: coil sensitivity, Rician noise, field of view, 8 bits. The noise is drawn last, for it
    # is as large as the slices wanted, and all before it is to be that of the whole case.
    receiver = [
        ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), (0.5, 0.5, 0.3)) for _ in "ri"
    ]
    image = np.maximum(image, 0) * (1 + causes.bias * np.clip(coil, -2.5, 2.5))
    damp = 1 - 0.72 * in_air  # averaging and filtering leave less noise in air
    real, imaginary = (damp * (causes.noise / n.std()) * n for n in receiver)
    image = np.hypot(image + real, imaginary)
    for position, half_width in zip(_affine(causes.matrix[:2], z), causes.field_of_view):
        image[np.abs(position) > half_width] = 0

    pixels = np.moveaxis(image, 2, 0)
    pixels = np.round(pixels * (255 / pixels.max(axis=(1, 2), keepdims=True))).astype(np.uint8)
    images = np.stack([pad(plane) for plane in pixels])
    masks = np.stack([pad(85 * plane) for plane in np.moveaxis(labels, 2, 0)])
    volumes = np.bincount(labels.ravel(), minlength=4)
    measured = (
        causes.atrophy, causes.growth, causes.scale, causes.gap, causes.skull, causes.scalp, causes.bias,
        causes.noise,
    )  # fmt: skip
    factors = PhantomFactors(
        case,
        split,
        *(round(v, 4) for v in measured),
        *(int(v) for v in volumes[1:]),
        ventricle_mm3=ventricles,
    )
    return images, masks, factors


def _paths(root: Path, split: str, case: int, planes: slice) -> Iterator[tuple[Path, Path]]:
    for index in range(PLANES)[planes]:
        yield (
            root / f"{DATASET_FOLDER}_{split}" / image_name(case, index),
            root / f"{DATASET_FOLDER}_seg_{split}" / mask_name(case, index),
        )


def _make_case(
    template: _Template, root: Path, split: str, case: int, planes: slice, seed: int
) -> PhantomFactors:
    images, masks, factors = _render(template, case, split, planes, seed)
    for (image_path, mask_path), image, mask in zip(_paths(root, split, case, planes), images, masks):
        write_file(image_path, png_bytes(image))
        write_file(mask_path, png_bytes(mask))
    return factors


def _write_factors(root: Path, rows: dict[int, PhantomFactors]) -> None:
    lines = [",".join(f.name for f in fields(PhantomFactors))]
    lines += [",".join(map(str, astuple(rows[case]))) for case in sorted(rows)]
    write_file(root / "phantoms.csv", ("\n".join(lines) + "\n").encode())


def read_factors(root: Path) -> dict[int, PhantomFactors]:
    """The factors of the finished phantoms in ``root`` by case id, from ``phantoms.csv``.

    Empty if there is no such file; raises ``ValueError`` if it is not as :func:`make_phantoms` wrote it.
    """
    path = root / "phantoms.csv"
    if not path.exists():
        return {}
    kinds = get_type_hints(PhantomFactors)
    found = {}
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                factors = PhantomFactors(**{name: kind(row[name]) for name, kind in kinds.items()})
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number} is no row of phantoms ({error}). Delete it and make them again."
                ) from None
            found[factors.case] = factors
    return found


def _claim(root: Path, plan: dict) -> None:
    """Take ``root`` for this plan, or refuse a folder that holds something else."""
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"{root} is a file. Give a folder for the phantoms.")
    plan_file = root / "phantoms.json"
    if plan_file.exists():
        found = json.loads(plan_file.read_text(encoding="utf-8"))
        if found != plan:
            differing = ", ".join(
                f"{k} {found.get(k)!r} ≠ {plan[k]!r}" for k in plan if found.get(k) != plan[k]
            )
            raise FileExistsError(
                f"{root} holds phantoms made otherwise ({differing}). "
                "Choose another folder or delete that one."
            )
        return
    if root.exists() and any(not is_clutter(p.name) for p in root.iterdir()):
        raise FileExistsError(
            f"{root} is not empty and holds no phantoms. Choose a new folder: nothing there is overwritten."
        )
    root.mkdir(parents=True, exist_ok=True)
    write_file(plan_file, (json.dumps(plan, indent=1) + "\n").encode())


def phantom_cache() -> Path:
    """Where the default phantoms are kept: the user's cache folder, one per recipe."""
    return user_cache_path("oasis-diffusion", appauthor=False) / f"phantoms-r{RECIPE}-seed0"


def make_phantoms(
    out: str | Path,
    cases: tuple[int, int, int] = (36, 6, 6),
    slices: int = PLANES,
    seed: int = 0,
    workers: int | None = None,
) -> DataLocation:
    """Make phantom subjects in the layout of the OASIS course set.

    ``cases`` counts the (train, validate, test) subjects; each has ``slices`` (1–32)
    axial planes of 256×256 pixels (mode L, 0–255) and as many masks (0/85/170/255 =
    background/CSF/grey/white). Beside the six folders, ``phantoms.csv`` has one row of
    :class:`PhantomFactors` per case. ``workers`` is the number of processes (default:
    the number of CPUs). The bytes depend on ``seed``, the case id and ``slices`` only.

    An interrupted call, repeated, keeps the finished cases and makes the rest. Raises
    ``ValueError`` for impossible numbers and ``FileExistsError`` when ``out`` holds
    anything but phantoms of the same ``seed``, ``cases`` and ``slices``.
    """
    cases = tuple(int(n) for n in cases)
    if len(cases) != 3:
        raise ValueError(f"cases is {cases}: give three numbers (train, validate, test).")
    for split, count in zip(SPLITS, cases):
        if not 0 <= count <= MOST_CASES[split]:
            raise ValueError(f"{split} has {count} cases: give 0 to {MOST_CASES[split]}.")
    if sum(cases) == 0:
        raise ValueError("cases is (0, 0, 0): ask for at least one case.")
    if not 1 <= slices <= PLANES:
        raise ValueError(f"slices is {slices}: give 1 to {PLANES}.")
    _check_makers(seed, workers)
    plan = {"recipe": RECIPE, "seed": seed, "cases": list(cases), "slices": slices}
    wanted = [
        (split, FIRST_ID[split] + i, slice(slices))
        for split, count in zip(SPLITS, cases)
        for i in range(count)
    ]
    return _make(Path(out).expanduser(), plan, wanted, workers)


def make_heads(out: str | Path, count: int, seed: int = 0, workers: int | None = None) -> DataLocation:
    """Make ``count`` phantom heads with one slice each, at a height of its own, all in the test split.

    Their ids begin at 1001, so that no head of :func:`make_phantoms` is among them. Slices of one head are
    no independent observations; these are. Otherwise as :func:`make_phantoms`, errors included.
    """
    if not 1 <= count <= MOST_HEADS:
        raise ValueError(f"count is {count}: give 1 to {MOST_HEADS:,} heads.")
    _check_makers(seed, workers)
    heights = np.random.default_rng([seed, FIRST_HEAD]).integers(0, PLANES, MOST_HEADS).tolist()
    wanted = [("test", FIRST_HEAD + i, slice(at, at + 1)) for i, at in enumerate(heights[:count])]
    return _make(Path(out).expanduser(), {"recipe": RECIPE, "seed": seed, "heads": count}, wanted, workers)


def fresh_heads() -> DataLocation:
    """The 1,200 heads that samples are compared with: in the user's cache, made once, in some minutes."""
    root = phantom_cache().with_name(f"phantoms-r{RECIPE}-fresh")
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(Path(tempfile.gettempdir()) / f"oasis-diffusion-{root.name}.lock"):  # two notebooks at once
        return make_heads(root, FRESH_HEADS)


def _check_makers(seed: int, workers: int | None) -> None:
    if seed < 0:
        raise ValueError(f"seed is {seed}: give 0 or more.")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}: give 1 or more.")


def _make(root: Path, plan: dict, wanted: list[tuple[str, int, slice]], workers: int | None) -> DataLocation:
    """Make what is missing of ``wanted`` (split, case, planes) in a folder that belongs to ``plan``."""
    _claim(root, plan)
    make_folders(root)
    done = read_factors(root)
    missing = [
        (root, split, case, planes, plan["seed"])
        for split, case, planes in wanted
        if case not in done or not all(p.exists() for pair in _paths(root, split, case, planes) for p in pair)
    ]
    if missing:
        files = sum(len(range(PLANES)[planes]) for *_, planes, _ in missing)
        check_space(root, files * 45_000, f"{len(missing)} cases")
        remove_leftovers(root)
        workers = min(workers or joblib.cpu_count(), len(missing))
        with tqdm(total=len(missing), desc="phantoms", unit="case", file=sys.stderr) as bar:
            for number, factors in enumerate(_factors(missing, workers), 1):
                done[factors.case] = factors
                if number % 8 == 0 or number == len(missing):  # a head is quickly made, and the table long
                    _write_factors(root, done)
                bar.update()
    return DataLocation(root, "phantoms")


def _factors(jobs: list[tuple], workers: int) -> Iterator[PhantomFactors]:
    # joblib's processes need no main guard in the caller's script, and share the template by memory map.
    template = _load_template()
    yield from joblib.Parallel(workers, return_as="generator")(
        joblib.delayed(_make_case)(template, *job) for job in jobs
    )


# ---- something to find ------------------------------------------------------------------------


def plant_lesion(
    image: np.ndarray,
    classes: np.ndarray,
    rng: np.random.Generator,
    *,
    radius: tuple[float, float] = (2.5, 4.5),
) -> tuple[np.ndarray, np.ndarray]:
    """A slice with a dark spot in its white matter, and where it is: float (H, W) in [−1, 1], bool (H, W).

    An ellipse with soft edge and half-axes from ``radius`` (pixels), nearly as dark as the slice's CSF: what
    an old infarct or a plaque of multiple sclerosis looks like on a T1 image. ``classes`` are the tissues of
    the slice, (H, W). The given arrays stay as they are. Raises ``ValueError`` for a slice without room.
    """
    room = np.argwhere(ndimage.binary_erosion(classes == 3))
    if not len(room):
        raise ValueError("this slice has no white matter with a pixel of it all around: choose another.")
    centre = rng.choice(room)
    axes = rng.uniform(*radius, size=2)
    rows, columns = np.indices(image.shape)
    distance = np.hypot((rows - centre[0]) / axes[0], (columns - centre[1]) / axes[1])
    share = _sigmoid(6 * (1 - distance)) * (classes > 0)
    fluid, white = (np.median(image[classes == tissue]) for tissue in (1, 3))
    return image + share * (0.7 * fluid + 0.3 * white - image), share > 0.5
