"""Phantom subjects: brain slices in the exact form of the OASIS course set, made offline.

Nobody may redistribute OASIS pixels, so this module *makes* subjects. Each is a random,
smooth deformation of the ICBM 152 average brain (shipped with nilearn, see
``NOTICE-ICBM.txt``), aged by a random amount of atrophy, and wrapped in a CSF gap, skull,
temporal muscle and scalp. Every number that shaped a subject is written to
``phantoms.csv``: the true factors that real data never tells.

Sources: template Fonov et al. 2011 (NeuroImage 54:313) and 2009, Collins et al. 1999;
diffeomorphism by scaling and squaring, Arsigny et al. 2006 (MICCAI); Rician noise,
Gudbjartsson & Patz 1995 (MRM 34:910).
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm.auto import tqdm

from .layout import DATASET_FOLDER, SIDE, SPLITS, DataLocation, image_name, mask_name

RECIPE = 1  # raise when the same seed would no longer give the same bytes

# The course's id ranges. Keeping them means a case has the same split in a small and in a
# large set, so weights trained on the large one never saw the small one's held-out cases.
FIRST_ID = {"train": 1, "validate": 402, "test": 441}
MOST_CASES = {"train": 401, "validate": 39, "test": 559}

ROWS, COLS = 176, 208  # T88 plane, left to right and posterior to anterior; padded to SIDE
PLANES = 32  # most consecutive 1 mm axial planes a case can have, inferior to superior
_FIRST_Z = 1.0  # MNI z of slice 0 in mm: basal ganglia and third ventricle
_CENTRE = np.array([0.0, -16.0, _FIRST_Z + PLANES / 2])  # turning point of a head, MNI mm
_CROP_Z = (-24, 60)  # part of the template kept, MNI mm
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
    ventricle: np.ndarray  # signed distance to the lateral and third ventricles in mm
    origin: np.ndarray


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
    distance = ndimage.distance_transform_edt(~brain)
    hull = ndimage.distance_transform_edt(distance < 10) >= 10
    hull |= brain
    surface = ndimage.distance_transform_edt(~hull) - ndimage.distance_transform_edt(hull)
    surface = ndimage.gaussian_filter(surface, 2.0)

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
    box = tuple(
        slice(max(s.start - margin, 0), s.stop + margin)
        for s in ndimage.find_objects(inside.astype(np.uint8))[0]
    )
    ventricle = np.full(inside.shape, float(margin), np.float32)
    ventricle[box] = ndimage.distance_transform_edt(~inside[box]) - ndimage.distance_transform_edt(
        inside[box]
    )

    predicted = 0.35 * csf + 0.72 * grey + 0.92 * white
    texture = np.where(brain, t1 - predicted, 0)
    texture = ndimage.gaussian_filter(texture, 1.0) * (surface < -3)
    as_float = (np.ascontiguousarray(v, dtype=np.float32) for v in (grey, white, texture, surface, ventricle))
    return _Template(*as_float, origin=origin)


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """Gaussian-filtered white noise with unit standard deviation (float32)."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap")
    return field / field.std()


def _deformation(rng: np.random.Generator, shape: np.ndarray, step: float) -> np.ndarray:
    """A random diffeomorphism as a displacement in mm on a grid of spacing ``step`` mm.

    The velocity has two scales (shape of the head, course of the gyri); scaling and squaring
    (Arsigny et al. 2006) integrates it, so that the map never folds.
    """
    velocity = np.stack(
        [
            1.9 * _smooth_noise(rng, shape, 24 / step) + 1.1 * _smooth_noise(rng, shape, 8 / step)
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


def _upsample(field: np.ndarray, shape: tuple[int, ...], step: float, margin: float = 0.0) -> np.ndarray:
    """Linear interpolation of a field sampled every ``step`` mm onto 1 mm voxels, axis by axis."""
    for axis, size in enumerate(shape):
        position = (np.arange(size) + margin) / step
        below = np.minimum(position.astype(int), field.shape[axis] - 2)
        weight = (position - below).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        field = field.take(below, axis) * (1 - weight) + field.take(below + 1, axis) * weight
    return field


def _rotation(angles: np.ndarray) -> np.ndarray:
    """Rotation matrix from three small angles in radians about x, y and z."""
    (ca, cb, cc), (sa, sb, sc) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    about_y = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    about_z = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


def _render(template: _Template, case: int, split: str, slices: int, seed: int):
    """One subject: images and masks as uint8 ``(slices, 256, 256)``, and its factors."""
    rng = np.random.default_rng([seed, case])
    # ---- the causes. All are drawn first, in this order, so that they depend on (seed, case) alone.
    atrophy = float(rng.beta(1.2, 1.6))
    growth = float(-1.2 + 5.6 * atrophy + 0.45 * rng.standard_normal())
    scale = float(np.clip(rng.normal(1.0, 0.018), 0.95, 1.035))
    stretch = np.clip(rng.normal(1.0, 0.012, 3), 0.97, 1.03)
    angles = np.deg2rad(np.clip(rng.normal(0, (1.6, 1.2, 1.6)), -4, 4))
    shift = rng.normal(0, (0.8, 1.2, 1.0))
    gap = float(rng.uniform(0.8, 1.8) + 1.6 * atrophy)
    skull = float(rng.uniform(4.4, 6.6))
    scalp = float(rng.uniform(4.6, 7.0))
    muscle = float(rng.uniform(2.0, 5.0))
    fat = float(rng.uniform(158, 184))
    bias = float(rng.uniform(0.04, 0.10))
    noise = float(rng.uniform(2.8, 4.4))
    contrast = rng.normal((27, 79, 120), (3.0, 2.0, 2.0))
    field_of_view = np.array([rng.uniform(85, 90), rng.uniform(104, 109)])

    # ---- where each pixel of each plane comes from: affine, then diffeomorphism
    x = np.arange(ROWS) - (ROWS - 1) / 2
    y = np.arange(COLS) - (COLS - 1) / 2 + _CENTRE[1]
    z = _FIRST_Z + np.arange(slices)
    mm = np.stack(np.meshgrid(x, y, z, indexing="ij")).astype(np.float32)
    matrix = _rotation(angles) @ np.diag(1 / (scale * _T88_SCALE * stretch))
    # The grid is sized for a whole case, so that fewer slices show the same subject.
    step, margin = 4.0, 8.0
    extent = (ROWS, COLS, PLANES)
    displacement = _deformation(rng, tuple(int(np.ceil((n + 2 * margin) / step)) + 1 for n in extent), step)
    centre = _CENTRE.reshape(3, 1, 1, 1).astype(np.float32)
    moved = mm - centre + np.stack([_upsample(d, extent, step, margin)[:, :, :slices] for d in displacement])
    rotated = np.einsum("ij,jxyz->ixyz", matrix.astype(np.float32), moved)
    mm_template = rotated + centre + shift.reshape(3, 1, 1, 1).astype(np.float32)
    voxel = mm_template - template.origin.reshape(3, 1, 1, 1).astype(np.float32)

    def warped(volume: np.ndarray) -> np.ndarray:
        return ndimage.map_coordinates(volume, voxel, order=1, mode="nearest")

    grey, white, texture = warped(template.grey), warped(template.white), warped(template.texture)
    surface, ventricle = warped(template.surface), warped(template.ventricle)

    def blobs(sigma: float) -> np.ndarray:
        # A whole case is always drawn, so that fewer slices show the same subject.
        step = max(1.0, sigma / 2.5)  # a smooth field needs few samples
        few = tuple(int(np.ceil(n / step)) + 1 for n in extent)
        return _upsample(_smooth_noise(rng, few, sigma / step), extent, step)[:, :, :slices]

    # ---- tissue: sharpen the average's soft maps into one subject, then let it age
    edge = blobs(14)
    folds = blobs(2.2)
    depth = np.clip(-surface / 6, 0, 1)  # sulci open towards the surface
    csf = np.clip(1 - grey - white, 0, 1)
    # The average blurs the cortical ribbon; its outermost shell is CSF in every single subject.
    shell = _sigmoid((surface + 1.1 + 1.4 * atrophy + 0.6 * folds) / 0.5)
    logits = np.stack([csf, grey, white])
    logits = 2.4 * np.log(np.clip(logits, 1e-3, None))
    logits[0] += 1.1 + (1.0 + 1.8 * atrophy) * (1.4 - depth) + 0.6 * folds
    logits[2] += 0.25 - 0.5 * atrophy - 0.55 * folds
    probability = np.exp(logits - logits.max(axis=0))
    probability /= probability.sum(axis=0)
    rim = _sigmoid((growth - ventricle + 0.35 * edge) / 0.45)  # the ventricle wall moves outward
    not_csf = (1 - rim) * (1 - shell)
    probability[1:] *= not_csf
    probability[0] = 1 - probability[1] - probability[2]
    inside = surface < 0
    labels = np.where(inside, 1 + probability.argmax(axis=0), 0).astype(np.uint8)
    deep = (ventricle < growth + 1.5) & (labels == 1)

    # ---- the head around it, outward from the brain's hull
    thick = 1 + 0.12 * edge
    low_and_lateral = (
        np.exp(-(((mm[1] - 22) / 26) ** 2)) * _sigmoid((np.abs(mm[0]) - 48) / 4) * _sigmoid((16 - mm[2]) / 5)
    )
    bone_from = gap * (1 + 0.2 * blobs(9))
    muscle_from = bone_from + skull * thick
    scalp_from = muscle_from + muscle * low_and_lateral + 0.6
    # Thinner over the temples than over forehead and occiput, as in people.
    front_and_back = np.abs(mm[1] - _CENTRE[1]) / 90
    air_from = scalp_from + scalp * (0.72 + 0.5 * front_and_back) * (1 + 0.08 * blobs(14))

    def band(start: np.ndarray, stop: np.ndarray, soft: float = 0.45) -> np.ndarray:
        return _sigmoid((surface - start) / soft) * _sigmoid((stop - surface) / soft)

    marrow_depth = (surface - bone_from) / np.maximum(muscle_from - bone_from, 1)
    marrow = np.exp(-(((marrow_depth - 0.5) / 0.17) ** 2)) * np.clip(0.55 + 0.5 * blobs(5), 0, 1.4)
    skin = np.exp(-(((air_from - surface - 1.0) / 1.1) ** 2))
    image = np.einsum("t,txyz->xyz", contrast, probability) * _sigmoid(-surface / 0.5)
    image += 95 * texture * _sigmoid((-surface - 2) / 1.0) * probability[1:].sum(axis=0)
    image += 30 * band(0 * gap, bone_from)
    image += (9 + 42 * marrow) * band(bone_from, muscle_from)
    image += (52 + 7 * folds) * band(muscle_from, scalp_from)
    image += (fat * (1 + 0.15 * blobs(3.5) + 0.07 * blobs(1.2)) - 55 * skin) * band(scalp_from, air_from)

    # ---- the scanner: coil sensitivity, Rician noise, field of view, 8 bits
    image = np.maximum(image, 0) * (1 + bias * np.clip(blobs(38), -2.5, 2.5))
    texture_noise = [
        ndimage.gaussian_filter(rng.standard_normal(image.shape, dtype=np.float32), (0.5, 0.5, 0.3))
        for _ in "ri"
    ]
    real, imaginary = (noise * n / n.std() for n in texture_noise)
    in_air = _sigmoid((surface - air_from - 2) / 1.5)  # averaging and filtering leave less noise there
    damp = 1 - 0.78 * in_air
    image = np.hypot(image + damp * real, damp * imaginary)
    native = np.einsum("ij,jxyz->ixyz", matrix[:2].astype(np.float32), mm - centre)
    image[(np.abs(native[0]) > field_of_view[0]) | (np.abs(native[1]) > field_of_view[1])] = 0

    images = np.zeros((slices, SIDE, SIDE), np.uint8)
    masks = np.zeros((slices, SIDE, SIDE), np.uint8)
    top, left = (SIDE - ROWS) // 2, (SIDE - COLS) // 2
    window = np.s_[:, top : top + ROWS, left : left + COLS]
    planes = np.moveaxis(image, 2, 0)
    images[window] = np.round(planes * (255 / planes.max(axis=(1, 2), keepdims=True)))
    masks[window] = 85 * np.moveaxis(labels, 2, 0)
    volumes = np.bincount(labels.ravel(), minlength=4)
    factors = PhantomFactors(
        case, split, *(round(v, 4) for v in (atrophy, growth, scale, gap, skull, scalp, bias, noise)),
        *(int(v) for v in volumes[1:]), ventricle_mm3=int(deep.sum()),
    )  # fmt: skip
    return images, masks, factors


def _write_png(path: Path, pixels: np.ndarray) -> None:
    # Written beside its place and renamed: a file that has its name is whole.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    Image.fromarray(pixels).save(temporary, format="PNG", compress_level=1)  # twice as fast, 17 % larger
    os.replace(temporary, path)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _paths(root: Path, split: str, case: int, slices: int) -> Iterator[tuple[Path, Path]]:
    for index in range(slices):
        yield (
            root / f"{DATASET_FOLDER}_{split}" / image_name(case, index),
            root / f"{DATASET_FOLDER}_seg_{split}" / mask_name(case, index),
        )


def _make_case(
    template: _Template, root: Path, split: str, case: int, slices: int, seed: int
) -> PhantomFactors:
    images, masks, factors = _render(template, case, split, slices, seed)
    for (image_path, mask_path), image, mask in zip(_paths(root, split, case, slices), images, masks):
        _write_png(image_path, image)
        _write_png(mask_path, mask)
    return factors


_worker_template: _Template | None = None


def _start_worker(template: _Template) -> None:
    global _worker_template
    _worker_template = template


def _run_in_worker(job: tuple) -> PhantomFactors:
    return _make_case(_worker_template, *job)


def _write_table(root: Path, rows: dict[int, dict]) -> None:
    lines = [",".join(f.name for f in fields(PhantomFactors))]
    lines += [",".join(str(v) for v in rows[case].values()) for case in sorted(rows)]
    _write_text(root / "phantoms.csv", "\n".join(lines) + "\n")


def _read_table(root: Path) -> dict[int, dict]:
    path = root / "phantoms.csv"
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {int(row["case"]): row for row in csv.DictReader(file)}


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
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(
            f"{root} is not empty and holds no phantoms. Choose a new folder: nothing there is overwritten."
        )
    root.mkdir(parents=True, exist_ok=True)
    _write_text(plan_file, json.dumps(plan, indent=1) + "\n")


def _check_space(root: Path, cases: int, slices: int) -> None:
    needed = cases * slices * 45_000  # bytes: about 39 kB for an image and its mask
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(
            f"{cases} cases need {needed / 1e6:,.0f} MB and {root} has {free / 1e6:,.0f} MB free. "
            "Free some space, choose another disk or make fewer cases."
        )


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
    if seed < 0:
        raise ValueError(f"seed is {seed}: give 0 or more.")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}: give 1 or more.")
    root = Path(out).expanduser()
    _claim(root, {"recipe": RECIPE, "seed": seed, "cases": list(cases), "slices": slices})
    for split in SPLITS:
        for name in (f"{DATASET_FOLDER}_{split}", f"{DATASET_FOLDER}_seg_{split}"):
            (root / name).mkdir(exist_ok=True)

    wanted = [(split, FIRST_ID[split] + i) for split, count in zip(SPLITS, cases) for i in range(count)]
    done = _read_table(root)
    missing = [
        (root, split, case, slices, seed)
        for split, case in wanted
        if case not in done or not all(p.exists() for pair in _paths(root, split, case, slices) for p in pair)
    ]
    if missing:
        _check_space(root, len(missing), slices)
        for left_over in root.glob("*/.*.part"):
            left_over.unlink(missing_ok=True)
        workers = min(workers or os.cpu_count() or 1, len(missing))
        with tqdm(total=len(missing), desc="phantoms", unit="case", file=sys.stderr) as bar:
            for factors in _factors(missing, workers):
                done[factors.case] = asdict(factors)
                _write_table(root, done)
                bar.update()
    return DataLocation(root, "phantoms")


def _factors(jobs: list[tuple], workers: int) -> Iterator[PhantomFactors]:
    template = _load_template()
    if workers == 1:
        yield from (_make_case(template, *job) for job in jobs)
        return
    # "spawn" behaves alike on every system and is safe beside threads that torch has started.
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (template,)) as pool:
        yield from pool.map(_run_in_worker, jobs)
