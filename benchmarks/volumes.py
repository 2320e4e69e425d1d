"""How far off are the planes of a T1 volume after registration, and what does a volume cost?

The volumes are the ICBM 152 brain with a drawn skull, scalp and neck, turned, shifted and stretched by a
known
map, with shading and noise: so the truth is known, and no anatomy but the template's is tested. Errors are
distances in the atlas head, in mm (a pixel is 0.972 of them), between where a place of the brain is found
and where it
is, over the course's planes. Seconds are of one thread, in this process; memory and seconds of the command
are
measured from outside (see ``measure.py``).

``python benchmarks/volumes.py`` registers all 48 orientations of one scan, ten random affines with skull and
ten
without, six files whose header says nothing, and warped heads, whose similarity shows what the limit means.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
from measure import measured
from scipy import ndimage

from oasis_helpers.intake.phantoms import _deformation
from oasis_helpers.intake.registration import register
from oasis_helpers.intake.volumes import LEAST_SIMILARITY

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
from t1_like import ORIENTATIONS, brain, errors, head, scanned, stored, world_map  # noqa: E402

RESULT = HERE / "volumes.json"
AFFINES, UNSAID, WARPED, FILES = 10, 6, 4, 6
TURN, SHIFT, STRETCH = 15, 30, 0.12  # degrees, mm, share: at most, along or about each axis


def one(scan, world, orientation=ORIENTATIONS[0], *, trusted=True) -> dict[str, float]:
    """Register one scan, stored in an orientation: errors in mm, similarity and seconds."""
    values, affine = stored(*scan, orientation)
    start = time.perf_counter()
    # nibabel's affine for a header that says nothing: sizes, and axes to the left, front and top
    said = (
        affine if trusted else np.diag([-1, 1, 1, 1]) @ np.diag([*np.linalg.norm(affine[:3, :3], axis=0), 1])
    )
    fit = register(values, said, trusted=trusted)
    seconds = time.perf_counter() - start
    off = errors(fit.matrix, affine, world)
    return {"mean": off.mean(), "max": off.max(), "similarity": fit.similarity, "seconds": seconds}


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    return {
        "volumes": len(rows),
        "mean error, mm": float(np.mean([r["mean"] for r in rows])),
        "largest mean error of a volume, mm": float(max(r["mean"] for r in rows)),
        "largest error, mm": float(max(r["max"] for r in rows)),
        "lowest similarity": float(min(r["similarity"] for r in rows)),
        "mean seconds": float(np.mean([r["seconds"] for r in rows])),
        "most seconds": float(max(r["seconds"] for r in rows)),
    }


def warped(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A head of another shape: the drawn one under the random deformation of the phantoms."""
    t1, affine = head()
    few = tuple(n // 4 + 2 for n in t1.shape)
    field = _deformation(rng, few, 4.0)
    where = [
        axis + ndimage.zoom(f, 4, order=1)[: t1.shape[0], : t1.shape[1], : t1.shape[2]]
        for axis, f in zip(np.indices(t1.shape, sparse=True), field)
    ]
    return ndimage.map_coordinates(t1, where, order=1), affine


def command(folder: Path, rng: np.random.Generator) -> dict[str, float]:
    """Seconds and memory of the whole command, with one volume and with several."""
    for number in range(FILES):
        values, affine = scanned(head(), world_map(rng, TURN, SHIFT, STRETCH), (0.9, 0.9, 0.9), rng)
        path = folder / "in" / f"sub-{number:02}" / "anat" / f"sub-{number:02}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(values.astype(np.int16), affine), path)
    found = {"voxels of a volume": int(values.size)}
    for name, source in (("one volume", path), (f"{FILES} volumes, two workers", folder / "in")):
        line = [sys.executable, "-m", "oasis_helpers", "convert", str(source), str(folder / name)]
        code, seconds, megabytes = measured([*line, "--workers", "2"])
        assert code == 0
        found |= {f"{name}: seconds": seconds, f"{name}: peak memory, MB": megabytes}
    return found


def main() -> None:
    rng = np.random.default_rng(0)

    def some(count: int, made, zooms=None):
        """Scans of what was made, by a map, with voxels of 0.8 to 2 mm."""
        for _ in range(count):
            world = world_map(rng, TURN, SHIFT, STRETCH)
            yield scanned(made, world, rng.uniform(0.8, 2, 3) if zooms is None else zooms, rng), world

    ((scan, world),) = some(1, head(), (1, 1, 1.25))
    result = {"48 orientations": summary([one(scan, world, o) for o in ORIENTATIONS])}
    for name, made in (("affines, with skull", head()), ("affines, without skull", brain())):
        result[name] = summary([one(*found) for found in some(AFFINES, made)])
    # Which hand a file is of cannot be seen in a symmetric head: these are left-handed, as is assumed.
    left_handed = rng.permutation([o for o in ORIENTATIONS if np.linalg.det(_matrix(o)) < 0])
    unsaid = zip(some(UNSAID, head(), (1, 1, 1.25)), left_handed)
    result["header says nothing"] = summary([one(*found, o, trusted=False) for found, o in unsaid])
    similar, turned = [], []
    for _ in range(WARPED):
        values, affine = scanned(warped(rng), world_map(rng, TURN, SHIFT, STRETCH), (1, 1, 1), rng)
        similar.append(register(values, affine).similarity)
        wrong = stored(values, affine, nibabel.orientations.axcodes2ornt("ASR"))[
            0
        ]  # and a header that denies it
        turned.append(register(wrong, affine).similarity)
    result["similarity"] = {
        "limit": LEAST_SIMILARITY,
        "warped heads": [round(s, 3) for s in sorted(similar)],
        "the same, under a header with wrong axes": [round(s, 3) for s in sorted(turned)],
    }
    with tempfile.TemporaryDirectory() as folder:
        result["command"] = command(Path(folder), rng)
    print(json.dumps(result, indent=1))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def _matrix(orientation: np.ndarray) -> np.ndarray:
    found = np.zeros((3, 3))
    found[orientation[:, 0].astype(int), range(3)] = orientation[:, 1]
    return found


if __name__ == "__main__":
    main()
