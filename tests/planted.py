"""Made-up activations with known directions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SITE = "layers.0.resid_post"
D_IN, TRUE = 24, 48


def directions(n: int = TRUE, d_in: int = D_IN) -> Tensor:
    """The unit directions that `planted` adds up, [n, d_in]."""
    return F.normalize(torch.randn(n, d_in, generator=torch.Generator().manual_seed(99)), dim=-1)


def planted(
    n: int, seed: int = 0, *, counts: str = "poisson", mean: float = 3.0, noise: float = 0.01, offset: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Sums of unit directions with strengths 0.5 + Exp(1) around an offset: activations [n, D_IN] and directions.

    A token has `mean` of the `TRUE` directions on average: `constant`, 1 + `poisson` or 1 + `geometric`. All draws
    come from uniform and normal numbers by formula, so that every build of torch draws the same.
    """
    true = directions()
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n, 1, generator=generator, dtype=torch.float64)
    match counts:
        case "constant":
            wanted = torch.full((n, 1), mean)
        case "geometric":
            wanted = 1 + (torch.log1p(-uniform) / math.log1p(-1 / mean)).floor()
        case "poisson":
            rate = mean - 1
            chances = torch.tensor([math.exp(-rate) * rate**i / math.factorial(i) for i in range(TRUE)]).double()
            wanted = 1 + (uniform > chances.cumsum(0)).sum(-1, keepdim=True)
        case _:
            raise AssertionError(counts)
    rank = torch.rand(n, TRUE, generator=generator).argsort(-1).argsort(-1)
    strength = 0.5 - torch.log1p(-torch.rand(n, TRUE, generator=generator, dtype=torch.float64)).float()
    x = (strength * (rank < wanted)) @ true
    return 7 * (x + noise * torch.randn(n, D_IN, generator=generator) + offset), true
