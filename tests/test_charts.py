"""Axes, thinning, colours and words of the charts; what a whole page shows is in test_reports.py."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saehook.charts import (
    BOTTOM,
    DARK,
    DASHES,
    LIGHT,
    STRETCHES,
    TOP,
    Axis,
    Curve,
    curve_css,
    escape,
    human,
    thin,
    tick,
)

VISION = {  # linear RGB as it is seen, complete forms: Machado et al. 2009, table 1
    "normal": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}
TO_LMS = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
TO_LAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)


def linear_rgb(colour: str) -> torch.Tensor:
    rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)], dtype=torch.float64)
    return torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def oklab(rgb: torch.Tensor) -> torch.Tensor:
    lms = torch.tensor(TO_LMS, dtype=torch.float64) @ rgb.clamp(0, 1)
    return torch.tensor(TO_LAB, dtype=torch.float64) @ lms ** (1 / 3)


def contrast(a: str, b: str) -> float:
    weights = torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    low, high = sorted(float(linear_rgb(colour) @ weights) for colour in (a, b))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("colours", "card"), [(LIGHT, "#ffffff"), (DARK, "#1b1e24")])
@pytest.mark.parametrize("vision", VISION)
def test_colours_stay_apart_for_all_eyes(colours, card, vision):
    seen = [oklab(torch.tensor(VISION[vision], dtype=torch.float64) @ linear_rgb(colour)) for colour in colours]
    closest = min(float((a - b).norm()) for a, b in itertools.combinations(seen, 2))
    assert len(colours) >= 8
    assert closest > 0.0755  # what Okabe and Ito's palette reaches, whose yellow has a contrast of 1.3
    assert min(contrast(colour, card) for colour in colours) >= 3


def test_curves_look_different_until_colours_and_dashes_are_used_up():
    n = len(LIGHT) * len(DASHES)
    looks = [frozenset(Curve("", i, []).path_class.split()) - {f"n{i}"} for i in range(n)]
    assert len(set(looks)) == n
    css = curve_css(n)
    assert all(f".{name}{{stroke" in css for look in looks for name in look - {"line"})
    assert all("d0" in look for look in looks[: len(LIGHT)]), "dashes only where the colours are used up"


@given(below=st.floats(-3, 3), span=st.floats(1e-12, 1e12), where=st.floats(0, 1))
def test_linear_axis(below, span, where):
    low = below * span
    axis = Axis(low, low + span, BOTTOM, TOP)
    assert axis(low + where * span) == pytest.approx(BOTTOM + where * (TOP - BOTTOM), abs=0.01)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 7
    assert all(-1e-9 <= (value - low) / span <= 1 + 1e-9 for value in ticks)
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-6)
    assert f"{steps[0]:e}"[0] in "125"


@given(low=st.floats(1e-12, 1e6), ratio=st.floats(10, 1e18), where=st.floats(0, 1))
def test_log_axis(low, ratio, where):
    axis = Axis(low, low * ratio, BOTTOM, TOP, log=True)
    assert axis(low * ratio**where) == pytest.approx(BOTTOM + where * (TOP - BOTTOM), abs=0.01)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 8
    assert all(low <= value <= low * ratio and f"{value:e}"[0] in "125" for value in ticks)


def test_thinning_keeps_ends_extremes_and_gaps():
    n = 10_007
    draw = torch.Generator().manual_seed(0)
    points = [(float(i), value) for i, value in enumerate(torch.randn(n, generator=draw).tolist())]
    for i, value in ((0, 0.5), (n - 1, 0.25), (4321, 50.0), (4322, -50.0), (7000, math.nan)):
        points[i] = (float(i), value)
    kept = thin(points)
    assert len(kept) <= 2 * STRETCHES + 3
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    assert {points[i] for i in (0, n - 1, 4321, 4322)} <= set(kept)
    assert sum(math.isnan(value) for _, value in kept) == 1
    for i in range(STRETCHES):  # what lies in each stretch of the curve is as high and as low as before
        stretch = range(n * i // STRETCHES, n * (i + 1) // STRETCHES)
        before = [points[j][1] for j in stretch if not math.isnan(points[j][1])]
        after = [value for x, value in kept if x in stretch and not math.isnan(value)]
        assert (min(after), max(after)) == (min(before), max(before))
    short = points[: 2 * STRETCHES]
    assert thin(short) == short


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (4_997_120, "5.0M"),
        (999_950, "1.0M"),
        (999_949, "999.9K"),
        (10_000.0, "10.0K"),
        (4096, "4,096"),
        (4096.0, "4,096"),
        (2.5e12, "2.5T"),
        (1e38, "1e+38"),
        (30.603, "30.6"),
        (32, "32"),
        (0.0534, "0.053"),
        (-0.5, "-0.500"),
        (0.0008, "0.0008"),
        (0.0, "0"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (None, "–"),
        ("text", "text"),
    ],
)
def test_numbers_for_people(value, words):
    assert human(value) == words


def test_shares_and_ticks():
    assert [human(v, share=True) for v in (0.0256, 1.0, 0.00073, 0.0)] == [
        "2.6\xa0%", "100.0\xa0%", "0.073\xa0%", "0\xa0%"
    ]  # fmt: skip
    assert [tick(v) for v in (0.30000000000000004, 2e-5, 0, 5000, 15e3, 5e6)] == [
        "0.3", "2e-05", "0", "5,000", "15K", "5M"
    ]  # fmt: skip
    assert tick(0.025, share=True) == "2.5\xa0%"


def test_escape():
    assert escape("<a href=\"x\" b='y'>&") == "&lt;a href=&quot;x&quot; b=&#x27;y&#x27;&gt;&amp;"
    assert escape("a\x00b\x1bc\x85d\ud800e\uffffz") == "a\ufffdb\ufffdc\ufffdd\ufffde\ufffdz"
    assert escape("é \t\n😀") == "é \t\n😀"
