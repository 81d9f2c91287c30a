"""Attribution: what each active latent contributes to one number that is read off the logits, the metric m.

The effect of a latent on a token is what m would lose by ablating it there, m(clean) - m(ablated): positive where it raises
m. Ablation is that of `ablate`: the error is kept, and all that comes later reacts as the model does.

    gradient      z_i σ(x) · ∂m/∂x · W_dec[i]     first order; one forward and one backward pass for all latents
    integrated    the same with the mean of ∂m/∂x on the way from x without its latents, x - σ(x) z W_dec, to x
    exact         m(clean) - m(ablated)           one row of a batch for each effect

The first is attribution patching against zero, with the error passed through: x' = decode(z') + (x - x_hat), where the
bracket is constant for z', and ∂m/∂x' goes on to x unchanged (Marks et al. 2024, arXiv 2403.19647). So at several sites each
effect is the latent's total effect, what it does through the latents of later sites included: effects of one site add up,
to first order, and those of different sites overlap. The integrated effects of a site sum to what ablating all its latents
at once takes from m (Sundararajan et al. 2017, completeness), while the other sites are left as they are: they share out
what the latents do together, which one of them need not do alone.

Tokens outside the mask of an SAE have no effects.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from saehook.attribution_metrics import Function, Logit, LogProb, Loss, Metric, function_of, values_of
from saehook.errors import ArgumentError
from saehook.latent_effects import (
    Active,
    ablated,
    active_latents,
    along,
    gradients_at,
    logits_of,
    mean_gradient,
    probed_at,
)

if TYPE_CHECKING:
    from saehook.hooked_saes import HookedSAEs

__all__ = ["Attribution", "LatentEffect", "LogProb", "Logit", "Loss", "Metric", "attribute_rows"]


class LatentEffect(NamedTuple):
    """One effect."""

    site: str
    latent: int
    position: int
    """The token, counted among the row's own; summed over tokens, that of the largest activation."""
    token: str
    activation: float
    effect: float


@dataclass(frozen=True)
class Attribution:
    """Effects of the active latents in one row: one for each token and latent, or one for each latent. All on the CPU."""

    metric: float
    """m(clean)."""
    sites: tuple[str, ...]
    """Names of the attached SAEs, as in `hooked.sites`."""
    site: Tensor
    """Index into `sites` of each effect, [n] int64."""
    position: Tensor
    """[n] int64, as in `LatentEffect`."""
    latent: Tensor
    """[n] int64."""
    activation: Tensor
    """[n] float32, raw."""
    effect: Tensor
    """[n] float32, in units of the metric."""
    ids: Tensor
    """The row, [S] int64."""
    tokens: list[str]
    """The text of each token."""
    by_token: bool = True
    """Whether each effect is that of one token."""

    def top(self, n: int = 10, *, sign: int = 0) -> list[LatentEffect]:
        """The n largest effects by absolute value, largest first; fewer if fewer are not 0.

        `sign`: 1 for those that raise the metric only, -1 for those that lower it.
        """
        if n < 1 or sign not in {-1, 0, 1}:
            raise ArgumentError(f"top({n}, sign={sign}); n of at least 1 and a sign of -1, 0 or 1 are expected.")
        size = self.effect.abs() if sign == 0 else self.effect * sign
        order = size.argsort(descending=True, stable=True)[:n]
        return [
            LatentEffect(
                self.sites[int(self.site[i])],
                int(self.latent[i]),
                int(self.position[i]),
                self.tokens[int(self.position[i])],
                float(self.activation[i]),
                float(self.effect[i]),
            )
            for i in order[size[order] > 0].tolist()
        ]

    @property
    def per_token(self) -> Tensor:
        """Sum of the effects at each token, [len(sites), S] float32.

        Raises:
            ArgumentError: `by_token` is False.
        """
        if not self.by_token:
            raise ArgumentError("these effects are those of whole latents. Ask for by_token=True.")
        sums = torch.zeros(len(self.sites), len(self.ids), dtype=torch.float64)
        sums.index_put_((self.site, self.position), self.effect.double(), accumulate=True)
        return sums.float()

    @functools.cached_property
    def summed(self) -> Attribution:
        """One effect for each latent, ordered by site and latent: the sum over its tokens, the largest of its activations and
        its position. Of exact effects this is the sum of single ablations; `by_token=False` ablates all tokens at once."""
        if not self.by_token:
            return self
        key = self.site * (int(self.latent.max()) + 1 if len(self.latent) else 1) + self.latent
        order = self.activation.argsort(descending=True, stable=True)
        order = order[key[order].argsort(stable=True)]
        _, group, counts = key[order].unique_consecutive(return_inverse=True, return_counts=True)
        sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, group, self.effect[order].double())
        peak = order[counts.cumsum(0) - counts]
        return replace(
            self,
            site=self.site[peak],
            position=self.position[peak],
            latent=self.latent[peak],
            activation=self.activation[peak],
            effect=sums.float(),
            by_token=False,
        )


def attribute_rows(
    hooked: HookedSAEs,
    rows: Sequence[Tensor],
    metric: Metric,
    *,
    steps: int | None = None,
    exact: bool = False,
    by_token: bool = True,
) -> list[Attribution]:
    """`HookedSAEs.attribute` of each row of ids."""
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ArgumentError(f"steps={steps!r}; a whole number of at least 1 is expected, or None for one gradient.")
    if steps is not None and exact:
        raise ArgumentError("exact=True needs no steps of an integral. Leave one of them out.")
    for name, value in (("exact", exact), ("by_token", by_token)):
        if not isinstance(value, bool):
            raise ArgumentError(f"{name}={value!r}; True or False is expected.")
    with torch.inference_mode(False), torch.enable_grad():  # whatever mode the caller is in
        rows = [row.clone() for row in rows]
        functions = [function_of(metric, hooked, row) for row in rows]
        if exact:
            pairs = zip(rows, functions, strict=True)
            return [_exactly(hooked, row, function, by_token) for row, function in pairs]
        probed = probed_at(hooked, hooked.sites)
        if steps is None:
            values, by_site = gradients_at(hooked, rows, functions, probed)
            gradients = {name: by_site[one.writes] for name, one in hooked.attached.items()}
            active = active_latents(hooked, probed)
        else:
            values = values_of(functions, logits_of(hooked.run(rows, probed.actions), rows))
            active = active_latents(hooked, probed)
            gradients = {
                name: mean_gradient(hooked, rows, functions, name, found, steps) for name, found in active.items()
            }
        effects = {name: along(found, gradients[name], hooked.saes[name].W_dec) for name, found in active.items()}
    results = [
        _result(hooked, row, i, value, active, effects)
        for i, (row, value) in enumerate(zip(rows, values.tolist(), strict=True))
    ]
    return results if by_token else [result.summed for result in results]


def _exactly(hooked: HookedSAEs, ids: Tensor, function: Function, by_token: bool) -> Attribution:
    """Effects in one row by ablation."""
    probed = probed_at(hooked, hooked.sites)
    value = float(values_of([function], logits_of(hooked.run([ids], probed.actions), [ids])))
    active = active_latents(hooked, probed)
    effects = {name: ablated(hooked, ids, function, name, found, by_token) for name, found in active.items()}
    if by_token:
        return _result(hooked, ids, 0, value, active, effects)
    result = _result(hooked, ids, 0, value, active, {name: found.activation for name, found in active.items()}).summed
    return replace(result, effect=torch.cat([effect.cpu() for effect in effects.values()]))


def _result(
    hooked: HookedSAEs,
    ids: Tensor,
    row: int,
    value: float,
    active: Mapping[str, Active],
    effects: Mapping[str, Tensor],
) -> Attribution:
    """The effects in one of the rows, and its metric."""
    columns: list[list[Tensor]] = []
    for number, (name, found) in enumerate(active.items()):
        mine = (found.row == row).nonzero()[:, 0]
        columns.append(
            [
                torch.full_like(mine, number),
                found.position[mine],
                found.latent[mine],
                found.activation[mine],
                effects[name][mine],
            ]
        )
    site, position, latent, activation, effect = (
        torch.cat([t.cpu() for t in parts]) for parts in zip(*columns, strict=True)
    )
    return Attribution(
        metric=value,
        sites=tuple(active),
        site=site,
        position=position,
        latent=latent,
        activation=activation,
        effect=effect,
        ids=ids,
        tokens=[hooked.tokenizer.decode([i]) for i in ids.tolist()],
    )
