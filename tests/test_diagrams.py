"""The drawn figures: vectors, made by the code beside them, true to the steps that they show."""

import importlib
import math
import re
import sys

import matplotlib
import pytest
from notebook_tools import ROOT

sys.path.insert(0, str(ROOT / "figures"))
diagrams = importlib.import_module("diagrams")

FIXED = re.search(r"^matplotlib==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)[1]


@pytest.mark.parametrize("name", diagrams.DIAGRAMS)
def test_the_stored_drawing_is_the_one_of_the_code(name, tmp_path, monkeypatch):
    stored = (diagrams.HERE / f"{name}.svg").read_text(encoding="utf-8")
    assert "<image" not in stored  # nothing is drawn in pixels
    assert len(stored) < 150_000
    assert diagrams.DIAGRAMS[name][1] in stored
    if matplotlib.__version__ == FIXED:
        monkeypatch.setattr(diagrams, "HERE", tmp_path)
        assert diagrams.save(name).read_text(encoding="utf-8") == stored


def test_the_arrows_of_ddpm_end_where_the_posterior_says():
    t, s = 5, diagrams.STEP
    points = diagrams.ddpm_arrows(t)
    beta, now, before = (float(v) for v in (s.betas[t], s.alphas_cumprod[t], s.alphas_cumprod[t - 1]))
    of_x0, of_xt = math.sqrt(before) * beta / (1 - now), math.sqrt(1 - beta) * (1 - before) / (1 - now)
    deviation = math.sqrt(beta * (1 - before) / (1 - now))
    for pixel, noise in enumerate((0.9, 0.7)):
        mean = of_x0 * diagrams.X0[pixel] + of_xt * diagrams.X_T[pixel]
        assert points["mean"][pixel] == pytest.approx(mean)
        assert points["next"][pixel] == pytest.approx(mean + deviation * noise)


def test_the_arrows_of_ddim_keep_the_noise_in_direction():
    t, t_prev, s = 8, 4, diagrams.STEP
    points = diagrams.ddim_arrows(t, t_prev)
    now, after = (float(s.alphas_cumprod[k]) for k in (t, t_prev))
    for pixel in (0, 1):
        epsilon = (diagrams.X_T[pixel] - math.sqrt(now) * diagrams.X0[pixel]) / math.sqrt(1 - now)
        assert points["x_t"][pixel] - points["image"][pixel] == pytest.approx(math.sqrt(1 - now) * epsilon)
        assert points["next"][pixel] - points["image_next"][pixel] == pytest.approx(
            math.sqrt(1 - after) * epsilon
        )
        assert points["image_next"][pixel] == pytest.approx(math.sqrt(after) * diagrams.X0[pixel])


def test_the_map_of_predictions_is_on_the_circle():
    s, n = diagrams.NoiseSchedule.cosine(1000).levels(420)
    arrows = [p for p in diagrams.predictions(420).axes[0].patches if hasattr(p, "get_arrowstyle")]
    tips = [tuple(p._posA_posB[1]) for p in arrows[:4]]
    start = tuple(arrows[0]._posA_posB[0])
    shares = [((x - start[0]) / 3, (y - start[1]) / 3) for x, y in tips]
    assert shares[2] == pytest.approx((s, n))
    v = tuple(a - b for a, b in zip(shares[3], shares[2]))
    assert v == pytest.approx((-0.45 * n, 0.45 * s))  # along √ᾱ ε − √(1−ᾱ) x_0
