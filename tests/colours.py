"""Colours as people see them who lack one kind of cone: Machado et al. 2009 (doi 10.1109/TVCG.2009.113), table 1, severity 1."""

from __future__ import annotations

import math

SIGHT = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""What a colour in linear RGB becomes."""
XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
WHITE = (0.95047, 1.0, 1.08883)


def difference(one: str, other: str, sight: str) -> float:
    """How far apart two colours `#rrggbb` look, Euclidean in CIE Lab: about 2 can just be told."""
    return math.dist(*(_lab(_product(SIGHT[sight], _linear(colour))) for colour in (one, other)))


def _linear(colour: str) -> list[float]:
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]


def _product(matrix: list[list[float]], vector: list[float]) -> list[float]:
    return [min(1.0, max(0.0, sum(a * b for a, b in zip(row, vector, strict=True)))) for row in matrix]


def _lab(rgb: list[float]) -> tuple[float, float, float]:
    xyz = [sum(a * b for a, b in zip(row, rgb, strict=True)) / white for row, white in zip(XYZ, WHITE, strict=True)]
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)
