"""How well an SAE reconstructs the tokens of a text, and how sparsely: sums over all tokens, then one ratio.

    fvu        = Σ‖x - x_hat‖² / Σ‖x - mean‖²   with the mean of the tokens that count, over the whole text
    cosine     = mean of x·x_hat / ‖x‖‖x_hat‖,   norm_ratio = mean of ‖x_hat‖ / ‖x‖   (0 for a token where a norm is 0)
    gamma      = Σ‖x_hat‖² / Σ x·x_hat           below 1: shrinkage (Rajamanoharan et al. 2024, eq. 10)
    l0         = mean number of latents that fire on a token;   density = share of tokens on which a latent fires

Tokens that do not count are measured apart. Of a transcoder x is what it reconstructs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from saehook.intervals import Ratio, SequenceSums
from saehook.sae import SAE
from saehook.sparse_acts import fired_pairs, reconstructed

MAX_ACTS = 2**22
"""Latent activations that are held at a time; a CPU gives their memory out again and again."""
MAX_TOKENS = 2**10
"""Tokens at a time of an SAE whose activations are pairs."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
L0_BINS = 40
PER_DECADE = 5
"""Bins of the density histogram for each factor of ten."""

RATIOS: dict[str, Ratio] = {
    "fvu": lambda s: s["error"] / s["variance"],
    "cosine": lambda s: s["cosine"] / s["n"],
    "norm_ratio": lambda s: s["norm_ratio"] / s["n"],
    "gamma": lambda s: s["square_hat"] / s["product"],
    "l0": lambda s: s["l0"] / s["n"],
}


def reconstruct(sae: SAE, x: Tensor) -> Tensor:
    """x_hat [n, d_out] of tokens [n, d_in], with few latent activations in memory."""
    parts = [reconstructed(sae, some)[0] for some in x.split(_tokens_at_once(sae))]
    return torch.cat([x.new_empty(0, sae.d_out, dtype=sae.dtype), *parts])


def _tokens_at_once(sae: SAE) -> int:
    return MAX_TOKENS if sae.by_pairs else max(1, MAX_ACTS // sae.d_sae)


class Fidelity:
    """One SAE on the tokens of a text."""

    def __init__(self, sae: SAE, mean: Tensor) -> None:
        """`mean` [d_out] float64: of what is reconstructed, over the tokens that count in the whole text."""
        self.sae, self.mean = sae, mean
        self.sums = SequenceSums()
        self.special = SequenceSums()
        """Of tokens that do not count."""
        self.fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.device)
        """Tokens on which each latent fired, [d_sae]."""
        self.l0 = torch.zeros(1, dtype=torch.int64)
        """Tokens by the number of latents that fire on them."""

    def update(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Add a batch of new sequences; the reconstructions of the tokens that count, [n, d_out].

        Args:
            x: what the SAE reads, [rows, length, d_in].
            y: what it reconstructs, [rows, length, d_out].
            mask: [rows, length] bool, the tokens that count. Tokens whose x or y is not finite are measured nowhere.
        """
        finite = x.isfinite().all(-1) & y.isfinite().all(-1).to(x.device)
        mask = mask.to(x.device)
        self._measure(x, y, ~mask & finite, self.special, counts=False)
        return self._measure(x, y, mask, self.sums, counts=True)

    def _measure(self, x: Tensor, y: Tensor, mask: Tensor, sums: SequenceSums, *, counts: bool) -> Tensor:
        owner = mask.nonzero()[:, 0]
        x, y = x[mask], y[mask.to(y.device)]
        found: list[dict[str, Tensor]] = []
        parts = [y.new_empty(0, self.sae.d_out, dtype=self.sae.dtype)]
        step = _tokens_at_once(self.sae)
        for some, target in zip(x.split(step), y.split(step), strict=True):
            x_hat, acts = reconstructed(self.sae, some)
            tokens, latents = fired_pairs(acts)
            l0 = torch.bincount(tokens, minlength=len(some))
            if counts:
                self.fired += torch.bincount(latents, minlength=len(self.fired))
                self._count_l0(l0.cpu())
            found.append(_of_tokens(target.double(), x_hat.double(), self.mean) | {"l0": l0.to(y.device)})
            parts.append(x_hat)
        names = [*_of_tokens(y[:0].double(), y[:0].double(), self.mean), "l0"]
        values = {name: torch.cat([y.new_empty(0), *(part[name] for part in found)]) for name in names}
        sums.add(owner, len(mask), **values)
        return torch.cat(parts)

    def _count_l0(self, l0: Tensor) -> None:
        counts = torch.bincount(l0, minlength=len(self.l0))
        counts[: len(self.l0)] += self.l0
        self.l0 = counts

    @property
    def dead_share(self) -> float:
        """Share of latents that fired on none of the tokens."""
        return float((self.fired == 0).double().mean())

    def blocks(self) -> dict[str, dict[str, Any]]:
        """What one number does not say, as plain data: `l0`, `density`, `special`."""
        return {"l0": _l0_block(self.l0), "density": self._density_block(), "special": self._special_block()}

    def _density_block(self) -> dict[str, Any]:
        """Latents by the log10 of their density, in bins from the density of one token up to 1."""
        tokens = int(self.l0.sum())
        fired = self.fired[self.fired > 0].double().cpu()
        low = -math.ceil(math.log10(max(tokens, 10)))
        last = -low * PER_DECADE - 1
        bins = ((fired / tokens).log10().sub(low) * PER_DECADE).floor().long().clamp(0, last)
        counts = torch.bincount(bins, minlength=last + 1).tolist()
        never = self.sae.d_sae - len(fired)
        return {"tokens": tokens, "low": low, "per_decade": PER_DECADE, "counts": counts, "never": never}

    def _special_block(self) -> dict[str, Any]:
        s = {name: float(total) for name, total in self.special.totals().items()}
        n = int(s["n"])
        if n == 0:
            return {"tokens": 0}
        means = {name: s[name] / n for name in ("cosine", "norm_ratio", "l0")}
        return {"tokens": n, **means, "error_over_square": s["error"] / s["square"] if s["square"] else None}


def _of_tokens(y: Tensor, y_hat: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """What is summed, of each token; [n] float64."""
    y_hat = y_hat.to(y.device)
    square, square_hat, product = y.square().sum(-1), y_hat.square().sum(-1), (y * y_hat).sum(-1)
    norms = (square * square_hat).sqrt()
    return {
        "error": (y - y_hat).square().sum(-1),
        "variance": (y - mean.to(y.device)).square().sum(-1),
        "square": square,
        "square_hat": square_hat,
        "product": product,
        "cosine": torch.where(norms > 0, product / norms, 0.0),
        "norm_ratio": torch.where(square > 0, (square_hat / square).sqrt(), 0.0),
    }


def _l0_block(counts: Tensor) -> dict[str, Any]:
    """Mean, standard deviation, quantiles and histogram of L0, exact, from tokens by their L0."""
    values, n = torch.arange(len(counts), dtype=torch.float64), int(counts.sum())
    mean = float((counts * values).sum() / n)
    sd = math.sqrt(float((counts * (values - mean).square()).sum() / n))
    seen = counts.cumsum(0)
    quantiles = {str(q): int(torch.searchsorted(seen, math.ceil(q * n))) for q in QUANTILES}
    fired = counts.nonzero()[:, 0]
    low, high = int(fired[0]), int(fired[-1])
    width = max(1, math.ceil((high - low + 1) / L0_BINS))
    edges = list(range(low, high + 1 + width, width))
    bins = [int(counts[a:b].sum()) for a, b in zip(edges, edges[1:], strict=False)]
    return {"mean": mean, "sd": sd, "quantiles": quantiles, "edges": edges, "counts": bins}
