"""A measured number with its unit, how much it was measured on, and a 95 % interval.

Intervals are over independent groups (windows of text, latents, examples, ...), never over the tokens of one window, which
are alike: bootstraps, but for medians. Below `NEEDED` groups an interval is all that is shown.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NEEDED = 8
"""Groups below which a number is shown as an interval only."""
RESAMPLES = 1000
MOST_RESAMPLED = 4096
"""Groups up to which an interval is resampled; above, the normal one is the same."""
Z = 1.96
"""Standard errors to either side that hold 95 % of a normal distribution."""


@dataclass(frozen=True)
class Measure:
    """One number."""

    name: str
    value: float
    unit: str
    low: float
    """Lower end of the 95 % interval; NaN where one group is all there is."""
    high: float
    n: int
    """Groups that were resampled."""
    of: str
    """What a group is: windows, tokens, latents, examples, ..."""
    tokens: int
    """Tokens that it was measured on."""
    needed: int = NEEDED
    """Groups for a number of its own."""
    note: str = ""

    @property
    def few(self) -> str:
        """Why the number is shown as an interval only; empty where there was enough."""
        if self.n >= self.needed:
            return ""
        tokens = math.ceil(self.tokens / max(1, self.n) * self.needed)
        return f"{self.n} {self.of}, {self.needed} are needed (about {tokens:,} tokens)"

    def text(self) -> str:
        """The number with its interval, or where there was too little the interval and how much is needed."""
        interval = f"{self.low:.3g} … {self.high:.3g}"
        if self.few:
            return f"{interval if math.isfinite(self.low + self.high) else 'unknown'} ({self.few})"
        return f"{self.value:.3g} [{interval}]"

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what is not finite is None, as JSON has no word for it."""
        data = dataclasses.asdict(self) | {"few": self.few}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}


def ratio(
    name: str,
    unit: str,
    numerators: Tensor,
    denominators: Tensor | None = None,
    *,
    of: str,
    tokens: int,
    needed: int = NEEDED,
    note: str = "",
) -> Measure:
    """Σ numerators / Σ denominators, both [groups], of all groups at once: no mean of ratios. Without denominators the mean."""
    top = numerators.detach().double().cpu()
    bottom = torch.ones_like(top) if denominators is None else denominators.detach().double().cpu()
    low, high = _interval(top, bottom)
    return Measure(name, _over(top.sum(), bottom.sum()).item(), unit, low, high, len(top), of, tokens, needed, note)


def _over(top: Tensor, bottom: Tensor) -> Tensor:
    return torch.where(bottom != 0, top / bottom, float("nan"))


def _interval(top: Tensor, bottom: Tensor) -> tuple[float, float]:
    n = len(top)
    if n < 2:
        return float("nan"), float("nan")
    if n > MOST_RESAMPLED:
        value, share = float(top.sum() / bottom.sum()), bottom.sum()
        error = float((top - value * bottom).square().sum().sqrt() / share.abs())
        return value - Z * error, value + Z * error
    drawn = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(0))
    values = _over(top[drawn].sum(1), bottom[drawn].sum(1))
    return between(values)


def between(values: Tensor) -> tuple[float, float]:
    """The middle 95 % of resampled values [n]; those that are not finite are left out, and NaN if none is."""
    values = values[values.isfinite()].double()
    if not len(values):
        return float("nan"), float("nan")
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def median(
    name: str, unit: str, values: Tensor, *, of: str, tokens: int, needed: int = NEEDED, note: str = ""
) -> Measure:
    """The median of `values` [groups], with the interval of its order statistics; NaN among them is left out, and n counts
    the others."""
    values = values.detach().double().cpu()
    values = values[~values.isnan()].sort().values
    n = len(values)
    middle = float(values.quantile(0.5)) if n else float("nan")
    low = high = float("nan")
    if n > 1:
        reach = Z * math.sqrt(n) / 2
        low = float(values[max(0, math.floor(n / 2 - reach))])
        high = float(values[min(n - 1, math.ceil(n / 2 + reach) - 1)])
    return Measure(name, middle, unit, low, high, n, of, tokens, needed, note)
