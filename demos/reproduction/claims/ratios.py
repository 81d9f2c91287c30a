"""Numbers that several claims are about, as functions of sums, and findings made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from reproduction.bootstrap import Sums, Table, estimate, of_runs
from reproduction.data import Data, Site
from reproduction.laboratory import Lab
from reproduction.measure import at_l0, mean_l0
from reproduction.outcome import Finding, Plot
from saehook import SAE, TopK
from saehook.suite.measure import Measure
from saehook.suite.progressive_code import with_topk

Tables = Mapping[str, Sequence[Table]]
L0_TOLERANCE = 0.02


def fvu(arm: str) -> Callable[[Sums], Tensor]:
    """Fraction of variance unexplained."""
    return lambda s: s[arm]["error"] / s[arm]["variance"]


def l0(arm: str) -> Callable[[Sums], Tensor]:
    """Mean number of latents of a token."""
    return lambda s: s[arm]["l0"] / s[arm]["n"]


def gamma(arm: str) -> Callable[[Sums], Tensor]:
    """Below 1: shrinkage (Rajamanoharan et al. 2024a, equation 10)."""
    return lambda s: s[arm]["square_hat"] / s[arm]["product"]


def delta_ce(arm: str) -> Callable[[Sums], Tensor]:
    """Loss that splicing adds, nats per token."""
    return lambda s: s[arm]["delta_ce"] / s[arm]["n_loss"]


def kl(arm: str) -> Callable[[Sums], Tensor]:
    """KL(clean ‖ spliced), nats per token."""
    return lambda s: s[arm]["kl"] / s[arm]["n_loss"]


def over(a: Callable[[Sums], Tensor], b: Callable[[Sums], Tensor]) -> Callable[[Sums], Tensor]:
    """The ratio of two."""
    return lambda s: a(s) / b(s)


def less(a: Callable[[Sums], Tensor], b: Callable[[Sums], Tensor]) -> Callable[[Sums], Tensor]:
    """The difference of two."""
    return lambda s: a(s) - b(s)


def finding(
    data: Data | str,
    quantity: str,
    tables: Tables,
    statistic: Callable[[Sums], Tensor],
    *,
    above: float | None = None,
    below: float | None = None,
    condition: bool = False,
) -> Finding:
    """A statistic with its interval over sequences and seeds."""
    value, low, high = estimate(tables, statistic)
    words = data if isinstance(data, str) else data.words
    return Finding(words, quantity, value, low, high, above, below, condition)


def seeds_finding(
    data: Data | str, quantity: str, values: Sequence[float], *, above: float | None = None, below: float | None = None
) -> Finding:
    """One number for each seed: their mean, and from the smallest to the largest."""
    words = data if isinstance(data, str) else data.words
    return Finding(words, quantity, *of_runs(values), above=above, below=below)


def exact(
    data: Data | str, quantity: str, value: float, *, above: float | None = None, below: float | None = None
) -> Finding:
    """A number without an interval."""
    return seeds_finding(data, quantity, [value], above=above, below=below)


def measured(
    data: Data | str,
    measures: Sequence[Measure],
    quantity: str = "",
    *,
    above: float | None = None,
    below: float | None = None,
) -> Finding:
    """A suite's measure of each seed's SAE: the mean, from the lowest end of an interval to the highest."""
    words = data if isinstance(data, str) else data.words
    value = sum(m.value for m in measures) / len(measures)
    low, high = min(m.low for m in measures), max(m.high for m in measures)
    return Finding(words, quantity or f"{measures[0].name}, {measures[0].unit}", value, low, high, above, below)


def matched(lab: Lab, data: Data, saes: Mapping[str, list[SAE]], fixed: str | None = None) -> dict[str, list[Table]]:
    """Tables of all arms at one L0: that of the arm `fixed` for each seed, else the k of the data."""
    found: dict[str, list[Table]] = {arm: [] for arm in saes}
    for i in range(len(lab.seeds)):
        wanted = lab.size(data).k if fixed is None else mean_l0(saes[fixed][i], data)
        for arm, ones in saes.items():
            found[arm].append(table_at(lab, ones[i], data, wanted))
    return found


def table_at(lab: Lab, sae: SAE, data: Data, wanted: float) -> Table:
    """Of an SAE at another L0, kept for the next claim that asks. Of a TopK between two whole k: as if a share of the tokens
    had one and the others the other."""
    key = id(sae), data.words, wanted
    if key not in lab.at_l0:
        lab.at_l0[key] = _table_at(lab, sae, data, wanted)
    return lab.at_l0[key]


def _table_at(lab: Lab, sae: SAE, data: Data, wanted: float) -> Table:
    if not isinstance(sae.config.activation, TopK):
        return lab.tables([at_l0(sae, data, wanted)], data)[0]
    share = wanted % 1
    low, high = (lab.tables([_with_k(sae, k)], data)[0] for k in (math.floor(wanted), math.ceil(wanted)))
    return {name: (1 - share) * low[name] + share * high[name] for name in low}


def _with_k(sae: SAE, k: int) -> SAE:
    """The SAE itself where it has that k."""
    return sae if sae.config.activation == TopK(k=k) else with_topk(sae, k)


def same_l0(data: Data | str, tables: Tables, arm: str, other: str) -> Finding:
    """The condition that two arms have the same L0 on the measured sequences, by their ratio itself."""
    value, _, _ = estimate(tables, over(l0(arm), l0(other)))
    low, high = 1 - L0_TOLERANCE, 1 + L0_TOLERANCE
    words = data if isinstance(data, str) else data.words
    return Finding(words, f"L0, {arm} / {other}", value, value, value, low, high, condition=True)


def compared(data: Data, tables: Tables, arm: str, other: str, *, expected: bool = True) -> list[Finding]:
    """FVU, and of a language model added loss and KL, as ratios that shall be below 1: `arm` is the better one."""
    below = 1.0 if expected else None
    rows = [same_l0(data, tables, arm, other)]
    rows.append(finding(data, f"FVU, {arm} / {other}", tables, over(fvu(arm), fvu(other)), below=below))
    if isinstance(data, Site):
        rows.append(finding(data, f"KL, {arm} / {other}", tables, over(kl(arm), kl(other)), below=below))
        ratio = over(delta_ce(arm), delta_ce(other))
        rows.append(finding(data, f"added loss, {arm} / {other}", tables, ratio, below=below))
    return rows


def bars(title: str, y: str, findings: Sequence[Finding], *, log_y: bool = False) -> Plot:
    """Findings side by side, one series for each quantity."""
    return Plot(title, "", y, [], log_y=log_y, quantities=list(dict.fromkeys(f.quantity for f in findings)))
