"""How far phantoms are from a real slice: eight figures of shape and contrast, each with its z.

``python benchmarks/realism.py [ROOT]`` measures slice 0 of the 36 training cases of the default phantoms, or
of the set in ROOT, and notes the figures under the recipe that the set was made by. Beside them stand those
of one real slice of the course set (case 001, slice 0, a woman of 74), measured once by these functions. That
is a single head, so z says how unusual it would be among the phantoms, and no more.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from scipy import ndimage

from oasis_helpers.layout import MASK_VALUES, image_name, mask_name, read_png, slices_in
from oasis_helpers.phantoms import make_phantoms, phantom_cache

RESULT = Path(__file__).with_name("realism.json")
CASES = 36
REAL = {
    "gradient": 10.2, "white boundary": 21.7, "CSF": 7.1, "grey": 11.0, "white": 10.5, "roughness": 0.80,
    "scalp": 4.0, "brain to head": 12.5,
}  # fmt: skip
_ANGLES = np.deg2rad(np.arange(360))[:, None]


def _head(image: np.ndarray, above: float) -> np.ndarray:
    """The largest region brighter than ``above``, its holes filled."""
    labels, _ = ndimage.label(ndimage.binary_fill_holes(image > above))
    return labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])


def _rays(picture: np.ndarray, centre, step: float, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Radii in pixels, and ``picture`` along 360 rays from ``centre``: (360, radii)."""
    radii = np.arange(0, 180, step)
    places = [centre[0] + radii * np.sin(_ANGLES), centre[1] + radii * np.cos(_ANGLES)]
    return radii, ndimage.map_coordinates(picture.astype(float), places, order=order)


def _last_run(bright: np.ndarray) -> int:
    """Length of the outermost run of a ray's bright places."""
    places = np.flatnonzero(bright)
    if not len(places):
        return 0
    breaks = np.flatnonzero(np.diff(places) > 1)
    return len(places) - (breaks[-1] + 1 if len(breaks) else 0)


def figures(image: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Of one stored slice and its mask, both (256, 256).

    "gradient": mean length of the gradient, 3 pixels inside the brain, in grey levels a pixel. "white
    boundary": boundary pixels of the white matter over the root of its area. "CSF", "grey", "white": percent
    of all pixels. "roughness": mean distance in pixels of the head's radius from its smooth self (Gaussian of
    12 degrees). "scalp": width of the outermost tissue brighter than 100, and "brain to head": from the edge
    of the one to that of the other, medians over 360 rays in pixels.
    """
    image, brain = image.astype(float), mask > 0
    slope = np.hypot(*np.gradient(image))[ndimage.binary_erosion(brain, iterations=3)]
    white = mask == MASK_VALUES[3]
    boundary = (white & ~ndimage.binary_erosion(white)).sum()
    shares = {n: 100 * (mask == v).mean() for n, v in zip(("CSF", "grey", "white"), MASK_VALUES[1:])}

    head = _head(image, 20)
    radii, inside = _rays(head, ndimage.center_of_mass(head), 0.25, 1)
    radius = np.array([radii[ray > 0.5].max() for ray in inside])
    rough = np.abs(radius - ndimage.gaussian_filter1d(radius, 12, mode="wrap")).mean()

    head = _head(image, 25)
    centre = ndimage.center_of_mass(head)
    radii, brightness = _rays(image, centre, 0.5, 1)
    to_head, to_brain = (
        np.array([radii[ray > 0.5].max(initial=0) for ray in _rays(region, centre, 0.5, 0)[1]])
        for region in (head, brain)
    )
    scalp = (brightness > 100) & (radii > to_brain[:, None]) & (radii <= to_head[:, None])
    return {
        "gradient": slope.mean(),
        "white boundary": boundary / np.sqrt(white.sum()),
        **shares,
        "roughness": rough,
        "scalp": np.median([0.5 * _last_run(ray) for ray in scalp]),
        "brain to head": np.median(to_head - to_brain),
    }


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else make_phantoms(phantom_cache()).root
    recipe = json.loads((root / "phantoms.json").read_text())["recipe"]
    folders = root / "keras_png_slices_train", root / "keras_png_slices_seg_train"
    first = [case for case, index in slices_in(folders[0], "case") if index == 0][:CASES]
    found = []
    for case in first:
        image = read_png(folders[0] / image_name(case, 0))
        found.append(figures(np.asarray(image), np.asarray(read_png(folders[1] / mask_name(case, 0)))))
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result |= {"setting": f"slice 0 of {len(found)} phantoms, mean and standard deviation", "real": REAL}
    rows = result[f"recipe {recipe}"] = {}
    for name, real in REAL.items():
        values = [figure[name] for figure in found]
        mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
        rows[name] = {
            "mean": round(mean, 3),
            "sd": round(deviation, 3),
            "z": round((real - mean) / deviation, 2),
        }
        print(f"{name:15}{real:6.1f}{mean:8.2f} ± {deviation:.2f}   z {(real - mean) / deviation:5.1f}")
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
