"""Made-up activations with known directions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SITE = "layers.0.resid_post"
D_IN, TRUE = 24, 48


def planted(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sums of unit directions, 1 + Poisson(2) of `TRUE` at a time, around an offset: activations and directions."""
    directions = F.normalize(torch.randn(TRUE, D_IN, generator=torch.Generator().manual_seed(99)), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    wanted = 1 + torch.poisson(torch.full((n, 1), 2.0), generator=generator)
    rank = torch.rand(n, TRUE, generator=generator).argsort(-1).argsort(-1)
    strength = 0.5 + torch.empty(n, TRUE).exponential_(generator=generator)
    x = (strength * (rank < wanted)) @ directions
    return 7 * (x + 0.01 * torch.randn(n, D_IN, generator=generator) + 0.5), directions
