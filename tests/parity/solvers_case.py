"""Data from formulas for what the slow metrics solve: probes, non-negative least squares, ranks, absorption."""

from __future__ import annotations

import torch
from saelens_eval_case import draw
from torch import Tensor

EXAMPLES, WIDTH, D_SAE, ACTIVE = 120, 6, 20, 5


def probes() -> tuple[Tensor, Tensor]:
    """z [n, d] in units of their own, and classes [n] that no coordinate tells for certain."""
    z = draw(11, EXAMPLES, WIDTH) * torch.tensor([0.1, 1.0, 3.0, 10.0, 1.0, 1.0]) + torch.arange(WIDTH)
    return z, draw(12, EXAMPLES) + torch.linspace(-1, 1, WIDTH) @ draw(11, EXAMPLES, WIDTH).T > 0.3


def codes() -> tuple[Tensor, Tensor, Tensor]:
    """Activations [n, d_sae] with `ACTIVE` latents each, targets [n, d], and a decoder [d_sae, d] in unit rows."""
    decoder = torch.nn.functional.normalize(draw(21, D_SAE, WIDTH), dim=-1)
    place = draw(22, 16, D_SAE).argsort(-1)[:, :ACTIVE]
    acts = torch.zeros(16, D_SAE).scatter_(1, place, draw(23, 16, ACTIVE).abs() + 0.1)
    return acts, acts @ decoder + draw(24, 16, WIDTH), decoder


def effects() -> tuple[Tensor, Tensor]:
    """Two [n] with ties."""
    a = (3 * draw(31, 50)).round()
    return a, (a + 4 * draw(32, 50)).round()


MAIN = (0, 1)


def absorbing() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens [n, d], an encoder [d, d_sae], a decoder [d_sae, d] in unit rows, and a direction [d]. Of the first tokens most
    are where the definition bends."""
    decoder = torch.nn.functional.normalize(draw(41, D_SAE, WIDTH), dim=-1)
    direction = torch.nn.functional.normalize(draw(42, WIDTH), dim=0)
    return 2 * draw(43, 300, WIDTH) + direction, 0.6 * decoder.T + 0.3 * draw(44, WIDTH, D_SAE), decoder, direction
